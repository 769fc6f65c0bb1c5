"""What is made fast for CPUs equals the plain thing in value and gradient; elsewhere it is that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.models import for_cpus

WIDTHS = st.sampled_from([1, 2, 16, 31, 33, 64, 97, 128, 512, 1000, 1009, 1018, 4096])
LEADS = st.lists(st.integers(1, 5), max_size=3).map(tuple)


def random(seed: int, shape: tuple[int, ...]) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pulled_back(function, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
  return np.asarray(jax.jit(lambda x, g: jax.vjp(function, x)[1](g)[0])(x, cotangent))


@settings(max_examples=25, deadline=None)
@given(lead=LEADS, width=WIDTHS, seed=st.integers(0, 99))
def test_rows(lead, width, seed):
  x, by_row = random(seed, (*lead, width)), random(seed + 1, (*lead, 1))
  near = dict(rtol=1e-5, atol=1e-5 * width ** 0.5)
  np.testing.assert_array_equal(jax.jit(for_cpus.row_max)(x), x.max(-1, keepdims=True))
  np.testing.assert_allclose(jax.jit(for_cpus.row_sum)(x), x.sum(-1, keepdims=True), **near)
  wide = lambda x: for_cpus.widened(x, width)
  np.testing.assert_array_equal(jax.jit(wide)(by_row), np.broadcast_to(by_row, x.shape))
  # Each is the other's gradient.
  np.testing.assert_array_equal(pulled_back(for_cpus.row_sum, x, by_row),
                                np.broadcast_to(by_row, x.shape))
  np.testing.assert_allclose(pulled_back(wide, by_row, x), x.sum(-1, keepdims=True), **near)


@settings(max_examples=25, deadline=None)
@given(lead=st.lists(st.sampled_from([1, 2, 3, 7, 64, 97]), max_size=3).map(tuple),
       shape=st.sampled_from([(5,), (3, 4)]), seed=st.integers(0, 99))
def test_repeated(lead, shape, seed):
  x, cotangent = random(seed, shape), random(seed + 1, (*lead, *shape))
  repeat = lambda x: for_cpus.repeated(x, lead)
  np.testing.assert_array_equal(jax.jit(repeat)(x), np.broadcast_to(x, cotangent.shape))
  over = tuple(range(len(lead)))
  np.testing.assert_allclose(pulled_back(repeat, x, cotangent),
                             cotangent.astype(np.float64).sum(over), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('inner, outer', [(1, 1), (9, 8), (400, 384), (400, 385), (384, 384)])
def test_product(inner, outer):
  """Tall and narrow kernels, and others."""
  x, kernel, cotangent = (random(i, shape) for i, shape in enumerate(
      [(6, inner), (inner, outer), (6, outer)]))
  near = dict(rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(jax.jit(for_cpus.product)(x, kernel), x @ kernel, **near)
  of_x = pulled_back(lambda x: for_cpus.product(x, kernel), x, cotangent)
  of_kernel = pulled_back(lambda kernel: for_cpus.product(x, kernel), kernel, cotangent)
  np.testing.assert_allclose(of_x, cotangent @ kernel.T, **near)
  np.testing.assert_allclose(of_kernel, x.T @ cotangent, **near)


@pytest.mark.parametrize('shape', [(), (7,), (1, 1), (32, 8), (97, 3), (3, 64, 100)])
def test_total(shape):
  x = random(0, shape)
  np.testing.assert_allclose(jax.jit(for_cpus.total)(x), x.astype(np.float64).sum(), rtol=1e-4,
                             atol=1e-3)


def test_total_change():
  before, change = random(0, (64, 100)), random(1, (64, 100))
  summed = jax.jit(for_cpus.total_change)(change, before, before + change)
  np.testing.assert_allclose(summed, change.astype(np.float64).sum(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('place', [0, 70, 199])
def test_a_number_that_is_none_shows(bad, place):
  x = random(0, (4, 200))
  x[2, place] = bad
  assert not np.isfinite(jax.jit(for_cpus.total)(x))
  assert not np.isfinite(jax.jit(for_cpus.total_change)(x, np.ones_like(x), 1 + x))
  assert not np.isfinite(jax.jit(for_cpus.row_sum)(x)[2, 0])
  np.testing.assert_array_equal(jax.jit(for_cpus.row_max)(x)[2, 0], x[2].max())


@pytest.mark.parametrize('x', [
    np.zeros((2, 3), bool), np.eye(3, dtype=bool), np.zeros(4, np.int32), np.arange(-2, 3)])
def test_stored_is_the_same(x):
  np.testing.assert_array_equal(jax.jit(for_cpus.stored)(x), x)


def test_elsewhere_they_are_the_plain_functions(monkeypatch):
  """Accelerators see a reduction, a broadcast, or nothing."""
  # Lambdas, for what was traced before is not traced again.
  monkeypatch.setattr(for_cpus, 'on_one_cpu', lambda: False)
  x = jnp.ones((4, 4096))
  for function, primitives in [
      (lambda x: for_cpus.row_sum(x), {'reduce_sum', 'broadcast_in_dim'}),
      (lambda x: for_cpus.row_max(x), {'stop_gradient', 'reduce_max', 'broadcast_in_dim'}),
      (lambda x: for_cpus.total(x), {'reduce_sum'}), (lambda x: for_cpus.stored(x), set()),
      (lambda x: for_cpus.total_change(x, x, x), {'reduce_sum'}),
      (lambda x: for_cpus.widened(x[:, :1], 9), {'slice', 'broadcast_in_dim'}),
      (lambda x: for_cpus.repeated(x, (2, 3)), {'broadcast_in_dim'}),
      (lambda x: for_cpus.product(x, x.T), {'transpose', 'dot_general'})]:
    assert {str(e.primitive) for e in jax.make_jaxpr(function)(x).eqns} <= primitives
