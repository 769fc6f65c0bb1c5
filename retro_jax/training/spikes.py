"""Steps whose loss jumps out of line are not taken: a wrapper around any optax optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from retro_jax.training.gradients import global_norm


class SpikeState(NamedTuple):
  """Attributes: the optimizer's own state; the last losses, a ring; how many were seen, skipped."""
  inner: Any
  losses: jax.Array
  seen: jax.Array
  skipped: jax.Array


def skip_spikes(inner: optax.GradientTransformation, window: int = 128, sigmas: float = 6.0
                ) -> optax.GradientTransformationExtraArgs:
  """`inner`, but a step whose loss is above mean + sigmas deviations changes nothing.

  Mean and deviation are of the last `window` losses that were not skipped; nothing is skipped
  before there are so many. A loss or gradient that is not finite is skipped as well.

  Args:
    inner: the optimizer.
    window: how many losses are remembered.
    sigmas: how far above their mean a loss is a spike.
  """
  inner = optax.with_extra_args_support(inner)

  def init(parameters: Any) -> SpikeState:
    zero = jnp.zeros((), jnp.int32)
    return SpikeState(inner.init(parameters), jnp.zeros((window,), jnp.float32), zero, zero)

  def update(updates: Any, state: SpikeState, parameters: Any = None, *, value: jax.Array,
             **more: Any) -> tuple[Any, SpikeState]:
    limit = state.losses.mean() + sigmas * state.losses.std()
    finite = jnp.isfinite(value) & jnp.isfinite(global_norm(updates))
    spike = ~finite | ((state.seen >= window) & (value > limit))
    taken, after = inner.update(updates, state.inner, parameters, value=value, **more)
    keep = lambda new, old: jnp.where(spike, old, new)
    taken = jax.tree.map(lambda u: jnp.where(spike, jnp.zeros_like(u), u), taken)
    remembered = state.losses.at[state.seen % window].set(value)
    return taken, SpikeState(
        jax.tree.map(keep, after, state.inner), keep(remembered, state.losses),
        state.seen + ~spike, state.skipped + spike)

  return optax.GradientTransformationExtraArgs(init, update)
