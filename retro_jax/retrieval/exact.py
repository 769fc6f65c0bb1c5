"""The k nearest vectors, exactly: blocked matrix products, then distances from differences.

Every other way to search (scann_part.py, mesh_search.py) takes its distances from
`squared_distances`, so that equal vectors are equally far wherever they lie and answers of
several parts merge exactly. Distances are squared L2, equal ones are ordered by id.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from retro_jax.errors import UserError

# Candidates beyond k kept through the float32 matrix product, before distances are exact.
_SPARE = 16
_QUERY_BLOCK = 512
_VECTOR_BLOCK = 16384
# Rows are gathered, and differences taken, of about so many numbers at a time: few calls into
# the vectors' files, and arithmetic that stays in the cache.
_GATHERED_NUMBERS, _CACHED_NUMBERS = 1 << 21, 1 << 16


def exact_search(
    queries: np.ndarray,
    blocks: Iterable[tuple[int, np.ndarray]],
    k: int,
    forbidden: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """The k nearest of all vectors in `blocks`, exactly; ties go to the smaller id.

  A blocked matrix product finds candidates; those, and for safety every vector that rounding
  could have kept out, get their distance from differences.

  Args:
    queries: float32 [q, d0].
    blocks: (first id, float32 [n, d0]) in order; each is read once.
    k: how many.
    forbidden: given the ids of a block, int64 [n], says which may not be returned, bool
      [q, n].

  Returns:
    ids int64 [q, k], squared distances float32 [q, k]; -1 and inf where there are fewer.
  """
  queries = np.ascontiguousarray(queries, np.float32)
  q = len(queries)
  keep = k + _SPARE
  query_norms = np.sum(queries * queries, -1)
  ids = np.full((q, 0), -1, np.int64)
  exact = np.zeros((q, 0), np.float32)
  for first, block in blocks:
    block = np.ascontiguousarray(block, np.float32)
    norms = np.sum(block * block, -1)
    block_ids = np.arange(first, first + len(block))
    distances = np.maximum(query_norms[:, None] - 2 * (queries @ block.T) + norms, 0)
    if forbidden is not None:
      distances[forbidden(block_ids)] = np.inf
    slack = product_slack(queries, math.sqrt(float(norms.max(initial=0))))
    chosen = min(keep, len(block))
    columns = np.argpartition(distances, chosen - 1, axis=-1)[:, :chosen]
    picked = np.take_along_axis(distances, columns, -1)
    picked_exact = squared_distances(queries, block, columns)
    picked_exact[np.isinf(picked)] = np.inf
    # Rows with near-ties across the cut are resolved from the whole block.
    cut = picked.max(-1)
    kth = np.sort(picked, -1)[:, min(k, chosen) - 1]
    unsafe = np.flatnonzero((chosen < len(block)) & (cut <= kth + 2 * slack) & np.isfinite(cut))
    extra: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for row in unsafe:
      near = np.flatnonzero(distances[row] <= kth[row] + 2 * slack[row])
      near_exact = squared_distances(queries[row:row + 1], block, near[None])[0]
      order = np.lexsort((near, near_exact))[:chosen]
      extra[int(row)] = (near[order], near_exact[order])
    for row, (near, near_exact) in extra.items():
      columns[row], picked_exact[row] = -1, np.inf
      columns[row, :len(near)], picked_exact[row, :len(near)] = near, near_exact
    new_ids = np.where(np.isinf(picked_exact), -1, columns + first)
    ids = np.concatenate([ids, new_ids], -1)
    exact = np.concatenate([exact, picked_exact], -1)
    ids, exact = nearest_first(ids, exact, keep)
  ids, exact = nearest_first(ids, exact, k)
  missing = k - ids.shape[1]
  return (np.pad(ids, ((0, 0), (0, missing)), constant_values=-1),
          np.pad(exact, ((0, 0), (0, missing)), constant_values=np.inf))


def product_slack(queries: np.ndarray, longest: float) -> np.ndarray:
  """What |q|^2 - 2 q.x + |x|^2 in float32 can be off by: the worst rounding of a dot product.

  Args:
    queries: float32 [q, d0].
    longest: length of the longest vector x.

  Returns:
    float32 [q].
  """
  lengths = np.linalg.norm(queries, axis=-1)
  return 4 * (queries.shape[1] + 4) * 2.0**-24 * (lengths + longest) ** 2


def nearest_first(
    ids: np.ndarray, distances: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """The first k of each row by (distance, id); -1 counts as farther than anything."""
  distances = np.where(ids < 0, np.float32(np.inf), distances)
  order = np.lexsort((np.where(ids < 0, np.iinfo(np.int64).max, ids), distances))[:, :k]
  return np.take_along_axis(ids, order, -1), np.take_along_axis(distances, order, -1)


def squared_distances(queries: np.ndarray, vectors: Any, ids: np.ndarray) -> np.ndarray:
  """Distance of each query to rows of its own, the same number wherever a row lies.

  Args:
    queries: float32 [q, d0].
    vectors: [n, d0], float16 or float32; anything that takes an integer array as index.
    ids: rows for each query, int64 [q, c]; negative ones stand for no row.

  Returns:
    float32 [q, c], differences in float32, summed in float64; inf where there is no row.
  """
  result = np.empty(ids.shape, np.float32)
  numbers = max(1, ids.shape[1] * queries.shape[1])
  gathered, cached = max(1, _GATHERED_NUMBERS // numbers), max(1, _CACHED_NUMBERS // numbers)
  for first in range(0, len(ids), gathered):
    rows = vectors[np.maximum(ids[first:first + gathered], 0)]
    for start in range(0, len(rows), cached):
      part = slice(first + start, min(first + start + cached, first + len(rows)))
      difference = rows[start:start + cached].astype(np.float32)
      difference -= queries[part, None]
      difference = difference.astype(np.float64)
      result[part] = np.vecdot(difference, difference)
  result[ids < 0] = np.inf
  return result


def check_queries(queries: np.ndarray, dimension: int) -> np.ndarray:
  """`queries` as contiguous float32 [q, dimension].

  Raises:
    UserError: they come from an embedder of another dimension, or are not finite.
  """
  queries = np.ascontiguousarray(queries, np.float32)
  if queries.ndim != 2 or queries.shape[1] != dimension:
    raise UserError(f'queries have shape {list(queries.shape)}, the index holds vectors of '
                    f'dimension {dimension}; embed both with the same embedder')
  finite = np.isfinite(queries).all(-1)
  if not finite.all():
    raise UserError(f'query {int(np.argmin(finite))} holds a number that is not finite; '
                    'embed it again')
  return queries


def array_blocks(vectors: Any) -> Iterator[tuple[int, np.ndarray]]:
  """`vectors` [n, d0] as (first row, float32 block)."""
  for first in range(0, len(vectors), _VECTOR_BLOCK):
    yield first, np.asarray(vectors[first:first + _VECTOR_BLOCK], np.float32)


def joined(
    parts: Iterable[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
  """(ids, distances) of consecutive queries as one; of no query, two arrays [0, k]."""
  empty = (np.zeros((0, k), np.int64), np.zeros((0, k), np.float32))
  ids, distances = zip(empty, *parts)
  return np.concatenate(ids), np.concatenate(distances)


class ExactPart:
  """Every vector is looked at; nothing is stored beside the vectors themselves."""

  kind = 'exact'

  def __init__(self, vectors: Any):
    """`vectors`: [n, d0], float16 or float32; anything with .shape, len() and slices."""
    self._vectors = vectors
    self.size = len(vectors)

  def search(self, queries: np.ndarray, k: int, effort: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """See `index.Part.search`; `effort` changes nothing."""
    del effort
    queries = check_queries(queries, self._vectors.shape[1])
    return joined([exact_search(queries[i:i + _QUERY_BLOCK], array_blocks(self._vectors), k)
                   for i in range(0, len(queries), _QUERY_BLOCK)], k)
