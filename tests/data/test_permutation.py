"""Computed permutations are permutations, differ by key, and never change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.data.permutation import key, mix, permute


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700), seed=st.integers(-2**40, 2**40))
def test_every_image_once_and_pointwise(size, seed):
  images = permute(np.arange(size), size, key(seed))
  assert sorted(images.tolist()) == list(range(size))
  some = np.arange(size)[::3]
  assert permute(some, size, key(seed)).tolist() == images[::3].tolist()


def test_keys_broadcast():
  keys = key(np.arange(5))
  both = permute(np.arange(9), 9, keys[:, None])
  assert both.shape == (5, 9)
  for row, one in zip(both, keys):
    assert row.tolist() == permute(np.arange(9), 9, one).tolist()


def test_looks_random():
  images = permute(np.arange(100), 100, key(7, np.arange(2000))[:, None])
  # Every position takes every value equally often; neighbours do not stay neighbours.
  counts = np.stack([np.bincount(column, minlength=100) for column in images.T])
  chi2 = ((counts - 20) ** 2 / 20).sum()
  assert abs(chi2 - 9900) < 6 * np.sqrt(2 * 9900)
  steps = np.diff(images, axis=1) % 100
  assert (np.bincount(steps.ravel(), minlength=100)[1:] / steps.size < 0.013).all()
  assert abs(np.corrcoef(images[:-1].ravel(), images[1:].ravel())[0, 1]) < 0.01


def test_every_part_of_a_key_matters():
  keys = {int(key(a, b, c)) for a in range(5) for b in range(5) for c in (0, 1, -1)}
  assert len(keys) == 75


def test_values_never_change():
  assert permute(np.arange(10), 10, key(0)).tolist() == PINNED
  assert int(mix(0)) == 0xE220A8397B1DCDAF


PINNED = [2, 1, 0, 7, 5, 8, 4, 3, 9, 6]


def test_outside_is_refused():
  with pytest.raises(IndexError):
    permute([10], 10, key(0))
