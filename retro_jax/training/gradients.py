"""How long a gradient is, and its clip.

All who ask take the sums of squares from here: what is the same expression, XLA computes once.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from retro_jax.models import for_cpus


def squares(x: jax.Array) -> jax.Array:
  """The sum of the squares of all of x."""
  return for_cpus.total(jnp.square(x))


def global_norm(tree: Any) -> jax.Array:
  """The length of all arrays of a tree together."""
  return jnp.sqrt(sum(squares(leaf) for leaf in jax.tree.leaves(tree)))


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
  """The gradient made no longer than `largest`, as by optax; that sums squares number by number."""

  def scaled(gradient: Any, parameters: Any) -> Any:
    del parameters
    norm = global_norm(gradient)
    scale = jnp.where(norm < largest, 1.0, largest / norm)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), gradient)

  return optax.stateless(scaled)
