"""Multi-head attention with Transformer-XL relative positions (paper B.1.2; Dai et al. 2019).

One module serves decoder self-attention, encoder self-attention, encoder
cross-attention and, through chunked_cross_attention.py, CCA. They differ in who asks
whom, in the mask, and in the distance at which query row i sees key column j:
`i - j + offset`. Norms and residuals belong to the blocks, not to this file.

  logit(i, j) = [(q_i + content_bias) . k_j + (q_i + position_bias) . R sinusoid(d_ij)] / sqrt(c)
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.models.layers import parameter

Array = jax.Array
# Far below any real logit, yet finite: a row with every key masked stays free of NaN.
MASKED_LOGIT = -1e30


class RelativeAttention(nnx.Module):
  """Attention of `query_dim`-wide rows to `context_dim`-wide rows."""

  def __init__(self, query_dim: int, context_dim: int, num_heads: int, head_dim: int, *,
               output_scale: float, rngs: nnx.Rngs):
    self.query_dim = query_dim
    heads, kernel = (num_heads, head_dim), ('embed', 'heads', 'head_dim')
    self.query = parameter(rngs, (query_dim, *heads), kernel, fan_in=query_dim)
    self.key = parameter(rngs, (context_dim, *heads), kernel, fan_in=context_dim)
    self.value = parameter(rngs, (context_dim, *heads), kernel, fan_in=context_dim)
    self.relative = parameter(rngs, (query_dim, *heads), kernel, fan_in=query_dim)
    self.output = parameter(rngs, (*heads, query_dim), ('heads', 'head_dim', 'embed'),
                            fan_in=num_heads * head_dim, scale=output_scale)
    self.content_bias = parameter(rngs, heads, ('heads', 'head_dim'))
    self.position_bias = parameter(rngs, heads, ('heads', 'head_dim'))

  def __call__(self, x: Array, context: Array, mask: Array, *, offset: int = 0,
               causal: bool = False, key_groups: int = 1) -> Array:
    """Attends from x to context.

    Args:
      x: queries, [..., q, query_dim].
      context: [..., s, context_dim], leading dimensions broadcast against x's.
      mask: bool, broadcastable to [..., q, s]; a query with no True gets exactly 0.
      offset: query row i sees column j of a group at distance i - j + offset.
      causal: the mask hides every negative distance, so none is computed.
      key_groups: the s keys are this many groups of s / key_groups with equal
        distances (the k neighbours in CCA).

    Returns:
      [..., q, query_dim], dtype of x.
    """
    dtype = x.dtype
    rows, columns = x.shape[-2], context.shape[-2] // key_groups
    project = lambda y, kernel: jnp.einsum('...d,dhc->...hc', y, kernel[...].astype(dtype))
    q = project(x, self.query)  # [..., q, h, c]
    k = project(context, self.key)  # [..., s, h, c]
    v = project(context, self.value)
    positions = sinusoid(distances(rows, columns, offset, causal), self.query_dim)
    p = project(jnp.asarray(positions, dtype), self.relative)  # [distances, h, c]

    scale = q.shape[-1] ** -0.5
    with_content = (q + self.content_bias[...].astype(dtype)) * scale
    with_position = (q + self.position_bias[...].astype(dtype)) * scale
    logits = jnp.einsum('...qhc,...shc->...hqs', with_content, k,
                        preferred_element_type=jnp.float32)
    by_distance = jnp.einsum('...qhc,dhc->...hqd', with_position, p,
                             preferred_element_type=jnp.float32)
    by_position = skew(by_distance, columns)  # [..., h, q, columns]
    if key_groups > 1:
      by_position = jnp.tile(by_position, key_groups)
    weights = masked_softmax(logits + by_position, mask[..., None, :, :])
    mixed = jnp.einsum('...hqs,...shc->...qhc', weights.astype(dtype), v)
    return jnp.einsum('...qhc,hcd->...qd', mixed, self.output[...].astype(dtype))


def masked_softmax(logits: Array, mask: Array) -> Array:
  """Softmax over the last axis where `mask` is True; 0 elsewhere and in rows with no True."""
  weights = jax.nn.softmax(jnp.where(mask, logits, MASKED_LOGIT), axis=-1)
  return jnp.where(mask, weights, 0.0)


def distances(rows: int, columns: int, offset: int, causal: bool) -> np.ndarray:
  """The distances i - j + offset that occur, in falling order, as `skew` expects them."""
  largest = rows - 1 + offset
  smallest = offset if causal else offset - (columns - 1)
  return np.arange(largest, smallest - 1, -1)


def sinusoid(distance: np.ndarray, width: int) -> np.ndarray:
  """[len(distance), width] float32: sines then cosines of distance / 10000^(2i/width)."""
  frequency = 10_000.0 ** (-np.arange(0, width, 2) / width)
  angle = distance[:, None] * frequency[None, :]
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)


def skew(by_distance: Array, columns: int) -> Array:
  """Turns logits by distance into logits by key, without a gather.

  Column t of the input is the t-th distance of `distances`; row i needs, for key j,
  t = (rows - 1) - i + j. With one column of padding the rows of the flattened array
  line up so that this is one slice and one reshape (Dai et al. 2019, appendix B).

  Args:
    by_distance: [..., rows, number of distances].
    columns: number of keys.

  Returns:
    [..., rows, columns]. When only the non-negative distances of a causal attention
    were given, entries above the diagonal are meaningless and must be masked.
  """
  *lead, rows, width = by_distance.shape
  flat = jnp.pad(by_distance, [(0, 0)] * (len(lead) + 1) + [(0, 1)])
  flat = flat.reshape(*lead, rows * (width + 1))
  flat = jax.lax.slice_in_dim(flat, rows - 1, rows - 1 + rows * width, axis=-1)
  return flat.reshape(*lead, rows, width)[..., :columns]
