"""Softmax attention over projected heads: a plain one, and faster ones that compute the same.

Queries come scaled. `by_distance` = (queries [..., q, h, c], keys [distances, h, c] in the
order of positions.distances) adds the logits of relative positions; None for the others.
Logits and softmax are float32 whatever the dtype of the heads.

| kernel           | positions | what it does |
|---|---|---|
| `einsum`         | all       | the n x n logits of all heads at once: the reference |
| `blocked`        | all       | rows by blocks, each against the keys before its end: half the work |
| `dot_product`    | others    | jax.nn.dot_product_attention, by cuDNN where it takes the heads |
| `splash`         | others    | the fused TPU kernel of JAX, on each device's own rows and heads |
| `flash_relative` | relative  | our fused TPU kernel (flash_relative.py), likewise |
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.errors import UserError
from retro_jax.models.for_cpus import row_max, row_sum
from retro_jax.models.placement import (
    device_kind, has_cudnn, on_each_device, on_one_cpu, platform)
from retro_jax.models.positions import skew

Array = jax.Array
ByDistance = tuple[Array, Array] | None
KERNELS = ('einsum', 'blocked', 'dot_product', 'splash', 'flash_relative')
# Those that know no logits by distance, and those that know nothing else.
ROTARY_KERNELS = ('dot_product', 'splash')
RELATIVE_KERNELS = ('flash_relative',)
# Far below any real logit, yet finite: a row with every key masked stays free of NaN.
MASKED_LOGIT = -1e30
_BLOCK = 128
# Neighbouring rows whose products with distances are one, on CPUs.
_TOGETHER = 16


def masked(q: Array, k: Array, v: Array, mask: Array, by_distance: ByDistance = None,
           key_groups: int = 1) -> Array:
  """Attention under any mask.

  Args:
    q: [..., q, h, c], scaled.
    k, v: [..., s, h, c].
    mask: bool, broadcastable to [..., q, s]; rows without True give exactly 0.
    by_distance: see above, of s / key_groups columns.
    key_groups: groups of keys with equal distances.

  Returns:
    [..., q, h, c], dtype of v.
  """
  if by_distance is None and _cudnn_takes(q, k):
    return _by_cudnn(q, k, v, mask)
  return _by_logits(q, k, v, mask, by_distance, key_groups)


def _by_logits(q: Array, k: Array, v: Array, mask: Array, by_distance: ByDistance,
               key_groups: int = 1) -> Array:
  """`masked`, with logits that exist."""
  by_key = None
  if by_distance is not None:
    by_key = _position_logits(*by_distance, k.shape[-3] // key_groups)
    by_key = jnp.tile(by_key, key_groups) if key_groups > 1 else by_key
  if _heads_first():
    return _by_head(q, k, v, mask, by_key)
  logits = jnp.einsum('...qhc,...shc->...hqs', q, k, preferred_element_type=jnp.float32)
  if by_key is not None:
    logits += by_key
  weights = masked_softmax(logits, mask[..., None, :, :])
  return jnp.einsum('...hqs,...shc->...qhc', weights.astype(v.dtype), v)


def _heads_first() -> bool:
  """Whether logits that exist are better made and read heads first, with a gradient by hand."""
  return on_one_cpu() or platform() == 'gpu'


def _by_head(q: Array, k: Array, v: Array, mask: Array, by_key: Array | None) -> Array:
  """The same: heads before rows, and before those axes of q over which k is the same."""
  after = 3 + _shared_axes(q, k)
  by_head = lambda x: jnp.moveaxis(x, -2, -after)
  if by_key is not None:
    by_key = jnp.moveaxis(by_key, -3, -after)
  if mask.ndim >= after - 1:
    mask = jnp.expand_dims(mask, -after)
  mixed = _attend(by_head(q), by_head(k), by_head(v), mask, by_key)
  return jnp.moveaxis(mixed, -after, -2)


def _shared_axes(q: Array, k: Array) -> int:
  """How many of the last leading axes of q are 1 in k, whose keys then serve all of q's."""
  pairs = zip(q.shape[-4::-1], k.shape[-4::-1])
  return len(list(itertools.takewhile(lambda pair: pair[0] > 1 == pair[1], pairs)))


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, mask: Array, by_key: Array | None) -> Array:
  """Attention of q [..., h, q, c] to k and v [..., h, s, c], leading axes broadcast.

  With a gradient of its own: the softmax is divided by its sum only after the product with the
  values, where there is less to divide, and its backward pass sums over c instead of s (Dao et
  al. 2022, appendix B).

  Args:
    q: scaled.
    k, v: see above.
    mask: bool, broadcastable to the logits [..., h, q, s].
    by_key: float32, added to the logits, of their shape; or None.

  Returns:
    [..., h, q, c], dtype of v.
  """
  return _attend_forward(q, k, v, mask, by_key)[0]


