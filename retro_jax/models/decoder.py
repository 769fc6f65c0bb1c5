"""The decoder: RETRO and LM layers of equation 2 in the pattern P, scanned where it repeats.

Algorithm 1 asks for the neighbours to be encoded inside layer min(P), after its
self-attention; the decoder is handed a function for that and keeps the result for every
later CCA. Embeddings and READ are in retro.py.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from retro_jax.models.attention import Attention
from retro_jax.models.chunked_cross_attention import ChunkedCrossAttention
from retro_jax.models.config import RetroConfig, layer_plan
from retro_jax.models.layers import NORMS, FeedForward
from retro_jax.models.placement import place, place_parameters
from retro_jax.models.recomputation import recomputed

Array = jax.Array
# E and the mask of who may read it, or None with retrieval off.
Encoded = tuple[Array, Array] | None


class SelfAttention(nnx.Module):
  """ATTN: causal, residual, pre-norm, inside one document."""

  def __init__(self, config: RetroConfig, *, output_scale: float, rngs: nnx.Rngs):
    self.norm = _norm(config, rngs)
    self.attention = Attention(
        config.d_model, config.d_model, config.num_heads, config.head_dim,
        positions=config.positions, output_scale=output_scale, rngs=rngs,
        num_kv_heads=config.num_kv_heads, qkv_bias=config.qkv_bias,
        output_bias=config.output_bias, rotary_base=config.rotary_base,
        rotary_scaling=config.rotary_scaling)
    self.kernel, self.block = config.attention_kernel, config.attention_block

  def __call__(self, h: Array, segments: Array) -> Array:
    """h [b, n, d], segments int32 [b, n] -> [b, n, d]."""
    return h + self.attention.causal(self.norm(h), segments, self.kernel, self.block)


class DecoderLayer(nnx.Module):
  """LM(H) = FFW(ATTN(H)), or with `retro` RETRO(H, E) = FFW(CCA(ATTN(H), E))."""

  def __init__(self, config: RetroConfig, *, retro: bool, rngs: nnx.Rngs):
    scale = (2 * config.num_layers) ** -0.5
    self.attention = SelfAttention(config, output_scale=scale, rngs=rngs)
    self.cca = ChunkedCrossAttention(config, output_scale=scale, rngs=rngs) if retro else None
    self.feed_forward = FeedForward(
        config.d_model, config.d_ff, output_scale=scale, rngs=rngs, activation=config.activation,
        gated=config.gated, bias=config.ffw_bias, norm=config.norm, epsilon=config.norm_epsilon)

  def __call__(self, h: Array, segments: Array, encoded: Encoded) -> Array:
    h = self.attention(h, segments)
    if self.cca is not None and encoded is not None:
      h = self.cca(h, *encoded)
    return self.feed_forward(h)


class Period(nnx.Module):
  """Some LM layers and the RETRO layer that ends them: the unit the stack repeats."""

  def __init__(self, config: RetroConfig, *, lm_layers: int, rngs: nnx.Rngs):
    self.lm = nnx.List([DecoderLayer(config, retro=False, rngs=rngs) for _ in range(lm_layers)])
    self.retro = DecoderLayer(config, retro=True, rngs=rngs)
    self.remat, self.scanned = config.remat, config.scan_layers

  def __call__(self, h: Array, segments: Array, encoded: Encoded) -> Array:
    for layer in self.lm:
      h = place(recomputed(layer, self.remat, self.scanned)(h, segments, None))
    return place(recomputed(self.retro, self.remat, self.scanned)(h, segments, encoded))


class Decoder(nnx.Module):
  """Layers 1..L in groups: prefix (LM), entry (RETRO, min(P)), periods, tail (LM)."""

  def __init__(self, config: RetroConfig, *, rngs: nnx.Rngs):
    self.remat, self.scanned = config.remat, config.scan_layers
    plan = layer_plan(config)
    lm = lambda rngs: DecoderLayer(config, retro=False, rngs=rngs)
    self.prefix = _stack(lm, plan.prefix, rngs)
    self.entry = DecoderLayer(config, retro=True, rngs=rngs) if plan.has_entry else None
    self.periods = nnx.List([
        _stack(lambda rngs, lm_layers=lm_layers: Period(config, lm_layers=lm_layers, rngs=rngs),
               repeats, rngs)
        for lm_layers, repeats in plan.periods])
    self.tail = _stack(lm, plan.tail, rngs)
    self.norm = _norm(config, rngs)

  def __call__(self, h: Array, segments: Array, encode: Callable[[Array], Encoded]) -> Array:
    """Runs the stack.

    Args:
      h: embedded tokens, [b, n, d].
      segments: int32 [b, n], equal for tokens of one document, 0 for padding.
      encode: called once with H after the self-attention of layer min(P); returns E
        and its mask, or None for retrieval off. Never called in a baseline.

    Returns:
      Normalised activations [b, n, d].
    """
    encoded: Encoded = None
    h = self._scan(self.prefix, h, segments, None)
    if self.entry is not None:
      part = lambda module: recomputed(module, self.remat)
      h = place(part(self.entry.attention)(h, segments))
      encoded = encode(h)
      if encoded is not None:
        h = place(part(self.entry.cca)(h, *encoded))
      h = place(part(self.entry.feed_forward)(h))
    for period in self.periods:
      h = self._scan(period, h, segments, encoded)
    h = self._scan(self.tail, h, segments, None)
    return self.norm(h)

  def _scan(self, stack: nnx.Module | None, h: Array, segments: Array, encoded: Encoded) -> Array:
    """Applies a stack of equal modules, one after the other; compiled once if scanned."""
    if stack is None:
      return h
    structure, parameters = nnx.split(stack)

    def body(h: Array, layer: Any) -> tuple[Array, None]:
      module = nnx.merge(structure, place_parameters(layer))
      run = module if isinstance(module, Period) else recomputed(module, self.remat, self.scanned)
      return place(run(h, segments, encoded)), None

    return jax.lax.scan(body, h, parameters, unroll=1 if self.scanned else True)[0]


def _norm(config: RetroConfig, rngs: nnx.Rngs) -> nnx.Module:
  """A norm of the decoder's own."""
  return NORMS[config.norm](config.d_model, epsilon=config.norm_epsilon, rngs=rngs)


def _stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs):
  """`count` modules in one whose parameters have a leading axis of that size; None for 0."""
  if count == 0:
    return None

  @nnx.split_rngs(splits=count)
  @nnx.vmap(in_axes=(0,), out_axes=0)
  def build(rngs):
    return make(rngs)

  return build(rngs)
