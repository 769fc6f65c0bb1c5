"""The fused kernel for relative positions, interpreted, against loops and against the plain kernels.

That TPUs' compiler takes it, and what it then computes, is in tests/topology/test_kernels.py.
"""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from retro_jax.models import attention_kernels, flash_relative
from tests import tiny_models

HEADS, WIDTH = 2, 4


def loops(q, position, k, v, p, segments) -> np.ndarray:
  """B.1.2's logits and their softmax, number by number, in float64."""
  batch, heads, n, _ = q.shape
  out = np.zeros(v.shape)
  for b in range(batch):
    for h in range(heads):
      for i in range(n):
        reads = [j for j in range(i + 1) if segments[b, i] == segments[b, j]]
        # Row t of p is distance n - 1 - t.
        logits = np.array([q[b, h, i] @ k[b, h, j] + position[b, h, i] @ p[h, n - 1 - (i - j)]
                           for j in reads])
        weights = np.exp(logits - logits.max())
        out[b, h, i] = weights @ v[b, h, reads] / weights.sum()
  return out


def example(n: int, batch: int, seed: int):
  """Five inputs, segments side by side, and weights of the outputs."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  arrays = [normal(batch, HEADS, n, WIDTH) for _ in range(4)] + [normal(HEADS, n, WIDTH)]
  segments = np.sort(rng.integers(0, 4, (batch, n)), axis=1).astype(np.int32)
  return arrays, segments, normal(batch, HEADS, n, WIDTH)


@settings(max_examples=8, deadline=None)
@given(rows=st.sampled_from([1, 2, 4, 8]), blocks=st.integers(1, 6), batch=st.integers(1, 3),
       seed=st.integers(0, 2 ** 31 - 1))
def test_values_and_gradients_are_those_of_loops(rows, blocks, batch, seed):
  """The gradients by how much the loops change along a random direction."""
  arrays, segments, weights = example(rows * blocks, batch, seed)
  run = lambda *inputs: flash_relative.attend(*inputs, segments, rows, True)
  got, back = jax.jit(lambda *inputs: jax.vjp(run, *inputs))(*arrays)
  exact = [x.astype(np.float64) for x in arrays]
  np.testing.assert_allclose(got, loops(*exact, segments), rtol=1e-4, atol=1e-4)
  rng = np.random.default_rng(seed + 1)
  for number, gradient in enumerate(back(jax.numpy.asarray(weights))):
    direction = rng.normal(size=exact[number].shape)
    moved = lambda by: loops(*(x + by * direction if i == number else x
                               for i, x in enumerate(exact)), segments)
    expected = ((moved(1e-5) - moved(-1e-5)) / 2e-5 * weights).sum()
    size = np.abs(np.asarray(gradient) * direction).sum()
    assert abs((gradient * direction).sum() - expected) < 1e-4 * (1 + size)


@pytest.mark.parametrize('rows', [16, 48])
def test_later_tokens_and_other_documents_have_no_influence(rows):
  arrays, segments, _ = example(48, 1, 0)
  segments[:, :] = np.repeat([1, 2], [20, 28])
  run = jax.jit(lambda *inputs: flash_relative.attend(*inputs, segments, rows, True))
  before = np.asarray(run(*arrays))
  changed = [x.copy() for x in arrays]
  for x in changed[:4]:
    x[:, :, 30:] = 100
  np.testing.assert_array_equal(run(*changed)[:, :, :30], before[:, :, :30])
  for x in changed[:4]:
    x[:, :, :20] = -100
  np.testing.assert_array_equal(run(*changed)[:, :, 20:30], before[:, :, 20:30])


def test_what_it_cannot_is_refused(monkeypatch):
  arrays, segments, _ = example(24, 1, 0)
  q, position, k, v = (x.swapaxes(1, 2) for x in arrays[:4])
  p = np.zeros((25, HEADS, WIDTH), np.float32)
  run = lambda block: attention_kernels.causal(
      q, k, v, segments, (position, p), 'flash_relative', block)
  with pytest.raises(ValueError, match='a multiple of 16 tokens, got 24.*attention_block'):
    run(16)
  monkeypatch.setattr(attention_kernels, 'device_kind', lambda: 'TPU v4')
  with pytest.raises(ValueError, match="needs TPU v5 or newer, got TPU v4; .* = 'blocked'"):
    run(8)


def test_it_is_for_relative_positions():
  with pytest.raises(ValueError, match="is for relative positions, but positions = 'rotary'"):
    dataclasses.replace(tiny_models.TINY, positions='rotary', attention_kernel='flash_relative')


def test_the_estimate_counts_the_tiles():
  """Blocks of 16 rows meet the first 48, 96, 144 or 160 keys: FLOPs of three products each."""
  arrays, segments, _ = example(160, 2, 0)
  found = jax.make_jaxpr(lambda *inputs: flash_relative.attend(*inputs, segments, 16, True))(*arrays)
  calls = [equation for equation in _equations(found.jaxpr)
           if equation.primitive.name == 'pallas_call']
  pairs = 48 * 48 + 48 * 96 + 48 * 144 + 16 * 160
  assert [equation.params['cost_estimate'].flops for equation in calls] == [
      3 * 2 * 2 * HEADS * pairs * WIDTH]


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns') and equation.primitive.name != 'pallas_call':
        yield from _equations(inner)
