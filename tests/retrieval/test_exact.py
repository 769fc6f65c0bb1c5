"""Exact search against a loop over every pair."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.errors import UserError
from retro_jax.retrieval.exact import (
  ExactPart,
  check_queries,
  exact_search,
  nearest_first,
  squared_distances,
)


def slow_search(queries, vectors, k, forbidden=None):
  """Sorts all distances, one query at a time, in float64."""
  ids, distances = [], []
  for row, query in enumerate(queries):
    all_distances = np.sum((vectors.astype(np.float64) - query) ** 2, -1).tolist()
    found = sorted((d, i) for i, d in enumerate(all_distances)
                   if forbidden is None or not forbidden[row, i])[:k]
    found += [(np.inf, -1)] * (k - len(found))
    ids.append([i for _, i in found])
    distances.append([d for d, _ in found])
  return np.array(ids), np.array(distances)


def clustered(seed, n, d, copies=4):
  """Vectors near a few centres, some exactly repeated; small integers, so that ties are exact."""
  rng = np.random.default_rng(seed)
  vectors = rng.integers(-3, 4, (n, d)).astype(np.float32)
  vectors[rng.integers(0, n, n // copies)] = vectors[rng.integers(0, n, n // copies)]
  return vectors


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 120), d=st.integers(1, 6),
       k=st.integers(1, 40), block=st.integers(1, 50), forbid=st.booleans())
def test_exact_search_equals_a_loop(seed, n, d, k, block, forbid):
  vectors = clustered(seed, n, d)
  rng = np.random.default_rng(seed + 1)
  queries = np.concatenate([vectors[rng.integers(0, n, 3)], rng.normal(size=(2, d))]).astype('f4')
  mask = rng.random((5, n)) < 0.4 if forbid else None
  blocks = [(i, vectors[i:i + block]) for i in range(0, n, block)]
  ids, distances = exact_search(
      queries, blocks, k, (lambda chosen: mask[:, chosen]) if forbid else None)
  expected_ids, expected = slow_search(queries, vectors, k, mask)
  np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=1e-5)
  # The first three queries have exact distances, so ties must be broken by id.
  np.testing.assert_array_equal(ids[:3], expected_ids[:3])


def test_exact_search_with_more_copies_than_candidates():
  vectors = np.tile(np.array([[1.1, 0.3, -0.7]], np.float32), (200, 1))
  vectors[150] = [5, 5, 5]
  queries = np.array([[1.1, 0.3, -0.7], [9, 9, 9], [1.2, 0.3, -0.7]], np.float32)
  ids, distances = exact_search(queries, [(0, vectors[:77]), (77, vectors[77:])], 9)
  assert ids.tolist() == [list(range(9)), [150] + list(range(8)), list(range(9))]
  assert not distances[0].any()


def test_exact_search_among_hundreds_of_ties():
  vectors = np.random.default_rng(0).integers(0, 3, (1500, 2)).astype(np.float32)
  queries = vectors[:20]
  ids, distances = exact_search(queries, [(0, vectors[:1000]), (1000, vectors[1000:])], 7)
  expected_ids, expected = slow_search(queries, vectors, 7)
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_array_equal(distances, expected)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), q=st.integers(0, 30), c=st.integers(0, 9),
       d=st.integers(1, 700), half=st.booleans())
def test_a_distance_does_not_depend_on_what_is_asked_beside_it(seed, q, c, d, half):
  rng = np.random.default_rng(seed)
  vectors = rng.normal(size=(40, d)).astype(np.float16 if half else np.float32)
  queries = rng.normal(size=(q, d)).astype(np.float32)
  ids = rng.integers(-1, 40, (q, c))
  together = squared_distances(queries, vectors, ids)
  for row in range(q):
    for column in range(c):
      alone = squared_distances(queries[row:row + 1], vectors, ids[row:row + 1, column:column + 1])
      assert together[row, column] == alone[0, 0]
      if ids[row, column] < 0:
        assert np.isinf(alone[0, 0])
      else:
        difference = vectors[ids[row, column]].astype(np.float32) - queries[row]
        expected = sum(float(x) ** 2 for x in difference.tolist())
        assert alone[0, 0] == pytest.approx(expected, rel=1e-6)


def test_exact_part_reads_any_array_and_stores_nothing():
  vectors = clustered(3, 700, 5).astype(np.float16)
  queries = vectors[::7].astype(np.float32)
  part = ExactPart(vectors)
  ids, distances = part.search(queries, 9, effort=4)
  expected_ids, expected = slow_search(queries, vectors, 9)
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_array_equal(distances, expected.astype(np.float32))
  assert ids.dtype == np.int64 and distances.dtype == np.float32
  assert part.search(queries[:0], 9)[0].shape == (0, 9)
  assert part.search(queries[:1], 701)[0][0, -1] == -1


def test_nearest_first_puts_holes_last_and_breaks_ties_by_id():
  ids, distances = nearest_first(
      np.array([[7, -1, 3, 5]]), np.array([[2, 0, 2, 1]], np.float32), 3)
  assert ids.tolist() == [[5, 3, 7]] and distances.tolist() == [[1, 2, 2]]


def test_unfit_queries_are_one_line():
  with pytest.raises(UserError, match='dimension 24; embed both'):
    check_queries(np.zeros((2, 23), np.float32), 24)
  queries = np.zeros((3, 4), np.float32)
  queries[1, 2] = np.nan
  with pytest.raises(UserError, match='query 1 holds a number that is not finite'):
    check_queries(queries, 4)
