"""The neighbour encoder: Encoder(RET(C_u), H_u) of Algorithm 1.

Each neighbour is encoded on its own, bidirectionally, conditioned on the decoder's
activations of the chunk that retrieved it. Neighbours meet only inside CCA.
"""

import jax
from flax import nnx

from retro_jax.models.attention import Attention
from retro_jax.models.config import RetroConfig
from retro_jax.models.layers import FeedForward, RMSNorm
from retro_jax.models.placement import place
from retro_jax.models.recomputation import recomputed

Array = jax.Array


class NeighborEncoder(nnx.Module):
  """Layers of self-attention, cross-attention to H_u where p' is in P_enc, and FFW."""

  def __init__(self, config: RetroConfig, *, rngs: nnx.Rngs):
    self.remat = config.remat
    output_scale = (2 * config.encoder_layers) ** -0.5
    self.layers = nnx.List([
        EncoderLayer(config, conditioned=p in config.encoder_cross_attention_layers,
                     output_scale=output_scale, rngs=rngs)
        for p in range(1, config.encoder_layers + 1)])
    self.norm = RMSNorm(config.encoder_d_model, rngs=rngs)

  def __call__(self, embedded: Array, neighbor_mask: Array, h: Array, h_mask: Array) -> Array:
    """Encodes the neighbours of every chunk.

    Args:
      embedded: token vectors of the neighbours, [b, l, k, r, d'].
      neighbor_mask: bool [b, l, k, r].
      h: H split into chunks, [b, l, m, d].
      h_mask: bool [b, l, m], False for padding.

    Returns:
      E, [b, l, k, r, d'].
    """
    e = embedded
    for layer in self.layers:
      e = place(recomputed(layer, self.remat)(e, neighbor_mask, h, h_mask))
    return self.norm(e)


class EncoderLayer(nnx.Module):
  """ATTN_enc, CA_enc (if conditioned) and FFW_enc, all residual and pre-norm."""

  def __init__(self, config: RetroConfig, *, conditioned: bool, output_scale: float,
               rngs: nnx.Rngs):
    width = config.encoder_d_model
    heads = (config.encoder_heads, config.encoder_head_dim)
    positions = config.positions_of_retrieval
    self.norm = RMSNorm(width, rngs=rngs)
    self.attention = Attention(width, width, *heads, positions=positions,
                               output_scale=output_scale, rngs=rngs)
    self.conditioned = conditioned
    if conditioned:
      self.cross_norm = RMSNorm(width, rngs=rngs)
      self.context_norm = RMSNorm(config.d_model, rngs=rngs)
      self.cross_attention = Attention(width, config.d_model, *heads, positions=positions,
                                       output_scale=output_scale, rngs=rngs)
    self.feed_forward = FeedForward(width, config.encoder_d_ff, output_scale=output_scale,
                                    rngs=rngs)

  def __call__(self, e: Array, neighbor_mask: Array, h: Array, h_mask: Array) -> Array:
    normed = self.norm(e)
    e = e + self.attention(normed, normed, neighbor_mask[..., None, :])
    if self.conditioned:
      # d_enc(i', i) = i' - i (eq. 7); one H_u serves the chunk's k neighbours.
      context = self.context_norm(h)[:, :, None]  # [b, l, 1, m, d]
      e = e + self.cross_attention(self.cross_norm(e), context, h_mask[:, :, None, None, :])
    return self.feed_forward(e)
