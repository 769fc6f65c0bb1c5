"""Reads the scheduled HLO text that libtpu's compiler writes (`compiled.as_text()`).

The result is computations of ops in schedule order, and the table of stack frames that says
which function made an op. What ops cost is in arithmetic.py, network.py and cost.py. A line
inside a computation that is not understood is an error; one outside is kept in `unparsed`.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable

from retro_jax.topology import lexer
from retro_jax.topology.lexer import ProgramError

_ITEM_BYTES = {
    'pred': 1, 's2': .25, 'u2': .25, 's4': .5, 'u4': .5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2,
    's32': 4, 'u32': 4, 's64': 8, 'u64': 8, 'bf16': 2, 'f16': 2, 'f32': 4, 'f64': 8, 'c64': 8,
    'c128': 16, 'token': 0, 'opaque': 0}
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_SPACE = re.compile(r'S\((\d+)\)')
_COMMENT = re.compile(r'/\*.*?\*/')
_HEAD = re.compile(r'(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$')
_END = re.compile(r'\}(?:, execution_thread="[^"]*")?$')
_FRAME_TABLES = ('FileNames', 'FunctionNames', 'FileLocations', 'StackFrames')

HOST_SPACE = 5


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a type: `dtype`, `dims`, and the memory `space` (0 HBM, 1 VMEM, 5 host)."""
  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def num_bytes(self) -> float:
    """Bytes without padding."""
    if self.dtype not in _ITEM_BYTES and not self.dtype.startswith('f8'):
      raise ProgramError(f'unknown element type {self.dtype!r}')
    return _ITEM_BYTES.get(self.dtype, 1) * self.size


def arrays(text: str) -> tuple[Array, ...]:
  """All arrays of a type, tuples flattened."""
  found = []
  for dtype, dims, layout in _ARRAY.findall(text):
    space = _SPACE.search(layout)
    found.append(Array(dtype, tuple(int(d) for d in dims.split(',') if d),
                       int(space[1]) if space else 0))
  return tuple(found)


@dataclasses.dataclass(frozen=True)
class Op:
  """One instruction.

  Attributes:
    name, opcode: as written.
    type: text of the result's type.
    operands: names of ops of the same computation; for constants and parameters the literal.
    attributes: the text after the operands.
    is_root: whether it is the computation's result.
  """
  name: str
  opcode: str
  type: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  @functools.cached_property
  def results(self) -> tuple[Array, ...]:
    return arrays(self.type)

  def attribute(self, key: str) -> str | None:
    """The bare word after `key=`, without a %."""
    match = re.search(rf'[ ,]{key}=%?([\w.\-]+)', self.attributes)
    return match and match[1]

  def numbers(self, key: str) -> tuple[int, ...]:
    """The list in `key={1,2}`; () where there is none."""
    match = re.search(rf'[ ,]{key}=\{{([\d,]*)\}}', self.attributes)
    return tuple(int(x) for x in match[1].split(',') if x) if match else ()

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """Computations this op runs; reducers and conditions, a few scalars each, left out."""
    keys = ('calls', 'async_computation', 'called_computation', 'true_computation',
            'false_computation')
    if self.opcode in ('call', 'call-start'):
      keys += ('to_apply',)
    if self.opcode == 'while':
      keys = ('body',)
    names = [name for key in keys if (name := self.attribute(key))]
    for key in ('branch_computations', 'called_computations'):
      if match := re.search(rf'{key}=\{{([^}}]*)\}}', self.attributes):
        names += [name.strip(' %') for name in match[1].split(',')]
    return tuple(names)

  @functools.cached_property
  def estimated_cycles(self) -> int | None:
    match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
    return int(match[1]) if match else None

  @functools.cached_property
  def op_name(self) -> str:
    """JAX's path to the primitive, '' for what the compiler added."""
    match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return match[1] if match else ''

  @property
  def frame(self) -> int | None:
    match = re.search(r'stack_frame_id=(\d+)', self.attributes)
    return int(match[1]) if match else None

  @functools.cached_property
  def channel(self) -> str:
    """What start, middle and end of one asynchronous collective have in common."""
    match = re.search(r'channel_id=(\d+)', self.attributes)
    return match[1] if match else self.name

  @property
  def target(self) -> str:
    """Of a custom call."""
    match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return match[1] if match else ''


@dataclasses.dataclass(frozen=True)
class Computation:
  """Attributes: `name`; `ops` in schedule order."""
  name: str
  ops: tuple[Op, ...]

  @functools.cached_property
  def by_name(self) -> dict[str, Op]:
    return {op.name: op for op in self.ops}

  @functools.cached_property
  def users(self) -> dict[str, list[tuple[Op, int]]]:
    """Who reads an op, and as which operand."""
    found = collections.defaultdict(list)
    for op in self.ops:
      for position, name in enumerate(op.operands):
        found[name].append((op, position))
    return found

  @functools.cached_property
  def root(self) -> Op:
    for op in reversed(self.ops):
      if op.is_root:
        return op
    raise ProgramError(f'computation {self.name} has no ROOT')

  def inputs(self, op: Op) -> tuple[Op, ...]:
    return tuple(self.by_name[name] for name in op.operands if name in self.by_name)


