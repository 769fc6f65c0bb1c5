"""What one op computes and moves: FLOPs on the MXU, bytes to and from HBM.

Loops are not entered here: replay.py multiplies by trip counts. Collectives are in network.py.
"""

import functools
import math
import re

import numpy as np

from retro_jax.topology.program import Array, Computation, Op, Program, ProgramError

HBM_SPACE = 0
COLLECTIVE_CALLS = ('AsyncCollectiveStart', 'AsyncCollectiveDone')
_SLICES = ('slice', 'dynamic-slice', 'gather')


class Arithmetic:
  """FLOPs and bytes of the ops of one program; results for computations are kept."""

  def __init__(self, program: Program):
    self._program = program
    self._flops: dict[str, float] = {}
    self._traffic: dict[str, tuple[dict[int, float], list[float | None]]] = {}

  def flops(self, computation: Computation, op: Op) -> float:
    """FLOPs of the matrix products in an op and what it calls, once; multiply-add is 2."""
    if op.opcode == 'convolution':
      return convolution_flops(*(x.results[0] for x in computation.inputs(op)[:2]),
                               op.results[0], op.attributes)
    if op.opcode == 'dot':
      left = computation.by_name[op.operands[0]].results[0]
      depth = math.prod(left.dims[i] for i in op.numbers('lhs_contracting_dims'))
      return 2.0 * op.results[0].size * depth
    return sum(map(self._computation_flops, self._program.called(op)))

  def _computation_flops(self, computation: Computation) -> float:
    if computation.name not in self._flops:
      self._flops[computation.name] = sum(self.flops(computation, op) for op in computation.ops)
    return self._flops[computation.name]

  def hbm_bytes(self, computation: Computation, op: Op) -> float:
    """Bytes read and written in HBM; what stays in VMEM counts nothing, a slice as a slice."""
    inputs = computation.inputs(op)
    if op.opcode in _SLICES:
      return _in_hbm(op.results) + (_size(op.results) if _in_hbm(inputs[0].results) else 0.0)
    if op.opcode == 'dynamic-update-slice':
      return _in_hbm(inputs[1].results) + (_size(inputs[1].results) if _in_hbm(op.results) else 0.0)
    reads: dict[int, float] = {}
    writes: list[float | None] = []
    if op.opcode == 'fusion':
      reads, writes = self._fusion_traffic(self._program.called(op)[0])
    total = 0.0
    for array, written in zip(op.results, writes or [None] * len(op.results), strict=True):
      total += _in_hbm((array,)) if written is None else written * (array.space == HBM_SPACE)
    for position, name in enumerate(op.operands):
      if name in computation.by_name:
        whole = _in_hbm(computation.by_name[name].results)
        total += min(whole, reads.get(position, whole))
    return total

  def _fusion_traffic(self, body: Computation) -> tuple[dict[int, float], list[float | None]]:
    """By parameter the bytes read, where that is less than all; by result the bytes written."""
    if body.name not in self._traffic:
      reads = {}
      for op in body.ops:
        if op.opcode == 'parameter' and (read := self._read(body, op.name)) is not None:
          reads[int(op.operands[0])] = read
      root = body.root
      results = ([body.by_name[name] for name in root.operands] if root.opcode == 'tuple'
                 else [root])
      writes = [self._written(body, op) for op in results]
      if len(writes) != len(root.results):  # a tuple in a tuple: nothing known of its parts
        writes = [None] * len(root.results)
      self._traffic[body.name] = (reads, writes)
    return self._traffic[body.name]

  def _read(self, body: Computation, name: str) -> float | None:
    """Bytes read of a value inside a fusion; None for all of it."""
    total = 0.0
    for user, position in body.users.get(name, []):
      if user.opcode in ('slice', 'dynamic-slice'):
        total += _size(user.results) if position == 0 else 0.0
      elif user.opcode == 'dynamic-update-slice' and position != 1:
        pass  # written in place; what is written may lie elsewhere
      elif user.opcode == 'tuple' or _is_collective(user):
        pass  # handed on, or moved by the network's engines while others compute
      elif user.opcode == 'bitcast':
        if (read := self._read(body, user.name)) is None:
          return None
        total += read
      elif user.opcode == 'fusion':
        reads, _ = self._fusion_traffic(self._program.called(user)[0])
        if position not in reads:
          return None
        total += reads[position]
      else:
        return None
    return total

  def _written(self, body: Computation, op: Op) -> float | None:
    """Bytes written for one result of a fusion; None for all of it."""
    while op.opcode == 'bitcast' and op.operands[0] in body.by_name:
      op = body.by_name[op.operands[0]]
    if op.opcode == 'dynamic-update-slice':
      return _size(body.by_name[op.operands[1]].results)
    return 0.0 if op.opcode == 'parameter' or _is_collective(op) else None


