"""The small parts every block is made of: parameters with named axes, norms, FFW, embeddings.

Attention lives in attention.py. Each parameter carries `axes`, the logical names of
its dimensions; training/partitioning.py maps those names to mesh axes.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.models import for_cpus
from retro_jax.models.for_cpus import repeated, row_sum, widened
from retro_jax.models.placement import on_one_cpu, on_one_device, place

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


def product(x: Array, kernel: Array, contracted: int = 1) -> Array:
  """x [..., *in] times kernel [*in, *out]: [..., *out], dtype of x.

  Args:
    x: activations.
    kernel: of any dtype.
    contracted: how many axes `in` has.
  """
  kernel = kernel.astype(x.dtype)
  if not on_one_device():  # an axis that is cut over devices is best left alone
    return jnp.tensordot(x, kernel, contracted)
  # As two matrices: XLA for CPUs makes a kernel's gradient twice as fast if rows are one axis.
  lead, out = x.shape[:x.ndim - contracted], kernel.shape[contracted:]
  matrix = kernel.reshape(-1, math.prod(out))
  return for_cpus.product(x.reshape(-1, len(matrix)), matrix).reshape(*lead, *out)


class RMSNorm(nnx.Module):
  """x / rms(x) * scale, computed in float32 (Zhang & Sennrich 2019)."""

  def __init__(self, width: int, *, epsilon: float = EPSILON, rngs: nnx.Rngs):
    del rngs
    self.epsilon = epsilon
    self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=('norm',))

  def __call__(self, x: Array) -> Array:
    """x [..., width] -> the same shape and dtype."""
    y = x.astype(jnp.float32)
    width = y.shape[-1]
    y = y * widened(jax.lax.rsqrt(row_sum(jnp.square(y)) / width + self.epsilon), width)
    return (y * repeated(self.scale[...], y.shape[:-1])).astype(x.dtype)


class LayerNorm(nnx.Module):
  """(x - mean(x)) / deviation(x) * scale + bias, computed in float32 (Ba et al. 2016)."""

  def __init__(self, width: int, *, epsilon: float = EPSILON, rngs: nnx.Rngs):
    self.epsilon = epsilon
    self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=('norm',))
    self.bias = parameter(rngs, (width,), ('norm',))

  def __call__(self, x: Array) -> Array:
    """x [..., width] -> the same shape and dtype."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


NORMS = {'rms': RMSNorm, 'layer': LayerNorm}


def _gelu(x: Array) -> Array:
  """GELU by tanh, which on CPUs is computed twice: to keep it costs more."""
  gelu = functools.partial(jax.nn.gelu, approximate=True)
  return (jax.checkpoint(gelu) if on_one_cpu() else gelu)(x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'gelu': _gelu,
    'gelu_exact': functools.partial(jax.nn.gelu, approximate=False),
    'silu': jax.nn.silu,
}


class FeedForward(nnx.Module):
  """FFW of equation 2: residual, pre-norm, two matrices, tanh-GELU in between.

  In decoders of other families also with a gate (Shazeer 2020), biases, another norm.
  """

  def __init__(self, width: int, d_ff: int, *, output_scale: float, rngs: nnx.Rngs,
               activation: str = 'gelu', gated: bool = False, bias: bool = False,
               norm: str = 'rms', epsilon: float = EPSILON):
    self.norm = NORMS[norm](width, epsilon=epsilon, rngs=rngs)
    self.activation = ACTIVATIONS[activation]
    self.gated, self.has_bias = gated, bias
    self.wi = parameter(rngs, (width, d_ff), ('embed', 'mlp'), fan_in=width)
    self.wo = parameter(rngs, (d_ff, width), ('mlp', 'embed'), fan_in=d_ff, scale=output_scale)
    if gated:
      self.gate = parameter(rngs, (width, d_ff), ('embed', 'mlp'), fan_in=width)
    if bias:
      self.wi_bias = parameter(rngs, (d_ff,), ('mlp',))
      self.wo_bias = parameter(rngs, (width,), ('norm',))
    if bias and gated:
      self.gate_bias = parameter(rngs, (d_ff,), ('mlp',))

  def __call__(self, x: Array) -> Array:
    """x [..., width] -> x + FFW(norm(x))."""
    normed = self.norm(x)
    y = self._plus(self._product(normed, self.wi), 'wi_bias')
    if self.gated:
      y = y * self.activation(self._plus(self._product(normed, self.gate), 'gate_bias'))
    else:
      y = self.activation(y)
    return x + self._plus(product(y, self.wo[...]), 'wo_bias')

  def _product(self, normed: Array, kernel: nnx.Param) -> Array:
    return place(product(normed, kernel[...]), 'mlp')

  def _plus(self, y: Array, bias: str) -> Array:
    return y + getattr(self, bias)[...].astype(y.dtype) if self.has_bias else y


class Embedding(nnx.Module):
  """A table of token vectors; also READ, where input and output tables are tied.

  Values have deviation 1/sqrt(width): inputs are scaled up by sqrt(width) to unit
  variance, and logits of a normalised activation start with unit variance.
  """

  def __init__(self, rows: int, width: int, *, first_id: int = 0, scaled: bool = True,
               rngs: nnx.Rngs):
    """Args: `first_id`, of the first row; `scaled`, by sqrt(width) when a token is looked up."""
    self.width, self.first_id, self.scaled = width, first_id, scaled
    self.table = parameter(rngs, (rows, width), ('vocab', 'embed'), fan_in=width)

  def __call__(self, tokens: Array, dtype) -> Array:
    """tokens [...] int32 -> [..., width] of `dtype`; an id without a row gets that of another."""
    if self.first_id:
      tokens = jnp.maximum(tokens - self.first_id, 0)
    x = self.table[...].astype(dtype)[tokens]
    return x * jnp.asarray(self.width ** 0.5, dtype) if self.scaled else x

  def read(self, x: Array) -> Array:
    """x [..., width] -> float32 logits by id; minus infinity where an id has no row."""
    logits = jnp.einsum('...d,vd->...v', x, self.table[...].astype(x.dtype),
                        preferred_element_type=jnp.float32)
    if self.first_id:
      lead = [(0, 0)] * (logits.ndim - 1)
      logits = jnp.pad(logits, [*lead, (self.first_id, 0)], constant_values=-jnp.inf)
    return logits


class PositionEmbedding(nnx.Module):
  """A learned vector for each place in a document, as in GPT-2."""

  def __init__(self, count: int, width: int, *, rngs: nnx.Rngs):
    self.table = parameter(rngs, (count, width), ('position', 'embed'), fan_in=width)

  def __call__(self, places: Array, dtype) -> Array:
    """places [...] int32 -> [..., width] of `dtype`."""
    return self.table[...].astype(dtype)[places]
