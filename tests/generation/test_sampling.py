"""The next token against a slow draw, one id at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.generation import sampling


def slowly(logits, temperature, top_k, top_p, seed) -> int:
  """One id at a time, likeliest first."""
  ids = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k or len(logits)]
  weights = [np.exp((float(logits[i]) - float(logits.max())) / temperature) for i in ids]
  kept, mass, total = [], 0.0, sum(weights)
  for i, weight in zip(ids, weights):
    kept.append((i, weight))
    mass += weight / total
    if top_p < 1 and mass >= top_p:
      break
  drawn, whole = np.random.default_rng(seed).random(), sum(w for _, w in kept)
  for i, weight in kept:
    drawn -= weight / whole
    if drawn < 0:
      return i
  return kept[-1][0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 3), st.integers(0, 12), st.floats(0.05, 1))
def test_choose_draws_from_the_truncated_distribution(seed, temperature, top_k, top_p):
  rng = np.random.default_rng(seed)
  logits = np.round(rng.normal(size=9), 1).astype(np.float32)
  logits[rng.integers(9)] = -np.inf
  token = sampling.choose(logits, temperature, top_k, top_p, np.random.default_rng(seed))
  assert token == slowly(logits, temperature, top_k, top_p, seed)


@pytest.mark.parametrize('temperature, top_k, top_p', [
    (1, 0, 1), (3, 0, 1), (3, 0, 0.97), (2, 900, 1), (2, 900, 0.9), (0.5, 0, 0.9)])
def test_choose_among_many_ids_that_are_not_all_ordered(temperature, top_k, top_p):
  logits = np.round(np.random.default_rng(1).normal(size=3000), 2).astype(np.float32)
  for seed in range(8):
    token = sampling.choose(logits, temperature, top_k, top_p, np.random.default_rng(seed))
    assert token == slowly(logits, temperature, top_k, top_p, seed)


def test_choose_frequencies_follow_the_softmax():
  rng, logits = np.random.default_rng(0), np.log(np.array([0.5, 0.3, 0.15, 0.05]))
  drawn = [sampling.choose(logits, 1.0, 0, 1.0, rng) for _ in range(4000)]
  counts = np.bincount(drawn, minlength=4)
  np.testing.assert_allclose(counts / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)
  assert {sampling.choose(logits, 0, 0, 1.0, rng) for _ in range(10)} == {0}
