"""Brute force on eight fake devices against exact search."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.errors import UserError
from retro_jax.retrieval import mesh_search
from retro_jax.retrieval.exact import array_blocks, exact_search
from retro_jax.retrieval.mesh_search import MeshSearch


def tied(seed, n, d):
  """Small integers, a quarter of the rows copies of others: distances are exact, ties many."""
  rng = np.random.default_rng(seed)
  vectors = rng.integers(-2, 3, (n, d)).astype(np.float16)
  vectors[rng.integers(0, n, n // 4)] = vectors[rng.integers(0, n, n // 4)]
  return vectors


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.sampled_from([1, 5, 8, 61, 300]),
       k=st.sampled_from([1, 3, 20]), q=st.integers(0, 5), devices=st.sampled_from([1, 8]))
def test_equals_exact_search_with_ties_by_id(seed, n, k, q, devices):
  vectors = tied(seed, n, 3)
  rng = np.random.default_rng(seed)
  queries = np.concatenate([vectors[rng.integers(0, n, q)], rng.normal(size=(2, 3))])
  queries = queries.astype(np.float32)
  mesh = jax.make_mesh((devices,), ('x',), devices=jax.devices()[:devices])
  ids, distances = MeshSearch(mesh, vectors).search(queries, k)
  expected_ids, expected = exact_search(queries, array_blocks(vectors), k)
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_array_equal(distances, expected)
  assert ids.dtype == np.int64 and distances.dtype == np.float32


def test_more_copies_than_candidates():
  vectors = np.tile(np.array([[1.1, 0.3, -0.7]], np.float32), (400, 1))
  vectors[150] = [5, 5, 5]
  ids, _ = MeshSearch(mesh_search.all_devices(), vectors).search(
      np.array([[1.2, 0.3, -0.7], [9, 9, 9]], np.float32), 9)
  assert ids.tolist() == [list(range(9)), [150, *range(8)]]


def test_far_from_the_origin_rounding_does_not_decide():
  # Squared lengths of 10^8 leave float32 products nothing of distances near 1.
  rng = np.random.default_rng(0)
  vectors = (rng.normal(size=(500, 4)) + 5000).astype(np.float32)
  queries = vectors[:10] + np.float32(0.1)
  ids, distances = MeshSearch(mesh_search.all_devices(), vectors).search(queries, 6)
  true = np.sum((vectors.astype(np.float64) - queries[:, None]) ** 2, -1)
  np.testing.assert_array_equal(ids, np.argsort(true, -1)[:, :6])
  np.testing.assert_allclose(distances, np.sort(true, -1)[:, :6], rtol=1e-6)


def test_rows_lie_on_all_devices_in_equal_parts():
  search = MeshSearch(mesh_search.all_devices(), tied(0, 83, 6))
  shapes = [shard.data.shape for shard in search._rows.addressable_shards]
  assert shapes == [(11, 6)] * 8
  mesh = jax.make_mesh((2, 4), ('data', 'tensor'))
  assert len(MeshSearch(mesh, tied(0, 83, 6))._rows.addressable_shards) == 8


def test_approximate_recall():
  rng = np.random.default_rng(1)
  vectors = rng.normal(size=(4000, 16)).astype(np.float16)
  queries = rng.normal(size=(100, 16)).astype(np.float32)
  ids, distances = MeshSearch(mesh_search.all_devices(), vectors, True).search(queries, 10)
  truth, true_distances = exact_search(queries, array_blocks(vectors), 10)
  recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), truth.tolist())])
  assert recall > 0.95
  assert (distances >= true_distances).all() and (np.diff(distances) >= 0).all()


def test_unfit_queries_are_one_line():
  with pytest.raises(UserError, match='dimension 6'):
    MeshSearch(mesh_search.all_devices(), tied(0, 9, 6)).search(np.zeros((1, 5), np.float32), 1)
