"""The loss in blocks, and its gradient made in the forward pass, against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.models import cross_entropy

B, N, D, V = 2, 7, 5, 11


def arrays():
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(B, N, D)).astype(np.float32)
  table = rng.normal(size=(V, D)).astype(np.float32)
  targets = rng.integers(0, V, (B, N)).astype(np.int32)
  weights = (rng.random((B, N)) < 0.7).astype(np.float32)
  return hidden, table, targets, weights


@pytest.mark.parametrize('block', [0, 1, 2, 3, 7, 100])
def test_losses_equal_loops(block):
  hidden, table, targets, _ = arrays()
  got = jax.jit(cross_entropy.token_losses, static_argnums=3)(hidden, table, targets, block)
  for b in range(B):
    for t in range(N):
      logits = [float(hidden[b, t].astype(np.float64) @ row) for row in table]
      expected = np.log(sum(np.exp(x) for x in logits)) - logits[targets[b, t]]
      assert float(got[b, t]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize('block', [0, 1, 3, 7])
def test_value_and_gradient_equal_those_of_whole_logits(block):
  hidden, table, targets, weights = arrays()

  def plain(hidden, table):
    logits = jnp.einsum('bnd,vd->bnv', hidden, table)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return 3 * (losses * weights).sum()

  def blocked(hidden, table):
    return 3 * cross_entropy.summed_loss(hidden, table, targets, weights, block)

  value, gradients = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, table)
  got, got_gradients = jax.jit(jax.value_and_grad(blocked, (0, 1)))(hidden, table)
  assert float(got) == pytest.approx(float(value), rel=1e-6)
  assert float(jax.jit(blocked)(hidden, table)) == pytest.approx(float(value), rel=1e-6)
  for a, b in zip(got_gradients, gradients, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_huge_logits_stay_finite():
  hidden, table, targets, weights = arrays()
  run = jax.jit(jax.value_and_grad(cross_entropy.summed_loss, (0, 1)), static_argnums=4)
  value, gradients = run(1000 * hidden, table, targets, weights, 2)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)


def test_whole_logits_never_exist():
  """The largest array of the compiled program is a block of logits, or the table."""
  shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
      ((1, 512, 8), np.float32), ((4096, 8), np.float32), ((1, 512), np.int32),
      ((1, 512), np.float32))]
  run = jax.jit(jax.value_and_grad(cross_entropy.summed_loss, (0, 1)), static_argnums=4)
  sizes = [run.lower(*shapes, block).compile().memory_analysis().temp_size_in_bytes
           for block in (0, 16)]
  assert sizes[0] > 512 * 4096 * 4 and sizes[1] < 512 * 4096
