"""The loss of READ without its logits: [tokens, vocabulary] never exists as a whole.

Tokens go through READ and softmax some at a time. For training, the gradient is made in the
same pass: the sum of the losses is linear in its own cotangent, so what the backward pass
needs is known as soon as a block's logits are, and they are not computed twice.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from retro_jax.models.for_cpus import row_max, row_sum
from retro_jax.models.placement import on_one_device, place, platform, sum_over_examples

Array = jax.Array


def token_losses(hidden: Array, table: Array, targets: Array, block: int) -> Array:
  """Negative log-likelihood of each target in nats, float32 [b, n].

  Args:
    hidden: normalised activations, [b, n, d].
    table: of the embedding, [V, d].
    targets: int32 [b, n].
    block: tokens of each sequence at a time; 0 for all.
  """
  blocks, rest = _blocks(block, hidden, targets)
  table = table.astype(hidden.dtype)
  losses = jax.lax.map(lambda one: _losses(*one, table).losses, blocks)
  return _joined(losses, rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def summed_loss(hidden: Array, table: Array, targets: Array, weights: Array, block: int) -> Array:
  """The sum of the losses of `token_losses` times `weights` [b, n]; float32 [].

  Differentiable in `hidden` and `table`; not in the weights.
  """
  return (token_losses(hidden, table, targets, block) * weights).sum()


def _forward(hidden: Array, table: Array, targets: Array, weights: Array, block: int):
  # Each device sums over its own examples; their sums meet once, not after every block.
  run = sum_over_examples(functools.partial(_forward_here, block), (True, False, True, True),
                          cut_axis=1, width=table.shape[1])
  total, of_hidden, of_table = run(hidden, table.astype(hidden.dtype), targets, weights)
  return total, (of_hidden, of_table.astype(table.dtype))


def _forward_here(block: int, hidden: Array, cast: Array, targets: Array, weights: Array):
  """The summed loss, its gradient by `hidden`, and that by the table, float32."""
  blocks, rest = _blocks(block, hidden, targets, weights)

  def one_block(carry, xs):
    total, table_gradient = carry
    # As rows of one axis: XLA for CPUs is slower with two.
    x, y, w = (array.reshape(-1, *array.shape[2:]) for array in xs)
    block_losses = _losses(x, y, cast)
    losses, is_target, weight = block_losses.losses, block_losses.is_target, w[:, None]
    of_logits = block_losses.exponentials * (weight / block_losses.total)
    of_logits = (of_logits - jnp.where(is_target, weight, 0.0)).astype(hidden.dtype)
    of_x = jnp.einsum('rv,vd->rd', of_logits, cast).reshape(xs[0].shape)
    table_gradient += jnp.einsum('rv,rd->vd', of_logits, x, preferred_element_type=jnp.float32)
    return (total + (losses * w).sum(), table_gradient), of_x

  start = jnp.zeros((), jnp.float32), jnp.zeros(cast.shape, jnp.float32)
  (total, of_table), of_hidden = jax.lax.scan(one_block, start, blocks)
  return total, _joined(of_hidden, rest), of_table


def _backward(block: int, gradients, cotangent: Array):
  of_hidden, of_table = gradients
  return of_hidden * cotangent.astype(of_hidden.dtype), of_table * cotangent, None, None


summed_loss.defvjp(_forward, _backward)


class _Losses(NamedTuple):
  """Of rows [...], float32.

  Attributes:
    losses: [...].
    exponentials: [..., V], of logits from the largest down.
    total: [..., 1], their sum.
    is_target: bool [..., V], which token is the target.
  """
  losses: Array
  exponentials: Array
  total: Array
  is_target: Array


def _losses(x: Array, targets: Array, table: Array) -> _Losses:
  """Losses of x [..., d], and what their gradient needs."""
  logits = jnp.einsum('...d,vd->...v', x, table, preferred_element_type=jnp.float32)
  logits = place(logits, 'vocab')
  largest = row_max(logits)
  exponentials = jnp.exp(logits - largest)
  total = row_sum(exponentials)
  targets = targets[..., None]
  is_target = jnp.arange(table.shape[0]) == targets
  if on_one_device() and platform() != 'tpu':
    of_target = jnp.take_along_axis(logits, targets, axis=-1)
  else:  # no gather: the vocabulary may be cut over devices, and TPUs are slow at it
    of_target = jnp.where(is_target, logits, 0.0).sum(axis=-1, keepdims=True)
  losses = (largest - of_target + jnp.log(total))[..., 0]
  return _Losses(losses, exponentials, total, is_target)


def _blocks(block: int, *arrays: Array) -> tuple[tuple[Array, ...], int]:
  """Arrays [b, n, ...] as [blocks, b, block, ...], filled with zeros, and n."""
  n = arrays[0].shape[1]
  block = min(block or n, n)
  count = -(-n // block)

  def cut(x: Array) -> Array:
    x = jnp.pad(x, ((0, 0), (0, count * block - n)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)

  return tuple(cut(x) for x in arrays), n


def _joined(blocks: Array, n: int) -> Array:
  """The inverse of `_blocks`."""
  joined = jnp.moveaxis(blocks, 0, 1)
  return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :n]