@dataclasses.dataclass(frozen=True)
class Program:
  """A parsed text.

  Attributes:
    computations: by name.
    entry: the one that runs.
    frames: by id, (function, id of the calling frame or 0).
    unparsed: lines outside computations that were not understood.
  """
  computations: dict[str, Computation]
  entry: Computation
  frames: dict[int, tuple[str, int]]
  unparsed: tuple[str, ...]

  def called(self, op: Op) -> tuple[Computation, ...]:
    """The computations an op runs.

    Raises:
      ProgramError: one that is not in the text.
    """
    missing = [name for name in op.called if name not in self.computations]
    if missing:
      raise ProgramError(f'{op.name} calls {missing[0]}, which is not in the text')
    return tuple(self.computations[name] for name in op.called)

  def functions(self, op: Op) -> tuple[str, ...]:
    """Qualified names of the Python functions that made an op, innermost first."""
    names, frame, seen = [], op.frame, set()
    while frame in self.frames and frame not in seen:
      seen.add(frame)
      name, frame = self.frames[frame]
      names.append(name)
    return tuple(names)

  def trip_count(self, loop: Op) -> int:
    """How often a while loop's body runs.

    Raises:
      ProgramError: a loop that does not count to a constant.
    """
    if match := re.search(r'known_trip_count"?[=:]\s*\{"?n"?[=:]"?(\d+)', loop.attributes):
      return int(match[1])
    # libtpu states no count: JAX's loops count from 0, and end at the constant that the
    # condition compares with, perhaps inside a fusion.
    condition = self.computations.get(loop.attribute('condition') or '')
    if condition is not None:
      ends = condition.inputs(condition.root)
      inside = [op for body in self.called(condition.root) for op in body.ops]
      bounds = _integers(ends) or _integers(inside)
      if len(bounds) == 1:
        return max(bounds[0], 0)
    raise ProgramError(f'no trip count found for the loop {loop.name}')


def parse(text: str) -> Program:
  """Parses a whole HLO text.

  Raises:
    ProgramError: a line inside a computation that is not understood, or no ENTRY.
  """
  computations: dict[str, Computation] = {}
  tables: dict[str, dict[int, str]] = {name: {} for name in _FRAME_TABLES}
  entry = table = None
  name, ops, unparsed = '', None, []
  for line in lexer.logical_lines(text.splitlines()):
    if ops is not None:
      if _END.match(line):
        computations[name] = Computation(name, tuple(ops))
        ops = None
      elif line.strip():
        ops.append(_parse_op(line))
    elif line in tables:
      table = line
    elif table and (match := re.match(r'(\d+) (.*)$', line)):
      tables[table][int(match[1])] = match[2]
    elif match := _HEAD.match(line):
      name, ops, table = match[2], [], None
      entry = name if match[1] else entry
    elif line.strip() and not line.startswith('HloModule '):
      unparsed.append(line)
  if ops is not None:
    raise ProgramError(f'computation {name} does not end')
  if entry is None:
    raise ProgramError('no ENTRY computation; expected the text of a compiled program')
  return Program(computations, computations[entry], _frames(tables), tuple(unparsed))


def _integers(ops: Iterable[Op]) -> list[int]:
  return [int(op.operands[0]) for op in ops
          if op.opcode == 'constant' and re.fullmatch(r'-?\d+', op.operands[0])]


def _parse_op(line: str) -> Op:
  match = lexer.OP.match(line)
  if not match:
    raise ProgramError(f'not an HLO op: {line[:200]}')
  start = match.end()
  after_type = lexer.closing(line, start) if line[start] == '(' else line.find(' ', start)
  opening = line.find('(', after_type)
  if after_type < 0 or opening < 0:
    raise ProgramError(f'not an HLO op: {line[:200]}')
  opcode = line[after_type:opening].strip()
  after_operands = lexer.closing(line, opening)
  inside = line[opening + 1:after_operands - 1]
  if opcode in ('constant', 'parameter'):
    operands = (inside,)
  else:
    # A typed operand is 'bf16[8,128]{1,0} %name'; only the name matters.
    operands = tuple(part.split()[-1].lstrip('%') for part in lexer.split(_COMMENT.sub('', inside)))
  return Op(match[2], opcode, _COMMENT.sub('', line[start:after_type]), operands,
            line[after_operands:], bool(match[1]))


def _frames(tables: dict[str, dict[int, str]]) -> dict[int, tuple[str, int]]:
  field = lambda text, key: int(m[1]) if (m := re.search(rf'\b{key}=(\d+)', text)) else 0
  calling = {i: field(text, 'parent_frame_id') for i, text in tables['StackFrames'].items()}
  # The text counts callers from 1 for 'none': then the first frame seems to call itself.
  shift = int(any(i == parent for i, parent in calling.items()))
  frames = {}
  for i, text in tables['StackFrames'].items():
    location = tables['FileLocations'].get(field(text, 'file_location_id'), '')
    function = tables['FunctionNames'].get(field(location, 'function_name_id'), '')
    frames[i] = (function.strip('"'), calling[i] - shift)
  return frames
