"""The inner loops of BM25 search, compiled by Numba; what they work on stands in bm25.py.

A query's score of a chunk is the sum, over the words of the query, of the word's weight in
the query times its precomputed BM25 score in the chunk. Both functions sum in the order of
the query's words and in float32, so that they give the same numbers. bm25s has such a loop
for searching too; this one reads a repeated word's list once and settles ties by chunk.
"""

import numba
import numpy as np


@numba.njit(nogil=True)
def search(starts, chunks, scores, query_starts, query_words, query_weights, size, ids, distances):
  """Fills ids int64 [q, k] and distances float32 [q, k] with each query's best chunks.

  Args:
    starts: int64 [words + 1], where each word's list begins.
    chunks: int32 [entries], chunks that hold the word, ascending.
    scores: float32 [entries], score of the word in the chunk.
    query_starts: int64 [q + 1], where each query's words begin; no word comes twice.
    query_words: int32, words of the queries one after the other.
    query_weights: float32, weight of each of them.
    size: number of chunks.
    ids, distances: -1 and inf before the call, and afterwards where no chunk shares a word.
  """
  last = ids.shape[1] - 1
  sums = np.empty(size, np.float32)
  for q in range(ids.shape[0]):
    sums[:] = 0
    for j in range(query_starts[q], query_starts[q + 1]):
      word, weight = query_words[j], query_weights[j]
      for p in range(starts[word], starts[word + 1]):
        sums[chunks[p]] += weight * scores[p]
    worst = np.float32(0)
    for chunk in range(size):
      if sums[chunk] > worst:  # of equal chunks the first stays
        distance = -sums[chunk]
        at = last
        while at > 0 and distance < distances[q, at - 1]:
          ids[q, at], distances[q, at] = ids[q, at - 1], distances[q, at - 1]
          at -= 1
        ids[q, at], distances[q, at] = chunk, distance
        if ids[q, last] >= 0:
          worst = -distances[q, last]


@numba.njit(nogil=True)
def score(row_starts, row_words, row_scores, query_starts, query_words, query_weights, ids,
          distances):
  """Fills distances float32 [q, c] for the chunks ids int64 [q, c]; inf where the id is -1.

  Args:
    row_starts: int64 [size + 1], where each chunk's row begins.
    row_words: int32 [entries], words of the chunk, ascending.
    row_scores: float32 [entries], score of the word in the chunk.
    query_starts, query_words, query_weights: as for `search`.
    ids, distances: what to score, what is filled.
  """
  for q in range(ids.shape[0]):
    for c in range(ids.shape[1]):
      if ids[q, c] < 0:
        distances[q, c] = np.inf
        continue
      first, last = row_starts[ids[q, c]], row_starts[ids[q, c] + 1]
      total = np.float32(0)
      for j in range(query_starts[q], query_starts[q + 1]):
        at = first + np.searchsorted(row_words[first:last], query_words[j])
        if at < last and row_words[at] == query_words[j]:
          total += query_weights[j] * row_scores[at]
      distances[q, c] = np.float32(0) - total  # zero, not minus zero
