"""Multi-head attention of every kind in the model: projections, positions, who calls which kernel.

One module serves decoder self-attention, encoder self-attention, encoder cross-attention
and, through chunked_cross_attention.py, CCA. They differ in who asks whom, in the mask, and
in the distance at which query row i sees key column j: `i - j + offset`. Norms and residuals
belong to the blocks, not to this file; softmax and kernels are in attention_kernels.py.

Relative positions (the paper's B.1.2; Dai et al. 2019) give the logits

  logit(i, j) = [(q_i + content_bias) . k_j + (q_i + position_bias) . R sinusoid(d_ij)] / sqrt(c)

and rotary ones q'_i . k'_j / sqrt(c), with q' and k' rotated by their positions. Learned positions
are in the embeddings and not seen here. Keys and values may have fewer heads than queries
(Ainslie et al. 2023); they are repeated for the kernels.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from retro_jax.models import attention_kernels
from retro_jax.models.for_cpus import repeated
from retro_jax.models.layers import parameter, product
from retro_jax.models.placement import on_one_cpu, place
from retro_jax.models.positions import distances, rotate, rotation, sinusoid, turned

Array = jax.Array


class Attention(nnx.Module):
  """Attention of `query_dim`-wide rows to `context_dim`-wide rows."""

  def __init__(self, query_dim: int, context_dim: int, num_heads: int, head_dim: int, *,
               positions: str = 'relative', output_scale: float, rngs: nnx.Rngs,
               num_kv_heads: int = 0, qkv_bias: bool = False, output_bias: bool = False,
               rotary_base: float = 10_000.0, rotary_scaling: Sequence[float] = ()):
    """Puts the parameters together.

    Args:
      query_dim, context_dim: widths of the rows that ask and that are read.
      num_heads, head_dim: of the queries.
      positions: 'relative', 'rotary', or 'none' ('learned': they are in what is read).
      output_scale: of the output's initial values.
      rngs: of the initial values.
      num_kv_heads: of keys and values, 0 for `num_heads`.
      qkv_bias, output_bias: whether those projections have one.
      rotary_base, rotary_scaling: of rotary positions (positions.rotate).
    """
    self.query_dim, self.positions = query_dim, positions
    self.relative_positions = positions == 'relative'
    self.rotary = (rotary_base, tuple(rotary_scaling))
    self.has_qkv_bias, self.has_output_bias = qkv_bias, output_bias
    heads, kernel = (num_heads, head_dim), ('embed', 'heads', 'head_dim')
    kv_heads, self.kv_axis = (num_kv_heads or num_heads, head_dim), 'heads'
    if kv_heads != heads:
      self.kv_axis = 'kv_heads'
    self.repeats = num_heads // kv_heads[0]
    kv_kernel = ('embed', self.kv_axis, 'head_dim')
    self.query = parameter(rngs, (query_dim, *heads), kernel, fan_in=query_dim)
    self.key = parameter(rngs, (context_dim, *kv_heads), kv_kernel, fan_in=context_dim)
    self.value = parameter(rngs, (context_dim, *kv_heads), kv_kernel, fan_in=context_dim)
    if self.relative_positions:
      self.relative = parameter(rngs, (query_dim, *heads), kernel, fan_in=query_dim)
    self.output = parameter(rngs, (*heads, query_dim), ('heads', 'head_dim', 'embed'),
                            fan_in=num_heads * head_dim, scale=output_scale)
    if self.relative_positions:
      self.content_bias = parameter(rngs, heads, ('heads', 'head_dim'))
      self.position_bias = parameter(rngs, heads, ('heads', 'head_dim'))
    if qkv_bias:
      self.query_bias = parameter(rngs, heads, kernel[1:])
      self.key_bias = parameter(rngs, kv_heads, kv_kernel[1:])
      self.value_bias = parameter(rngs, kv_heads, kv_kernel[1:])
    if output_bias:
      self.output_bias = parameter(rngs, (query_dim,), ('norm',))

  def __call__(self, x: Array, context: Array, mask: Array, *, offset: int = 0,
               key_groups: int = 1) -> Array:
    """Attends from x to context.

    Args:
      x: queries, [..., q, query_dim].
      context: [..., s, context_dim], leading dimensions broadcast against x's.
      mask: bool, broadcastable to [..., q, s]; a query with no True gets exactly 0.
      offset: query row i sees column j of a group at distance i - j + offset.
      key_groups: the s keys are this many groups of s / key_groups with equal
        distances (the k neighbours in CCA).

    Returns:
      [..., q, query_dim], dtype of x.
    """
    q, k, v = self._project(x, context)
    q, k, by_distance = self._with_positions(q, k, offset, key_groups)
    k, v = self._repeated(k), self._repeated(v)
    mixed = attention_kernels.masked(q, k, v, mask, by_distance, key_groups)
    return self._read_out(mixed)

  def causal(self, x: Array, segments: Array, kernel: str, block: int = 0) -> Array:
    """Attention of a sequence to itself: each row to its own document, up to itself.

    Args:
      x: [b, n, query_dim].
      segments: int32 [b, n], equal for tokens of one document. Rows of 0 (padding) give
        values that mean nothing.
      kernel: 'einsum', 'blocked'; if positions are relative 'flash_relative', else 'splash' or
        'dot_product'; all compute the same (attention_kernels.py).
      block: rows at a time in all but 'einsum' and 'dot_product'; 0 for the kernel's choice.
    """
    q, k, v = self._project(x, x)
    q, k, by_distance = self._with_positions(q, k, causal=True)
    k, v = self._repeated(k), self._repeated(v)
    mixed = attention_kernels.causal(q, k, v, segments, by_distance, kernel, block)
    return self._read_out(mixed)

  def distance_keys(self, distance: np.ndarray, dtype) -> Array:
    """R sinusoid(distance) of relative positions: [distances, h, c]."""
    vectors = jnp.asarray(sinusoid(distance, self.query_dim), dtype)
    return jnp.einsum('td,dhc->thc', vectors, self.relative[...].astype(dtype))

  def keys_and_values(self, context: Array, places: Array, limit: int) -> tuple[Array, Array]:
    """What `read` reads of rows at `places` [..., s] < limit: each [..., kv heads, s, c]."""
    keys = self._heads(context, 'key')
    if self.positions == 'rotary':
      keys = self._turned(keys, places, 0, limit)
    return keys.swapaxes(-3, -2), self._heads(context, 'value').swapaxes(-3, -2)

  def read(self, x: Array, places: Array, keys: Array, values: Array, mask: Array,
           key_places: Array, of_distance: Array | None, offset: int, limit: int) -> Array:
    """Attends to keys and values made before, by `keys_and_values`: the cached form.

    Args:
      x: [b, q, query_dim].
      places: int32 [b, q], of the queries; query i sees key j at distance i - j + offset.
      keys, values: [b, kv heads, s, c].
      mask: bool [b, q, s], who may read which.
      key_places: int32 [b, s] or [1, s], for relative positions.
      of_distance: with relative positions `distance_keys` of limit - 1 + offset and down, as far
        as distances can occur, heads first: [h, distances, c].
      offset: see `places`.
      limit: places are less than that.

    Returns:
      [b, q, query_dim]; 0 where all is masked.
    """
    q = self._heads(x, 'query')
    scale, by_key = q.shape[-1] ** -0.5, None
    if self.relative_positions:
      q, position = self._biased(q, scale)
      index = limit - 1 - places[:, :, None] + key_places[:, None, :]
      index = jnp.clip(index, 0, of_distance.shape[1] - 1)
      by_key = attention_kernels.logits_by_key(position, of_distance, index)
    else:
      if self.positions == 'rotary':
        q = self._turned(q, places, offset, limit)
      q = q * jnp.asarray(scale, q.dtype)
    return self._read_out(attention_kernels.cached(q, keys, values, mask, by_key))

  def _turned(self, x: Array, places: Array, offset: int, limit: int) -> Array:
    """Rotary positions of rows at places + offset."""
    table = rotation(offset + np.arange(limit), x.shape[-1], *self.rotary)
    return turned(x, *(part[places] for part in table))

  def _project(self, x: Array, context: Array) -> tuple[Array, Array, Array]:
    """Queries [..., q, h, c], keys and values [..., s, kv heads, c]."""
    if x is context:
      return self._together(x, 'query', 'key', 'value')
    return self._heads(x, 'query'), self._heads(context, 'key'), self._heads(context, 'value')

  def _together(self, y: Array, *names: str) -> tuple[Array, ...]:
    """Several projections of the same rows; on a CPU as one product, which is faster there.

    (Not of keys and values alone: to cut the product of two costs more than it saves.)
    """
    if not on_one_cpu():
      return tuple(self._heads(y, name) for name in names)
    kernels = [getattr(self, name)[...] for name in names]
    flat = [kernel.reshape(len(kernel), -1) for kernel in kernels]
    ends = np.cumsum([kernel.shape[1] for kernel in flat])[:-1]
    parts = jnp.split(product(y, jnp.concatenate(flat, axis=1)), ends, axis=-1)
    return tuple(self._named(part.reshape(*y.shape[:-1], *kernel.shape[1:]), name)
                 for part, kernel, name in zip(parts, kernels, names))

  def _heads(self, y: Array, name: str) -> Array:
    """One of the three projections."""
    return self._named(product(y, getattr(self, name)[...]), name)

  def _named(self, projected: Array, name: str) -> Array:
    """A projection with its bias, where it belongs and under its name."""
    if self.has_qkv_bias:
      projected += getattr(self, f'{name}_bias')[...].astype(projected.dtype)
    axis = 'heads' if name == 'query' else self.kv_axis
    return checkpoint_name(place(projected, axis, -2), name)

  def _repeated(self, x: Array) -> Array:
    """Keys or values [..., s, kv heads, c], each head for the queries that share it."""
    return place(jnp.repeat(x, self.repeats, axis=-2), 'heads', -2) if self.repeats > 1 else x

  def _with_positions(self, q: Array, k: Array, offset: int = 0, key_groups: int = 1,
                      causal: bool = False
                      ) -> tuple[Array, Array, attention_kernels.ByDistance]:
    """What the kernels take: scaled queries, keys, and how distance enters if by logits."""
    rows, columns, dtype = q.shape[-3], k.shape[-3] // key_groups, q.dtype
    scale = q.shape[-1] ** -0.5
    if self.positions in ('learned', 'none'):
      return q * jnp.asarray(scale, dtype), k, None
    if not self.relative_positions:
      by_group = k.reshape(*k.shape[:-3], key_groups, columns, *k.shape[-2:])
      return (rotate(q, offset, *self.rotary) * jnp.asarray(scale, dtype),
              rotate(by_group, 0, *self.rotary).reshape(k.shape), None)
    content, position = self._biased(q, scale)
    p = self.distance_keys(distances(rows, columns, offset, causal), dtype)
    return content, k, (position, p)

  def _biased(self, q: Array, scale: float) -> tuple[Array, Array]:
    """Queries for keys and for distances."""
    plus = lambda bias: (q + repeated(bias[...].astype(q.dtype), q.shape[:-2])) * scale
    return plus(self.content_bias), plus(self.position_bias)

  def _read_out(self, mixed: Array) -> Array:
    mixed = checkpoint_name(mixed, 'mixed')
    result = product(mixed, self.output[...], contracted=2)
    return result + self.output_bias[...].astype(result.dtype) if self.has_output_bias else result