_logits = functools.partial(jnp.einsum, '...qc,...sc->...qs')
_mix = functools.partial(jnp.einsum, '...qs,...sc->...qc')


def _attend_forward(q: Array, k: Array, v: Array, mask: Array, by_key: Array | None):
  logits = _logits(q, k, preferred_element_type=jnp.float32)
  if by_key is not None:
    logits += by_key
  logits = jnp.where(mask, logits, MASKED_LOGIT)
  largest = row_max(logits)
  weights = jnp.exp(logits - largest)
  # A row that may read nothing has only logits that are masked; it gets 0, and so do gradients.
  inverse = jnp.where(largest > MASKED_LOGIT / 2, 1 / row_sum(weights), 0.0)
  weights = weights.astype(v.dtype)
  mixed = _mix(weights, v, preferred_element_type=jnp.float32) * inverse
  mixed = mixed.astype(v.dtype)
  return mixed, (q, k, v, weights, inverse, mixed, None if by_key is None else ())


def _attend_backward(kept, gradient: Array):
  q, k, v, weights, inverse, mixed, with_by_key = kept
  gradient = gradient * inverse
  of_weights, of_v = jax.vjp(_mix, weights, v)[1](gradient.astype(v.dtype))
  of_logits = weights * (of_weights - row_sum(gradient * mixed))
  of_q, of_k = jax.vjp(_logits, q, k)[1](of_logits.astype(q.dtype))
  return of_q, of_k, of_v, None, None if with_by_key is None else of_logits


_attend.defvjp(_attend_forward, _attend_backward)


