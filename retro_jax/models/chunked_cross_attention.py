"""Chunked cross-attention: CCA of the paper's equations 3, 4 and 6 and Listing 1.

Position p (1-indexed) reads E_{floor(p/m)}, the encoded neighbours of the last chunk
that is completely known there; positions p < m read nothing. The encoder that makes E
is in encoder.py.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.models.attention import Attention
from retro_jax.models.config import RetroConfig
from retro_jax.models.layers import RMSNorm

Array = jax.Array


class ChunkedCrossAttention(nnx.Module):
  """h + CCA(norm(h), E); exactly h where no neighbour may be read."""

  def __init__(self, config: RetroConfig, *, output_scale: float, rngs: nnx.Rngs):
    self.chunk_length = config.chunk_length
    self.norm = RMSNorm(config.d_model, rngs=rngs)
    self.attention = Attention(
        config.d_model, config.encoder_d_model, config.num_heads, config.head_dim,
        positions=config.positions_of_cca, output_scale=output_scale, rngs=rngs)

  def __call__(self, h: Array, encoded: Array, mask: Array) -> Array:
    """Applies CCA.

    Args:
      h: decoder activations, [b, n, d].
      encoded: E, [b, l, k, r, d'] with l = n / m.
      mask: bool [b, l, m, k, r], from `attending_mask`.

    Returns:
      [b, n, d].
    """
    m = self.chunk_length
    b, n, d = h.shape
    _, l, k, r, d_encoder = encoded.shape
    attending = _to_attending_chunks(self.norm(h), m)  # [b, l, m, d]
    # One softmax over all k r keys; each neighbour has the same m x r distances (eq. 6).
    read = self.attention(attending, encoded.reshape(b, l, k * r, d_encoder),
                          mask.reshape(b, l, m, k * r), offset=m - 1, key_groups=k)
    # Back to sequence order: zeros for the m-1 first positions, which read nothing.
    read = jnp.pad(read.reshape(b, n, d), ((0, 0), (m - 1, 0), (0, 0)))[:, :n]
    return h + read


def _to_attending_chunks(x: Array, m: int) -> Array:
  """[b, n, ...] -> [b, l, m, ...]: chunk u holds positions um .. um+m-1 (1-indexed).

  That is the last token of C_u and the first m-1 of C_{u+1}. The last attending
  chunk has one real position; zeros (False) stand for the others.
  """
  b, n = x.shape[:2]
  shifted = jnp.pad(x[:, m - 1:], ((0, 0), (0, m - 1)) + ((0, 0),) * (x.ndim - 2))
  return shifted.reshape(b, n // m, m, *x.shape[2:])


def attending_mask(segments: Array, neighbor_mask: Array, m: int) -> Array:
  """Which retrieved tokens each attending position may read.

  Args:
    segments: int32 [b, n], equal for tokens of one document, 0 for padding.
    neighbor_mask: bool [b, l, k, r], False for padding and missing neighbours.
    m: chunk length.

  Returns:
    bool [b, l, m, k, r]: a chunk's neighbours serve the next chunk only inside the
    document they were retrieved for.
  """
  # A chunk holds one document; padding comes after its tokens, or before those of a prompt.
  owner = segments.reshape(len(segments), -1, m).max(-1)
  asking = _to_attending_chunks(segments, m)  # [b, l, m]
  allowed = (asking == owner[..., None]) & (owner[..., None] != 0)
  return allowed[..., None, None] & neighbor_mask[:, :, None]
