"""The small parts every block is made of: parameters with named axes, RMSNorm, FFW, embeddings.

Attention lives in attention.py. Each parameter carries `axes`, the logical names of
its dimensions; training/partitioning.py maps those names to mesh axes.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.models.placement import place

Array = jax.Array
EPSILON = 1e-6


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...],
              fan_in: int | None = None, scale: float = 1.0) -> nnx.Param:
  """A float32 parameter with logical `axes`, one a dimension.

  Args:
    rngs: source of the initial values.
    shape: of the array.
    axes: names of the dimensions.
    fan_in: inputs to each output; the values are normal with deviation
      scale / sqrt(fan_in). None gives zeros.
    scale: see `fan_in`.
  """
  assert len(shape) == len(axes), (shape, axes)
  if fan_in is None:
    value = jnp.zeros(shape, jnp.float32)
  else:
    value = jax.random.normal(rngs.params(), shape, jnp.float32) * (scale * fan_in ** -0.5)
  return nnx.Param(value, axes=axes)


class RMSNorm(nnx.Module):
  """x / rms(x) * scale, computed in float32 (Zhang & Sennrich 2019)."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    del rngs
    self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=('norm',))

  def __call__(self, x: Array) -> Array:
    """x [..., width] -> the same shape and dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + EPSILON)
    return (y * self.scale[...]).astype(x.dtype)


class FeedForward(nnx.Module):
  """FFW of equation 2: residual, pre-norm, two matrices, tanh-GELU in between."""

  def __init__(self, width: int, d_ff: int, *, output_scale: float, rngs: nnx.Rngs):
    self.norm = RMSNorm(width, rngs=rngs)
    self.wi = parameter(rngs, (width, d_ff), ('embed', 'mlp'), fan_in=width)
    self.wo = parameter(rngs, (d_ff, width), ('mlp', 'embed'), fan_in=d_ff, scale=output_scale)

  def __call__(self, x: Array) -> Array:
    """x [..., width] -> x + FFW(norm(x))."""
    y = jnp.einsum('...d,df->...f', self.norm(x), self.wi[...].astype(x.dtype))
    y = jax.nn.gelu(place(y, 'mlp'), approximate=True)
    return x + jnp.einsum('...f,fd->...d', y, self.wo[...].astype(x.dtype))


class Embedding(nnx.Module):
  """A table of token vectors; also READ, since input and output tables are tied.

  Values have deviation 1/sqrt(width): inputs are scaled up by sqrt(width) to unit
  variance, and logits of a normalised activation start with unit variance.
  """

  def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
    self.width = width
    self.table = parameter(rngs, (vocab_size, width), ('vocab', 'embed'), fan_in=width)

  def __call__(self, tokens: Array, dtype) -> Array:
    """tokens [...] int32 -> [..., width] of `dtype`."""
    return self.table[...].astype(dtype)[tokens] * jnp.asarray(self.width ** 0.5, dtype)

  def read(self, x: Array) -> Array:
    """x [..., width] -> float32 logits [..., vocab_size]."""
    return jnp.einsum('...d,vd->...v', x, self.table[...].astype(x.dtype),
                      preferred_element_type=jnp.float32)