def _position_logits(position: Array, p: Array, columns: int) -> Array:
  """Logits of relative positions, [..., h, q, columns], from the two parts of ByDistance.

  Every row meets every distance, and `skew` picks what belongs to each key. On CPUs rows meet only
  what occurs in the block of rows they stand in: for a short sequence that asks in both
  directions, half of the products would be for nobody.
  """
  if not on_one_cpu():
    of_distance = jnp.einsum('...qhc,thc->...hqt', position, p, preferred_element_type=jnp.float32)
    return skew(of_distance, columns)
  *lead, rows, heads, width = position.shape
  block = math.gcd(rows, _TOGETHER)
  blocks = rows // block
  p = jnp.stack([p[rows - last:][:block + columns] for last in range(block, rows + 1, block)])
  # Sequences as one axis: XLA for CPUs is slower with several.
  position = position.reshape(-1, blocks, block, heads, width).transpose(3, 1, 0, 2, 4)
  of_distance = jnp.einsum('harc,athc->hart', position.reshape(heads, blocks, -1, width), p,
                           preferred_element_type=jnp.float32)
  by_key = _skew_few(of_distance.reshape(heads, blocks, -1, block, p.shape[1]), columns)
  return by_key.transpose(2, 0, 1, 3, 4).reshape(*lead, heads, rows, columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _skew_few(by_distance: Array, columns: int) -> Array:
  """`skew` of few rows with rows + columns distances, the gradient put in place row by row.

  XLA for CPUs is slow at the pads that it would be otherwise.
  """
  return skew(by_distance, columns)


def _skew_few_backward(columns: int, _, gradient: Array) -> tuple[Array]:
  rows = gradient.shape[-2]
  whole = jnp.zeros((*gradient.shape[:-1], rows + columns), gradient.dtype)
  for i in range(rows):
    first = rows - 1 - i
    whole = whole.at[..., i, first:first + columns].set(gradient[..., i, :])
  return (whole,)


_skew_few.defvjp(lambda x, columns: (skew(x, columns), None), _skew_few_backward)


def causal(q: Array, k: Array, v: Array, segments: Array, by_distance: ByDistance,
           kernel: str, block: int = 0) -> Array:
  """Attention of [b, n, h, c] to itself inside each segment (int32 [b, n]), up to each row."""
  if kernel == 'splash':
    return _splash(q, k, v, segments, block)
  if kernel == 'flash_relative':
    return _flash_relative(q, k, v, segments, by_distance, block)
  if kernel == 'dot_product':
    return _dot_product(q, k, v, segments)
  if kernel not in ('einsum', 'blocked'):
    raise ValueError(f'no attention kernel {kernel!r}, expected one of {KERNELS}')
  n = q.shape[1]
  block = n if kernel == 'einsum' else min(block or _BLOCK, n)
  if _heads_first():
    return _causal_by_head(q, k, v, segments, by_distance, block)
  mixed = []
  for first in range(0, n, block):
    last = min(first + block, n)
    near = None
    if by_distance is not None:
      position, p = by_distance  # distances n - 1 .. -1, of which `last` occur, and -1
      near = position[:, first:last], p[n - last:]
    mixed.append(_by_logits(q[:, first:last], k[:, :last], v[:, :last],
                            _causal_mask(segments, first, last), near))
  return jnp.concatenate(mixed, axis=1) if len(mixed) > 1 else mixed[0]


def _causal_by_head(q: Array, k: Array, v: Array, segments: Array, by_distance: ByDistance,
                    block: int) -> Array:
  """The same: all is turned to heads before rows once, and then cut."""
  n, by_head = q.shape[1], lambda x: jnp.moveaxis(x, 2, 1)
  # The gradient of a split is a concatenation; that of slices would be a sum of padded ones.
  cut = lambda x: jnp.split(x, list(range(block, n, block)), axis=2)
  k, v = by_head(k), by_head(v)
  positions = None
  if by_distance is not None:
    position, p = by_distance
    positions, p = cut(position.transpose(2, 0, 1, 3)), p.swapaxes(0, 1)
  mixed = []
  for number, rows in enumerate(cut(by_head(q))):
    first = number * block
    last, by_key = first + rows.shape[2], None
    if positions is not None:
      # Distances n - 1 .. -1, of which `last` occur, and -1.
      of_distance = jnp.einsum('hbqc,htc->hbqt', positions[number], p[:, n - last:],
                               preferred_element_type=jnp.float32)
      by_key = jnp.moveaxis(skew(of_distance, last), 1, 0)
    mask = _causal_mask(segments, first, last)[:, None]
    mixed.append(_attend(rows, k[:, :, :last], v[:, :, :last], mask, by_key))
  return jnp.moveaxis(jnp.concatenate(mixed, axis=2), 1, 2)


def cached(q: Array, keys: Array, values: Array, mask: Array, by_key: Array | None) -> Array:
  """Attention to keys and values that lie ready; they are not repeated for the heads.

  Args:
    q: [b, q, h, c], scaled.
    keys, values: [b, kv heads, s, c]: as products want them, for they are read at every token.
    mask: bool [b, q, s], who may read which.
    by_key: float32 [b, h, q, s], logits to add, or None.

  Returns:
    [b, q, h, c]; 0 in rows without True in the mask.
  """
  b, rows, heads, width = q.shape
  groups = keys.shape[1]
  grouped = q.reshape(b, rows, groups, heads // groups, width)
  # Keys come first and values last: otherwise XLA for CPUs transposes them at every call.
  logits = jax.lax.dot_general(keys, grouped, (((3,), (4,)), ((0, 1), (0, 2))),
                               preferred_element_type=jnp.float32)  # [b, g, s, q, j]
  logits = jnp.moveaxis(logits, 2, -1).swapaxes(2, 3)  # [b, g, j, q, s]
  if by_key is not None:
    logits += by_key.reshape(logits.shape)
  weights = masked_softmax(logits, mask[:, None, None]).astype(q.dtype)
  # [b, g, j, q, s] x [b, g, s, c]
  mixed = jax.lax.dot_general(weights, values, (((4,), (2,)), ((0, 1), (0, 1))))
  return jnp.moveaxis(mixed, 3, 1).reshape(q.shape)


def logits_by_key(position: Array, p: Array, index: Array) -> Array:
  """Logits of relative positions where queries and keys lie anywhere: float32 [b, h, q, s].

  Args:
    position: [b, q, h, c], scaled queries.
    p: [h, distances, c].
    index: int32 [b, q, s], of each pair's distance in `p`.
  """
  of_distance = jax.lax.dot_general(p, position, (((2,), (3,)), ((0,), (2,))),
                                    preferred_element_type=jnp.float32)  # [h, t, b, q]
  of_distance = jnp.moveaxis(of_distance, (2, 0), (0, 1)).swapaxes(2, 3)  # [b, h, q, t]
  return jnp.take_along_axis(of_distance, index[:, None], axis=-1)


def masked_softmax(logits: Array, mask: Array) -> Array:
  """Softmax over the last axis where `mask` is True; 0 elsewhere and in rows with no True."""
  weights = jax.nn.softmax(jnp.where(mask, logits, MASKED_LOGIT), axis=-1)
  return jnp.where(mask, weights, 0.0)


def _causal_mask(segments: Array, first: int, last: int) -> Array:
  """bool [b, last - first, last] for rows first..last - 1."""
  order = np.arange(last)[None, :] <= np.arange(first, last)[:, None]
  return order & (segments[:, first:last, None] == segments[:, None, :last])


def _dot_product(q: Array, k: Array, v: Array, segments: Array) -> Array:
  """JAX's own attention: cuDNN's fused kernel where it takes the heads, else all n x n logits."""
  implementation = 'cudnn' if _cudnn_takes(q, k) else 'xla'

  def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=same, scale=1.0, is_causal=True,
                                        implementation=implementation)

  return on_each_device(local, 'bnhc', 'bnhc', 'bnhc', 'bn', out='bnhc')(q, k, v, segments)


def _cudnn_takes(q: Array, k: Array) -> bool:
  """Whether cuDNN is there and its attention knows such heads, with a mask and a gradient."""
  return (has_cudnn() and q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
          and q.shape[-3] % 2 == 0 and k.shape[-3] % 2 == 0)


def _by_cudnn(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """`masked` without positions by logits. Rows that ask the same keys become rows of one matrix."""
  shared = _shared_axes(q, k)
  lead = q.shape[:q.ndim - 3 - shared]
  mask = jnp.broadcast_to(mask, (*q.shape[:-2], k.shape[-3]))
  # A row that may read nothing reads everything and is thrown away: cuDNN would make NaN of it.
  reads = mask.any(axis=-1)
  mask |= ~reads[..., None]
  k, v = (jnp.broadcast_to(x.reshape(*x.shape[:x.ndim - 3 - shared], *x.shape[-3:]),
                           (*lead, *x.shape[-3:])) for x in (k, v))

  def local(q: Array, k: Array, v: Array, mask: Array) -> Array:
    keys, heads, width = k.shape[-3:]
    groups = math.prod(k.shape[:-3])
    by_group = lambda x: x.reshape(groups, -1, heads, width)
    mixed = jax.nn.dot_product_attention(
        by_group(q), by_group(k), by_group(v), mask=mask.reshape(groups, 1, -1, keys), scale=1.0,
        implementation='cudnn')
    return mixed.reshape(q.shape)

  axes = lambda x, last: 'b' + 'x' * (x.ndim - 1 - len(last)) + last
  of_q, of_k = axes(q, 'hc'), axes(k, 'hc')
  mixed = on_each_device(local, of_q, of_k, of_k, axes(mask, ''), out=of_q)(q, k, v, mask)
  return jnp.where(reads[..., None, None], mixed, 0)


def _splash(q: Array, k: Array, v: Array, segments: Array, block: int) -> Array:
  """JAX's splash attention (Pallas); interpreted, slowly, where there is no TPU."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
  n, interpret = q.shape[1], platform() == 'cpu'

  def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
    heads = q.shape[2]
    mask = masks.MultiHeadMask([masks.CausalMask((n, n))] * heads)
    attend = kernel.make_splash_mha(
        mask, head_shards=1, q_seq_shards=1, block_sizes=_splash_blocks(n, block),
        residual_checkpoint_name='mixed', interpret=interpret)
    by_head = lambda x: jnp.moveaxis(x, 2, 1)
    mixed = jax.vmap(attend)(by_head(q), by_head(k), by_head(v),
                             kernel.SegmentIds(segments, segments))
    return jnp.moveaxis(mixed, 1, 2)

  return on_each_device(local, 'bnhc', 'bnhc', 'bnhc', 'bn', out='bnhc')(q, k, v, segments)


@functools.cache
def _splash_blocks(n: int, block: int):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  size = min(block or 1024, n)
  return kernel.BlockSizes(
      block_q=size, block_kv=size, block_kv_compute=min(size, 512), block_q_dkv=size,
      block_kv_dkv=size, block_kv_dkv_compute=min(size, 512), use_fused_bwd_kernel=True)


def _flash_relative(q: Array, k: Array, v: Array, segments: Array, by_distance: ByDistance,
                    block: int) -> Array:
  """Our kernel for relative positions (Pallas); interpreted, slowly, on a CPU."""
  from retro_jax.models import flash_relative
  n, interpret = q.shape[1], platform() == 'cpu'
  rows = min(block or flash_relative.ROWS, n)
  if device_kind() in flash_relative.UNABLE:
    raise UserError(f"attention_kernel = 'flash_relative' needs TPU v5 or newer, got "
                    f"{device_kind()}; set RetroConfig.attention_kernel = 'blocked'")
  position, p = by_distance

  def local(q: Array, position: Array, k: Array, v: Array, p: Array, segments: Array) -> Array:
    by_head = lambda x: jnp.moveaxis(x, 2, 1)
    mixed = flash_relative.attend(by_head(q), by_head(position), by_head(k), by_head(v),
                                  p.swapaxes(0, 1), segments, rows, interpret)
    return jnp.moveaxis(mixed, 1, 2)

  # Distance -1, the last, is there for `skew` alone.
  return on_each_device(local, 'bnhc', 'bnhc', 'bnhc', 'bnhc', 'thc', 'bn', out='bnhc')(
      q, position, k, v, p[:n], segments)
