"""Causal attention with relative positions as one fused TPU kernel: no n x n array leaves VMEM.

The kernel works on one head of one sequence at a time, all of whose rows fit VMEM, and goes through
its queries by blocks of rows. A block meets every key up to its end at once, so there is no
running softmax, and the backward pass needs nothing of the forward pass but its inputs.

Logits of distances come out of the product with the distances' keys in order of distance and are
turned into the order of keys by a roll that grows by 1 from row to row, which the TPU's lanes do
by themselves (`skew` of positions.py for a tile). Its inverse would have to shrink from row to
row, which they do not: the tile's rows are turned upside down for it, by a product with a
permutation, the only extra work.

Who calls it, and what it is compared with, is in attention_kernels.py.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from retro_jax.errors import UserError
from retro_jax.models.attention_kernels import MASKED_LOGIT

Array = jax.Array
ROWS = 128
# Their lanes cannot roll by a distance that grows from row to row.
UNABLE = ('TPU v2', 'TPU v3', 'TPU v4', 'TPU v4 lite')
# Blocks meet the first 1/4, 2/4, 3/4 or 4/4 of the keys: the causal half but for 1/8 of the square.
_WIDTHS = 4
# Products of a tile: q k, position p, weights v; and again the first two, dO v, three with the
# tile's gradient, two with its skewed one; the permutation is counted by itself.
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 3, 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend(q: Array, position: Array, k: Array, v: Array, p: Array, segments: Array,
           rows: int = ROWS, interpret: bool = False) -> Array:
  """Softmax over j <= i of q_i . k_j + position_i . p(i - j), times v (the paper's B.1.2).

  Args:
    q, position: [b, h, n, c], queries for keys and for distances, scaled.
    k, v: [b, h, n, c].
    p: [h, n, c], keys of the distances n - 1 .. 0.
    segments: int32 [b, n]; rows read keys of their own segment alone.
    rows: of a block, dividing n; on TPUs a multiple of 128.
    interpret: run as plain XLA, slowly, anywhere.

  Returns:
    [b, h, n, c], dtype of v.

  Raises:
    UserError: rows do not divide n.
  """
  return _forward(q, position, k, v, p, segments, rows, interpret)[0]


def _forward(q: Array, position: Array, k: Array, v: Array, p: Array, segments: Array, rows: int,
             interpret: bool):
  inputs = (q, position, k, v, _padded(p, rows), segments[:, :, None], segments[:, None])
  outputs = [jax.ShapeDtypeStruct(q.shape, v.dtype)]
  mixed = _call(_forward_kernel, inputs, outputs, [], rows, interpret, _FORWARD_PRODUCTS)[0]
  return mixed, (q, position, k, v, p, segments)


def _backward(rows: int, interpret: bool, kept, gradient: Array):
  q, position, k, v, p, segments = kept
  padded = _padded(p, rows)
  inputs = (q, position, k, v, padded, segments[:, :, None], segments[:, None], gradient)
  outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, position, k, v)]
  outputs.append(jax.ShapeDtypeStruct(padded.shape, jnp.float32))
  n, width = q.shape[2:]
  scratch = [pltpu.VMEM((n, width), jnp.float32)] * 2
  *of_inputs, of_p = _call(_backward_kernel, inputs, outputs, scratch, rows, interpret,
                           _BACKWARD_PRODUCTS + rows / width)
  return *of_inputs, of_p[:, :p.shape[1]].astype(p.dtype), None


attend.defvjp(_forward, _backward)


def _step(n: int, rows: int) -> int:
  """Keys by which one width of a tile is more than the one before."""
  return rows * -(-n // (rows * _WIDTHS))


def _padded(p: Array, rows: int) -> Array:
  """Distances below 0, which the last widths reach and nobody reads."""
  return jnp.pad(p, ((0, 0), (0, _step(p.shape[1], rows) - rows), (0, 0)))


def _call(kernel: Callable[..., None], inputs: tuple[Array, ...],
          outputs: list[jax.ShapeDtypeStruct], scratch: list, rows: int, interpret: bool,
          products: float) -> list[Array]:
  """`kernel` for every head and, inside of it, every sequence."""
  batch, heads, n, width = inputs[0].shape
  if n % rows:
    raise UserError(f"attention_kernel = 'flash_relative' takes sequences of a multiple of {rows} "
                    f'tokens, got {n}; set RetroConfig.attention_block to a divisor (on TPUs a '
                    "multiple of 128), or RetroConfig.attention_kernel = 'blocked'")
  ends = _ends(n, rows)
  pairs = sum(end * (end - before) for before, end in zip([0, *ends], ends))
  return pl.pallas_call(
      functools.partial(kernel, rows=rows), grid=(heads, batch), in_specs=list(map(_spec, inputs)),
      out_specs=list(map(_spec, outputs)), out_shape=outputs, scratch_shapes=scratch,
      interpret=interpret, name=f'flash_relative{kernel.__name__.removesuffix("_kernel")}',
      cost_estimate=pl.CostEstimate(
          flops=int(products * 2 * batch * heads * pairs * width),
          transcendentals=batch * heads * pairs,
          bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*inputs, *outputs))),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'),
          vmem_limit_bytes=_vmem(n, width, rows, inputs[0].dtype.itemsize)),
  )(*inputs)


def _spec(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
  """What the kernel sees of x: the last two axes, of one sequence and head.

  Segments are of a sequence, distances of a head alone: their gradient is summed over sequences.
  """
  lead = len(x.shape) - 2
  if lead == 2:
    place = lambda h, b: (b, h, 0, 0)
  elif x.dtype == jnp.int32:
    place = lambda h, b: (b, 0, 0)
  else:
    place = lambda h, b: (h, 0, 0)
  return pl.BlockSpec((*[None] * lead, *x.shape[lead:]), place)


def _vmem(n: int, width: int, rows: int, itemsize: int) -> int:
  """Bytes: two of every block in and out, sums of gradients, and eight tiles of logits."""
  blocks = 2 * 10 * n * width * itemsize + 4 * n * width * 4
  return blocks + 8 * rows * n * 4 + 2 * 2 * n * 128 * 4


def _ends(n: int, rows: int) -> list[int]:
  """How many keys the blocks of each width meet; the blocks end there or up to a step before."""
  step = _step(n, rows)
  return [min(end, n) for end in range(step, n + step, step)]


def _for_each_block(n: int, rows: int, body: Callable[[Array, int], None]) -> None:
  """`body(first row, number of keys)` for every block of rows."""
  before = 0
  for end in _ends(n, rows):
    def block(number: Array, _, end=end):
      body(pl.multiple_of(number * rows, rows), end)
      return _
    jax.lax.fori_loop(before // rows, end // rows, block, 0)
    before = end


_of_columns = (((1,), (1,)), ((), ()))
_of_rows = (((0,), (0,)), ((), ()))
_plain = (((1,), (0,)), ((), ()))


def _product(a: Array, b: Array, dimensions) -> Array:
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _tile(q_ref, position_ref, k_ref, p_ref, row_segments, column_segments, first, end: int,
          rows: int) -> tuple[Array, Array, pl.Slice, pl.Slice]:
  """exp(logits - the row's largest) [rows, end], its sums; which rows, and which distances."""
  at = pl.ds(first, rows)
  # The block's last row meets its first key at distance first + rows - 1.
  near = pl.ds(pl.multiple_of(q_ref.shape[0] - rows - first, rows), end)
  logits = _product(q_ref[at], k_ref[:end], _of_columns)
  of_distance = _product(position_ref[at], p_ref[near], _of_columns)
  # Row i needs for key j what lies at rows - 1 - i + j; what comes around is above the diagonal.
  logits += pltpu.roll(of_distance, (end - rows + 1) % end, 1, stride=1, stride_axis=0)
  place = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (rows, end), axis)
  readable = ((place(1) <= place(0) + first)
              & (row_segments[at] == column_segments[:, :end]))
  logits = jnp.where(readable, logits, MASKED_LOGIT)
  weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
  return weights, weights.sum(axis=1, keepdims=True), at, near


def _forward_kernel(q_ref, position_ref, k_ref, v_ref, p_ref, row_segments, column_segments,
                    mixed_ref, *, rows: int) -> None:

  def block(first: Array, end: int) -> None:
    weights, total, at, _ = _tile(q_ref, position_ref, k_ref, p_ref, row_segments,
                                  column_segments, first, end, rows)
    mixed = _product(weights.astype(v_ref.dtype), v_ref[:end], _plain)
    mixed_ref[at] = (mixed / total).astype(mixed_ref.dtype)

  _for_each_block(q_ref.shape[0], rows, block)


def _backward_kernel(q_ref, position_ref, k_ref, v_ref, p_ref, row_segments, column_segments,
                     gradient_ref, of_q_ref, of_position_ref, of_k_ref, of_v_ref, of_p_ref,
                     of_k, of_v, *, rows: int) -> None:
  dtype = q_ref.dtype
  of_k[...] = jnp.zeros_like(of_k)
  of_v[...] = jnp.zeros_like(of_v)

  @pl.when(pl.program_id(1) == 0)
  def _():
    of_p_ref[...] = jnp.zeros_like(of_p_ref)

  place = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (rows, rows), axis)
  upside_down = (place(0) + place(1) == rows - 1).astype(dtype)
  turned = lambda x: _product(upside_down, x, _plain)

  def block(first: Array, end: int) -> None:
    weights, total, at, near = _tile(q_ref, position_ref, k_ref, p_ref, row_segments,
                                     column_segments, first, end, rows)
    weights /= total
    gradient = gradient_ref[at]
    of_v[:end] += _product(weights.astype(dtype), gradient, _of_rows)
    of_weights = _product(gradient, v_ref[:end], _of_columns)
    of_logits = weights * (of_weights - (weights * of_weights).sum(axis=1, keepdims=True))
    of_logits = of_logits.astype(dtype)
    of_q_ref[at] = _product(of_logits, k_ref[:end], _plain).astype(dtype)
    of_k[:end] += _product(of_logits, q_ref[at], _of_rows)
    # Back in order of distance: row i of the block moves by rows - 1 - i, upside down by i.
    of_distance = pltpu.roll(turned(of_logits), 0, 1, stride=1, stride_axis=0).astype(dtype)
    of_position = _product(of_distance, p_ref[near], _plain).astype(dtype)
    of_position_ref[at] = turned(of_position).astype(dtype)
    of_p_ref[near] += _product(of_distance, turned(position_ref[at]).astype(dtype), _of_rows)

  _for_each_block(q_ref.shape[0], rows, block)
  of_k_ref[...] = of_k[...].astype(dtype)
  of_v_ref[...] = of_v[...].astype(dtype)
