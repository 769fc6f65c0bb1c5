"""What neighbours could give, counted with sets and loops; the bootstrap, drawn one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.evaluation import potential
from retro_jax.evaluation.chunk_samples import Chunks


def bigrams(row: list[int]) -> list[tuple[int, int]]:
  return [pair for pair in zip(row, row[1:]) if 0 not in pair]


def longest_run(ours: list[int], theirs: list[int]) -> int:
  """The longest common run, by trying every one."""
  runs = {tuple(theirs[i:j]) for i in range(len(theirs)) for j in range(i + 1, len(theirs) + 1)}
  return max((j - i for i in range(len(ours)) for j in range(i + 1, len(ours) + 1)
              if 0 not in ours[i:j] and tuple(ours[i:j]) in runs), default=0)


def slow_count(following: np.ndarray, neighbors: np.ndarray, ks: list[int]):
  """(found, total) by the definition."""
  p, m = following.shape
  found = np.zeros((p, 3, 3, len(ks)), int)
  total = np.zeros((p, 3), int)
  for row in range(p):
    ours = following[row].tolist()
    tokens = [token for token in ours if token]
    total[row] = len(tokens), len(bigrams(ours)), m
    for part, columns in enumerate((slice(0, m), slice(m, 2 * m), slice(0, 2 * m))):
      for i, k in enumerate(ks):
        theirs = [n[columns].tolist() for n in neighbors[row, :k]]
        there = {token for n in theirs for token in n}
        pairs = {pair for n in theirs for pair in bigrams(n)}
        found[row, 0, part, i] = sum(token in there for token in tokens)
        found[row, 1, part, i] = sum(pair in pairs for pair in bigrams(ours))
        found[row, 2, part, i] = max(longest_run(ours, n) for n in theirs)
  return found, total


def rows(rng: np.random.Generator, shape: tuple[int, ...], largest: int) -> np.ndarray:
  """Token ids with padding at the end of each row, sometimes nothing but padding."""
  tokens = rng.integers(1, largest + 1, shape)
  length = rng.integers(0, shape[-1] + 1, shape[:-1] + (1,))
  return np.where(np.arange(shape[-1]) < length, tokens, 0).astype(np.int32)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 4), st.integers(1, 4), st.integers(1, 5),
       st.sampled_from([2, 6, 2**31 - 2]))
def test_counts_are_those_of_sets_and_loops(seed, p, k, m, largest):
  rng = np.random.default_rng(seed)
  following = rows(rng, (p, m), largest)
  neighbors = np.concatenate([rows(rng, (p, k, m), largest), rows(rng, (p, k, m), largest)], -1)
  if p and largest > 6:  # so large ids meet at all
    neighbors[0, -1, :m] = following[0]
  ks = sorted({1, k})
  counts = potential.count(following, neighbors, ks)
  found, total = slow_count(following, neighbors, ks)
  np.testing.assert_array_equal(counts.found, found)
  np.testing.assert_array_equal(counts.total, total)


def test_a_neighbour_of_another_row_is_not_looked_at():
  following = np.array([[5, 6, 7], [8, 9, 10]])
  neighbors = np.zeros((2, 1, 6), int)
  neighbors[0, 0, :3], neighbors[1, 0, :3] = following[1], following[0]
  assert not potential.count(following, neighbors, [1]).found.any()


def test_a_pair_across_n_and_f_counts_in_both_together_alone():
  counts = potential.count(np.array([[3, 4]]), np.array([[[9, 3, 4, 9]]]), [1])
  assert counts.found[0, 1, :, 0].tolist() == [0, 0, 1]
  assert counts.found[0, 2, :, 0].tolist() == [1, 1, 2]


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_bootstrap_is_that_of_documents_drawn_one_by_one(seed, size):
  rng = np.random.default_rng(seed)
  found, total = rng.integers(0, 5, (size, 2)).astype(float), np.full((size, 2), 5.0)
  share, low, high = potential.bootstrap(found, total, seed)
  np.testing.assert_allclose(share, found.sum(0) / total.sum(0))
  drawn = rng.integers(0, size, (4000, size))
  expected = np.percentile(found[drawn].sum(1) / total[drawn].sum(1), [2.5, 97.5], axis=0)
  # Of a thousand draws from a few values, so ends may differ by what the draws differ by.
  np.testing.assert_allclose([low, high], expected, atol=0.12)
  assert np.all(low <= share + 1e-9) and np.all(share <= high + 1e-9)


def test_interval_narrows_with_the_number_of_documents():
  rng = np.random.default_rng(0)
  width = []
  for size in (50, 5000):
    found = rng.binomial(10, 0.3, (size, 1)).astype(float)
    _, low, high = potential.bootstrap(found, np.full((size, 1), 10.0))
    width.append(float((high - low)[0]))
    assert low[0] < 0.3 < high[0]
  assert width[1] == pytest.approx(width[0] / 10, rel=0.3)


def sampled(seed: int, p: int, k: int, m: int) -> tuple[Chunks, np.ndarray]:
  rng = np.random.default_rng(seed)
  following = rows(rng, (p, m), 4)
  nearest = np.concatenate([following[:, None], rows(rng, (p, 1, m), 4)], -1).repeat(k, 1)
  ids = np.arange(p)
  chunks = Chunks(ids, ids, ids // 3, rows(rng, (p, m), 4), following,
                  np.zeros((p, k), np.int64), np.zeros((p, k), np.float32), nearest)
  return chunks, np.concatenate([rows(rng, (p, k, m), 40), rows(rng, (p, k, m), 40)], -1)


def test_measure_pools_blocks_by_document_and_leaves_out_last_chunks():
  blocks = [sampled(seed, 30, 3, 6) for seed in (1, 2)]
  body = potential.measure(blocks, (1, 2, 5), seed=0)
  followed = [chunks.following[:, 0] > 0 for chunks, _ in blocks]
  assert body['ks'] == [1, 2] and body['chunks'] == sum(map(sum, followed))
  assert len(body['rows']) == 3 * 3 * 2
  expected = {}
  for kind in ('nearest', 'random'):
    parts = [slow_count(c.following[f], (c.neighbor_tokens if kind == 'nearest' else r)[f], [1, 2])
             for (c, r), f in zip(blocks, followed)]
    found = sum(part[0].sum(0) for part in parts)
    expected[kind] = found / sum(part[1].sum(0) for part in parts)[:, None, None]
  for row in body['rows']:
    at = (potential.MEASURES.index(row['measure']), potential.PARTS.index(row['part']),
          body['ks'].index(row['k']))
    for kind in ('nearest', 'random'):
      assert row[kind] == pytest.approx(expected[kind][at])
    assert row['gain'] == pytest.approx(row['nearest'] - row['random'])
    assert row['gain_low'] <= row['gain'] <= row['gain_high']
  # N is C_{u+1} itself here: all of its tokens are found.
  assert next(r for r in body['rows'] if r['part'] == 'N')['nearest'] == 1


def test_measure_of_nothing_that_is_followed_has_no_rows():
  chunks, random = sampled(0, 5, 2, 4)
  chunks.following[:] = 0
  body = potential.measure([(chunks, random)], (1, 2))
  assert body['chunks'] == 0 and body['rows'] == []
