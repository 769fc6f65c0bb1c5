"""RelativeAttention against loops, its masks, and the parts it is made of."""

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.models import attention
from tests import reference, tiny_models

HEADS, WIDTH = 3, 4


def make(query_dim: int, context_dim: int):
  """The module, jitted, and its parameters; biases are random too."""
  module, p = tiny_models.randomized(lambda: attention.RelativeAttention(
      query_dim, context_dim, HEADS, WIDTH, output_scale=1.0, rngs=nnx.Rngs(params=0)))
  return jax.jit(module, static_argnames=('offset', 'causal', 'key_groups')), p


@pytest.mark.parametrize('rows, columns, offset, groups, causal', [
    (7, 7, 0, 1, True), (7, 7, 0, 1, False), (5, 9, 0, 1, False), (9, 5, 0, 1, False),
    (4, 8, 3, 1, False), (4, 8, 3, 3, False), (1, 6, -2, 2, False), (6, 1, 5, 1, False)])
def test_equals_loops(rows, columns, offset, groups, causal):
  module, p = make(6, 10)
  rng = np.random.default_rng(rows * 100 + columns)
  x = rng.normal(size=(2, rows, 6)).astype(np.float32)
  context = rng.normal(size=(2, columns * groups, 10)).astype(np.float32)
  mask = rng.random((2, rows, columns * groups)) < 0.7
  if causal:
    mask &= np.tri(rows, dtype=bool)
  got = module(x, context, mask, offset=offset, causal=causal, key_groups=groups)
  for b in range(2):
    expected = reference.attention(
        p, x[b].astype(np.float64), context[b].astype(np.float64),
        may_read=lambda i, j: mask[b, i - 1, j - 1],
        distance=lambda i, j: i - ((j - 1) % columns + 1) + offset)
    np.testing.assert_allclose(got[b], expected, rtol=1e-5, atol=1e-5)


def test_rows_that_read_nothing_are_exactly_zero():
  module, _ = make(6, 6)
  x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
  mask = np.ones((5, 5), bool)
  mask[2] = False
  out = np.asarray(module(x, x, mask))
  assert (out[2] == 0).all() and (np.delete(out, 2, 0) != 0).all()


def test_gradient_is_finite_where_a_row_reads_nothing():
  module, _ = make(6, 6)
  x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
  mask = np.zeros((3, 3), bool)
  mask[0, 0] = True
  gradient = jax.jit(jax.grad(lambda x: (module(x, x, mask) ** 2).sum()))(x)
  assert np.isfinite(gradient).all() and np.abs(gradient[0]).max() > 0
  assert (np.asarray(gradient[1:]) == 0).all()


@pytest.mark.parametrize('causal', [False, True])
def test_absolute_position_does_not_matter(causal):
  """Shifting rows and keys together by s positions shifts the output: only distances count."""
  module, _ = make(6, 6)
  x = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
  small = np.tri(5, dtype=bool) if causal else np.ones((5, 5), bool)
  large = np.zeros((8, 8), bool)
  large[3:, 3:] = small
  shifted = np.concatenate([np.full((3, 6), 9, np.float32), x])
  np.testing.assert_allclose(module(shifted, shifted, large, causal=causal)[3:],
                             module(x, x, small, causal=causal), rtol=1e-5, atol=1e-6)


def test_distance_matters():
  module, _ = make(6, 6)
  x = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
  mask = np.ones((5, 5), bool)
  assert np.abs(module(x, x, mask, offset=0) - module(x, x, mask, offset=1)).max() > 1e-3


@pytest.mark.parametrize('rows, columns, offset', [(4, 4, 0), (3, 7, 2), (6, 2, -1)])
def test_skew_puts_each_distance_at_its_key(rows, columns, offset):
  by_distance = np.broadcast_to(
      attention.distances(rows, columns, offset, causal=False), (rows, rows + columns - 1))
  got = np.asarray(jax.jit(attention.skew, static_argnums=1)(by_distance, columns))
  for i in range(rows):
    for j in range(columns):
      assert got[i, j] == i - j + offset


def test_sinusoid_equals_the_formula():
  distances = np.array([126, 3, 0, -1, -64])
  expected = [reference.position_vector(int(d), 10) for d in distances]
  np.testing.assert_allclose(attention.sinusoid(distances, 10), expected, atol=1e-6)
