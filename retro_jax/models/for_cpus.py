"""Plain things in forms at which XLA for CPUs is fast; on anything else they are just that.

Sums and maxima. A long reduction is cut into windows of 32 by XLA, and each gone through number
by number. Over numbers that lie a vector apart it runs at the speed of memory, so most of an axis
is reduced like that: [w] as [a, b] over a, and then the few that are left. The results are
as exact, and not the same bit for bit. Broadcasts are here for their gradients, which are sums.

Products. XLA makes a kernel's gradient that is tall and narrow a third slower than its transpose.

Masks. XLA computes what is cheap anew in every loop that reads it, also where that
loop could otherwise use vectors; `stored` is read from memory.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.models.placement import on_one_cpu

Array = jax.Array
# XLA takes an axis up to this long as it is.
_WINDOW = 32
# Numbers that should lie side by side: a vector of the widest registers.
_SIDE_BY_SIDE = 16
# Columns of a narrow kernel; from some 512 on there is no difference.
_NARROW = 384


def row_sum(x: Array) -> Array:
  """Sum over the last axis, [..., w] -> [..., 1]."""
  return _row_sum(x, x.shape[-1]) if on_one_cpu() else x.sum(axis=-1, keepdims=True)


def row_max(x: Array) -> Array:
  """Maximum over the last axis, [..., w] -> [..., 1], through which no gradient flows."""
  x = jax.lax.stop_gradient(x)
  return _rows(x, jnp.max, jax.lax.max, -np.inf) if on_one_cpu() else x.max(-1, keepdims=True)


def total(x: Array) -> Array:
  """Sum of all, [...] -> []."""
  if not on_one_cpu() or x.ndim < 2:
    return x.sum()
  return row_sum(_first_axis(x.reshape(-1, x.shape[-1])))[0]


def total_change(change: Array, before: Array, after: Array) -> Array:
  """Sum of all of `change`, which took `before` to `after`: [...] -> [].

  On CPUs the difference of two sums over what is in memory: XLA would write the change down, to
  sum it. A number that is none shows in it, too; of the sum's digits fewer are right.
  """
  return total(after) - total(before) if on_one_cpu() else total(change)


def widened(x: Array, width: int) -> Array:
  """[..., 1] -> [..., width], all alike; the gradient is a `row_sum`."""
  shape = (*x.shape[:-1], width)
  return _widened(x, width) if on_one_cpu() else jnp.broadcast_to(x, shape)


def repeated(x: Array, lead: tuple[int, ...]) -> Array:
  """[...] -> [*lead, ...], all alike; the gradient is a sum over the new axes, also in steps."""
  return _repeated(x, lead) if on_one_cpu() else jnp.broadcast_to(x, (*lead, *x.shape))


def product(x: Array, kernel: Array) -> Array:
  """x [rows, in] @ kernel [in, out]."""
  tall = kernel.shape[1] <= _NARROW and kernel.shape[1] < kernel.shape[0]
  return _tall_product(x, kernel) if tall and on_one_cpu() else x @ kernel


def stored(x: Array) -> Array:
  """x, not computed anew by those who read it."""
  # The two branches give the same; XLA does not look into them when it fuses.
  return jax.lax.cond(x.any(), lambda: x, lambda: jnp.zeros_like(x)) if on_one_cpu() else x


def _rows(x: Array, reduce: Callable[..., Array], pair: Callable[..., Array], start: float
          ) -> Array:
  """The last axis reduced by what `pair` does to two numbers, from `start`."""
  width = x.shape[-1]
  if width > _WINDOW:
    first = _divisor(width, min(_WINDOW, width // _SIDE_BY_SIDE))
    x = reduce(x.reshape(*x.shape[:-1], first, width // first), axis=-2)
    # As windows: XLA would make one slow reduction of two.
    window = (1,) * (x.ndim - 1) + (_divisor(x.shape[-1], _WINDOW),)
    x = jax.lax.reduce_window(x, np.asarray(start, x.dtype), pair, window, window, 'VALID')
  return reduce(x, axis=-1, keepdims=True)


def _first_axis(x: Array) -> Array:
  """Sum over the first axis of [rows, w]."""
  rows = _divisor(len(x), _WINDOW)
  if rows == 1:  # all would be left to the product, which is less exact the more rows there are
    return x.sum(axis=0)
  # Of neighbours, so that what is computed to be summed is read from beginning to end.
  x = x.reshape(len(x) // rows, rows, *x.shape[1:]).sum(axis=1)
  # As a product, or XLA would make one slow reduction of two.
  return (jnp.ones((1, len(x)), x.dtype) @ x)[0]


def _divisor(number: int, most: int) -> int:
  """The largest divisor that is at most `most`."""
  return next(n for n in range(max(most, 1), 0, -1) if number % n == 0)


# A sum of rows and its transpose: each is the other's gradient.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _row_sum(x: Array, width: int) -> Array:
  del width
  return _rows(x, jnp.sum, jax.lax.add, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _widened(x: Array, width: int) -> Array:
  return jnp.broadcast_to(x, (*x.shape[:-1], width))


_row_sum.defvjp(lambda x, width: (_row_sum(x, width), None),
                lambda width, _, gradient: (_widened(gradient, width),))
_widened.defvjp(lambda x, width: (_widened(x, width), None),
                lambda width, _, gradient: (_row_sum(gradient, width),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _repeated(x: Array, lead: tuple[int, ...]) -> Array:
  return jnp.broadcast_to(x, (*lead, *x.shape))


def _sum_over(lead: tuple[int, ...], _, gradient: Array) -> tuple[Array]:
  total = _first_axis(gradient.reshape(math.prod(lead), -1))
  return (total.reshape(gradient.shape[len(lead):]),)


_repeated.defvjp(lambda x, lead: (_repeated(x, lead), None), _sum_over)


@jax.custom_vjp
def _tall_product(x: Array, kernel: Array) -> Array:
  return x @ kernel


def _tall_product_backward(kept, gradient: Array) -> tuple[Array, Array]:
  x, kernel = kept
  # The barrier keeps XLA from making it the slow one again.
  transposed = jax.lax.optimization_barrier(gradient.T @ x)
  return gradient @ kernel.T, transposed.T


_tall_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _tall_product_backward)