def kernel_flops(computation: Computation, op: Op) -> float:
  """FLOPs of a Pallas kernel: its own estimate, or those of splash attention from its shapes.

  0 where neither is known. A splash kernel is taken to be causal: half of the pairs.
  """
  if match := re.search(r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)', op.attributes):
    return float(match[1])
  label = f'{op.name} {op.op_name}'
  found = re.search(r'splash_m[hq]a_(fwd|dq|dkv)', label)
  wide = [array for operand in computation.inputs(op) for array in operand.results
          if len(array.dims) >= 3 and array.dtype in ('bf16', 'f32')]
  if not found or len(wide) < 2:
    return 0.0
  query, key = wide[:2]
  # q.k and p.v; dq adds q.k, do.v and ds.k; dkv q.k, do.v, p.do, ds.q, and dq when fused.
  products = {'fwd': 2, 'dq': 3, 'dkv': 5 if _makes_dq(op, query) else 4}
  pairs = math.prod(query.dims[:-1]) * key.dims[-2] / 2
  return 2.0 * products[found[1]] * pairs * query.dims[-1]


def _makes_dq(op: Op, query: Array) -> bool:
  """Whether a dkv kernel also returns dq: a third large result."""
  return sum(array.size >= query.size for array in op.results) >= 3


@functools.lru_cache(maxsize=None)
def convolution_flops(left: Array, right: Array, out: Array, attributes: str) -> float:
  """FLOPs of a convolution, counting only taps that meet an input.

  The TPU compiler writes every matrix product as one; batch dimensions become windows with
  padding and dilation, most of whose taps fall beside the input.
  """
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', attributes)
  if not labels:
    raise ProgramError(f'a convolution without dim_labels: {attributes[:120]}')
  of_left, of_right, of_out = labels.groups()
  window = {}
  if match := re.search(r'window=\{([^}]*)\}', attributes):
    window = {key: value.split('x') for key, value in
              (part.split('=') for part in match[1].split())}
  total = (2.0 * out.dims[of_out.index('b')] * out.dims[of_out.index('f')]
           * right.dims[of_right.index('i')])
  for axis in range(len(of_left) - 2):
    setting = lambda key, default: int(window[key][axis]) if key in window else default
    before = int(window['pad'][axis].split('_')[0]) if 'pad' in window else 0
    total *= _meeting_taps(
        left.dims[of_left.index(str(axis))], right.dims[of_right.index(str(axis))],
        out.dims[of_out.index(str(axis))], setting('stride', 1), before,
        setting('lhs_dilate', 1), setting('rhs_dilate', 1))
  return total


@functools.lru_cache(maxsize=None)
def _meeting_taps(inputs: int, taps: int, outputs: int, stride: int, before: int,
                  input_dilation: int, tap_dilation: int) -> int:
  """Pairs of an output and a tap that fall on an input, along one axis."""
  last = (inputs - 1) * input_dilation
  offsets = np.arange(taps) * tap_dilation - before
  count = 0
  for output in range(outputs):
    at = offsets + output * stride
    count += int(((at >= 0) & (at <= last) & (at % input_dilation == 0)).sum())
  return count


def _size(arrays: tuple[Array, ...]) -> float:
  return sum(array.num_bytes for array in arrays)


def _in_hbm(arrays: tuple[Array, ...]) -> float:
  return sum(array.num_bytes for array in arrays if array.space == HBM_SPACE)


def _is_collective(op: Op) -> bool:
  return op.target in COLLECTIVE_CALLS or op.opcode.startswith(
      ('all-', 'reduce-scatter', 'collective-', 'ragged-all-to-all'))
