"""What a collective sends and how long its links need: kinds, replica groups, ICI.

Assumed, not measured: `HOP_SECONDS` a step of a ring, and that a group which spans several
torus axes uses the links of all of them. When a collective runs is in replay.py.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

from retro_jax.topology.chips import Topology
from retro_jax.topology.program import Computation, Op, ProgramError

KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'ragged-all-to-all',
         'collective-permute', 'collective-broadcast')
HOP_SECONDS = 1e-6
_MOST_HOPS = 8  # from there on the pipeline of a long ring hides them


@dataclasses.dataclass(frozen=True)
class Transfer:
  """One run of a collective: `kind`, `num_bytes` a device sends, `seconds`, devices in a group."""
  kind: str
  num_bytes: float
  seconds: float
  group_size: int


def kind_of(op: Op) -> str | None:
  """The kind of a collective, or None for another op and for the ends of collectives."""
  opcode = op.opcode.removesuffix('-start')
  return opcode if opcode in KINDS else None


def transfer(computation: Computation, op: Op, topology: Topology,
             coordinates: Sequence[Sequence[int]]) -> Transfer:
  """The cost of one collective.

  Args:
    computation: where the op is.
    op: one for which `kind_of` is not None.
    topology: the slice.
    coordinates: of each device on the torus, in the order of the program's logical ids.
  """
  kind = kind_of(op)
  assert kind is not None, op
  group = replica_group(op, len(coordinates))
  size = len(group)
  given = sum(array.num_bytes for x in computation.inputs(op) for array in x.results)
  if kind == 'all-reduce' and _is_scattered(computation, op):
    kind = 'reduce-scatter'
  sent = {
      'all-gather': given * (size - 1),
      'reduce-scatter': given * (size - 1) / size,
      'all-reduce': 2 * given * (size - 1) / size,
      'all-to-all': given * (size - 1) / size,
      'ragged-all-to-all': given * (size - 1) / size,
  }.get(kind, given)
  if size == 1:
    return Transfer(kind, 0.0, 0.0, 1)
  rings, lines = spanned_axes(group, topology, coordinates)
  link = topology.chip.link_bytes_per_second
  if kind in ('all-to-all', 'ragged-all-to-all'):
    # Bound by the middle of each axis: of a ring of s devices a link carries s/8 of what one
    # device holds, of an open line twice that.
    axes = max(1, rings + lines)
    side = max(2, round(size ** (1 / axes)))
    return Transfer(kind, sent, given * side / 8 / (link if rings else link / 2) / axes, size)
  links = 1 if kind == 'collective-permute' else 2 * rings + lines
  return Transfer(kind, sent, sent / (link * links) + HOP_SECONDS * min(size, _MOST_HOPS), size)


def spanned_axes(group: Sequence[int], topology: Topology,
                 coordinates: Sequence[Sequence[int]]) -> tuple[int, int]:
  """Torus axes a group extends along: (closed rings, open lines)."""
  rings = lines = 0
  for axis, side in enumerate(topology.shape):
    span = len({coordinates[device][axis] for device in group})
    if span > 1:
      closed = topology.wrap[axis] and span == side
      rings, lines = rings + closed, lines + (not closed)
  return (rings, lines) if rings + lines else (1, 0)  # the devices of one chip


def replica_group(op: Op, num_devices: int) -> tuple[int, ...]:
  """Logical ids of the first group of devices that exchange data.

  Raises:
    ProgramError: a notation that is not known.
  """
  text = op.attributes
  if match := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', text):
    return tuple(sorted({int(match[1]), int(match[2])}))
  if 'replica_groups=' not in text or re.search(r'replica_groups=\{\}', text):
    return tuple(range(num_devices))
  if match := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
    return tuple(int(i) for i in match[1].split(','))
  if match := re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
    return _iota(match[3], match[4])[:int(match[2])]
  if match := re.search(
      r'replica_groups=mesh\[([^\]]*)\]'
      r'(?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}', text):
    group = _mesh_group(match[1], match[4])
    if not match[2]:
      return group
    devices = _iota(match[2], match[3])
    return tuple(sorted(devices[place] for place in group))
  raise ProgramError(f'unknown replica groups: {text[:160]}')


def _iota(dims: str, order: str | None) -> tuple[int, ...]:
  """All ids of [dims]T(order): iota(dims), transposed."""
  sizes = [int(size) for size in dims.split(',')]
  axes = [int(axis) for axis in order.split(',')] if order else range(len(sizes))
  strides = [math.prod(sizes[i + 1:]) for i in range(len(sizes))]
  ids = itertools.product(*(range(0, sizes[i] * strides[i], strides[i]) for i in axes))
  return tuple(sum(offsets) for offsets in ids)


def _mesh_group(axes: str, used: str) -> tuple[int, ...]:
  """The group of place 0 in mesh['a'=4,'b'=2] {'a', 'b':(1)2}.

  'b':(p)s is a part of axis b: of its indices, seen as p x s x rest, the middle ones.
  """
  sizes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)]
  parts = {name: (int(before or 1), int(size) if size else None)
           for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used)}
  if not sizes or not parts.keys() <= {name for name, _ in sizes}:
    raise ProgramError(f'unknown replica groups: mesh[{axes}] {{{used}}}')
  ids, stride = [0], 1
  for name, size in reversed(sizes):
    if name in parts:
      before, count = parts[name][0], parts[name][1] or size
      step = stride * (size // (before * count))
      ids = [i + step * j for i in ids for j in range(count)]
    stride *= size
  return tuple(sorted(ids))


def _is_scattered(computation: Computation, op: Op) -> bool:
  """Whether of an all-reduce each device keeps only its slice, inside one fusion.

  The TPU compiler writes a reduce-scatter so: a fusion of an all-reduce and the dynamic-slice
  at the device's place. It sends only what a reduce-scatter sends.
  """
  return computation.name.startswith('all-reduce-scatter') and (
      'all-reduce' in op.opcode and computation.root.opcode == 'dynamic-slice')
