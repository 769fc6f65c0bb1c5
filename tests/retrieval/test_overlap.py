"""Common substrings of many pairs at once, against loops over every pair of positions."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.overlap import brute_force
from retro_jax.retrieval.overlap import (
  common_substring_spans,
  longest_common_prefix,
  longest_common_substring,
)


def adversarial(rng: np.random.Generator, m: int, r: int) -> tuple[np.ndarray, np.ndarray]:
  """One pair of rows that is random, or hard for one reason or another."""
  kind = rng.integers(10)
  a, b = rng.integers(1, 4, m), rng.integers(1, 4, r)
  if kind == 0:  # all equal
    a[:], b[:] = 7, 7
  elif kind == 1:  # periodic, of two periods
    a, b = np.arange(m) % 3 + 1, np.arange(r) % int(rng.integers(2, 5)) + 1
  elif kind == 2:  # nothing in common
    a, b = a + 70000, b + 80000
  elif kind == 3:  # one of them is padding alone
    a[:] = 0
  elif kind == 4:  # both are
    a[:], b[:] = 0, 0
  elif kind == 5:  # padding inside would join two runs
    a[rng.integers(m)], b[rng.integers(r)] = 0, 0
  elif kind == 6:  # copied, at the ends
    n = int(rng.integers(1, min(m, r) + 1))
    a, b = rng.integers(1, 60000, m), rng.integers(1, 60000, r)
    b[r - n:] = a[:n]
  elif kind == 7:  # the largest ids of narrow types
    a, b = rng.choice([65534, 65535, 65536, 1], m), rng.choice([65534, 65535, 65536, 1], r)
  elif kind == 8:  # one token in common, many times
    a, b = np.where(a > 1, 0, 1), np.where(b > 2, 1, 0)
  return a, b


def test_equals_brute_force_on_ten_thousand_pairs():
  rng = np.random.default_rng(0)
  shapes = [(1, 1), (1, 9), (9, 1), (6, 6), (8, 16), (13, 5)]
  for m, r in shapes:
    rows = [adversarial(rng, m, r) for _ in range(10000 // len(shapes) + 1)]
    a, b = (np.stack(side) for side in zip(*rows))
    expected = [brute_force(x.tolist(), y.tolist()) for x, y in rows]
    spans = common_substring_spans(a, b)
    np.testing.assert_array_equal(np.stack(spans, 1), expected)
    np.testing.assert_array_equal(longest_common_substring(a, b), spans.lengths)
    assert spans.lengths.dtype == spans.a_starts.dtype == np.int32


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), p=st.integers(0, 4), k=st.integers(0, 3),
       m=st.integers(0, 7), r=st.integers(0, 7))
def test_partners_and_lengths(seed, p, k, m, r):
  rng = np.random.default_rng(seed)
  a, b = rng.integers(0, 4, (p, m)), rng.integers(0, 4, (p, k, r))
  a_lengths, b_lengths = rng.integers(0, m + 1, p), rng.integers(0, r + 1, (p, k))
  spans = common_substring_spans(a, b, a_lengths, b_lengths)
  lengths = longest_common_substring(a, b, a_lengths, b_lengths)
  prefixes = longest_common_prefix(a, b, a_lengths, b_lengths)
  assert lengths.shape == prefixes.shape == spans.b_starts.shape == (p, k)
  for i, j in np.ndindex(p, k):
    x, y = a[i, :a_lengths[i]].tolist(), b[i, j, :b_lengths[i, j]].tolist()
    assert tuple(int(s[i, j]) for s in spans) == brute_force(x, y)
    assert lengths[i, j] == spans.lengths[i, j]
    common = 0
    while common < min(len(x), len(y)) and x[common] == y[common] != 0:
      common += 1
    assert prefixes[i, j] == common


@pytest.mark.parametrize('m', [254, 255, 256, 700])
def test_runs_longer_than_a_byte(m):
  rng = np.random.default_rng(m)
  a = rng.integers(1, 9, (3, m))
  assert longest_common_substring(a, np.pad(a, ((0, 0), (2, 0)))).tolist() == [m] * 3
  assert longest_common_prefix(a, a).tolist() == [m] * 3
  assert longest_common_substring(np.full((1, m), 5), np.full((1, m + 1), 5)).tolist() == [m]


def test_memory_does_not_grow_with_the_pairs():
  def peak(p):
    a, b = np.ones((p, 16), np.int32), np.ones((p, 4, 32), np.int32)
    tracemalloc.start()
    longest_common_substring(a, b)
    common_substring_spans(a[:, :4], b[..., :4])
    result = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result - 4 * 4 * p * 4  # the results themselves

  assert peak(60000) <= 1.2 * peak(30000) < 48 << 20


def test_shapes_that_do_not_fit():
  with pytest.raises(ValueError, match='expected'):
    longest_common_substring(np.ones((2, 3), int), np.ones((3, 3), int))
