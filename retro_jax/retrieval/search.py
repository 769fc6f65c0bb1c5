"""Neighbours of the chunks of training sequences: over-retrieve, filter, keep K.

One part of an index at a time, so that a part bounds memory and parts can be searched by
different machines; merging them is exact. Also the control: K random allowed chunks in the
same form. What is allowed is decided in policies.py; writing the result to disk is
neighbor_build.py's.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from retro_jax.data.permutation import key, permute
from retro_jax.errors import UserError
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.exact import exact_search, nearest_first
from retro_jax.retrieval.policies import Policy
from retro_jax.retrieval.sharded_index import Index, chunk_texts

_EXACT_ROWS = 256
_EXACT_BLOCK = 16384
_WIDER = 8
_SEARCH_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Neighbors:
  """Neighbours of s sequences of l chunks.

  Attributes:
    ids: chunks of the database, int64 [s, l, K], nearest first; -1 where there is none.
    distances: squared L2 (BM25: negated scores), float32 [s, l, K]; inf where there is none.
  """

  ids: np.ndarray
  distances: np.ndarray


def sequence_chunk_ids(
    num_chunks: int, chunks_per_sequence: int, first: int = 0, last: int | None = None
) -> np.ndarray:
  """Chunks of training sequences [first, last), consecutive; int64 [s, l], -1 after the end."""
  count = -(-num_chunks // chunks_per_sequence)
  last = count if last is None else min(last, count)
  ids = np.arange(first * chunks_per_sequence, last * chunks_per_sequence, dtype=np.int64)
  return np.where(ids < num_chunks, ids, -1).reshape(last - first, chunks_per_sequence)


def documents_of(queries: ChunkDatabase, chunk_ids: np.ndarray) -> np.ndarray:
  """Ordinals in the query store, int64, of chunks of any shape; -1 where there is none."""
  result = np.full(chunk_ids.shape, -1, np.int64)
  result[chunk_ids >= 0] = queries.document(chunk_ids[chunk_ids >= 0])
  return result


def check_same_space(queries: ChunkDatabase, database: ChunkDatabase) -> None:
  """Refuses two stores that cannot be searched with each other.

  Raises:
    UserError: other vocabulary, chunk length or embedder; says which two folders disagree.
  """
  for what, ours, theirs in (
      ('vocabulary', queries.vocabulary_fingerprint, database.vocabulary_fingerprint),
      ('chunk length', queries.chunk_length, database.chunk_length),
      ('embedder', queries.embedder_fingerprint, database.embedder_fingerprint)):
    if ours != theirs:
      raise UserError(f'{queries.folder} has {what} {ours} but {database.folder} has {theirs}; '
                      f'build both with the same {what}')


def search_part(
    part: Any,
    first: int,
    queries: ChunkDatabase,
    database: ChunkDatabase,
    policy: Policy,
    chunk_ids: np.ndarray,
    num_neighbors: int,
    margin: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
  """The K nearest allowed chunks of one part of an index, for each real chunk of sequences.

  Asks the part for K + margin; chunks that keep fewer than K ask for more, and in the end
  every chunk of the part is looked at, so that a place stays empty only when no allowed chunk
  is left in it. `policy.drops` counts what the first search turned away.

  Args:
    part: of an index, as `Index.part` gives it.
    first: the chunk of the database that is row 0 of the part.
    queries: the store of the sequences.
    database: the store that is searched.
    policy: made for these two stores.
    chunk_ids: chunks of the query store, int64 [s, l]; -1 is padding. All chunks of a
      sequence must be there, since its documents are forbidden to all of them.
    num_neighbors: K.
    margin: candidates beyond K in the first search.

  Returns:
    ids in the database int64 [rows, K] and distances float32 [rows, K] of the chunks that are
    not padding, in order; -1 and inf where there are fewer.
  """
  real = np.argwhere(chunk_ids >= 0)
  query_ids = chunk_ids[chunk_ids >= 0]
  own = policy.own_documents(documents_of(queries, chunk_ids))[real[:, 0]]
  lexical = part.kind == 'bm25'
  vectors = np.array(list(chunk_texts(queries, query_ids)), object) if lexical else (
      queries.embedding(query_ids))
  ids = np.full((len(real), num_neighbors), -1, np.int64)
  distances = np.full(ids.shape, np.inf, np.float32)

  def search(rows: np.ndarray, width: int, effort: int, count: bool) -> np.ndarray:
    """Fills `rows` in; returns those that lack neighbours the part may still have."""
    lacking = []
    for begin in range(0, len(rows), _SEARCH_ROWS):
      some = rows[begin:begin + _SEARCH_ROWS]
      found, found_distances = part.search(vectors[some], width, effort)
      exhausted = found[:, -1] < 0
      found = np.where(found >= 0, found + first, -1)
      stays = policy.allowed(query_ids[some], own[some], found, count)
      ids[some], distances[some] = padded(
          *nearest_first(np.where(stays, found, -1), found_distances, num_neighbors),
          num_neighbors)
      complete = lexical or part.kind == 'exact'
      lacking.append(some[(stays.sum(-1) < num_neighbors) & ~(exhausted & complete)])
    return np.concatenate(lacking) if lacking else rows

  width = min(part.size, num_neighbors + margin)
  lacking = search(np.arange(len(real)), width, 1, True)
  policy.drops['searched_wider'] += len(lacking)
  while len(lacking) and width < part.size:
    width = min(part.size, width * _WIDER)
    lacking = search(lacking, width, 4, False)
    if not lexical:
      break
  if lexical or (part.kind == 'exact' and width >= part.size):
    return ids, distances
  policy.drops['searched_exactly'] += len(lacking)
  for begin in range(0, len(lacking), _EXACT_ROWS):
    rows = lacking[begin:begin + _EXACT_ROWS]
    ids[rows], distances[rows] = _exactly(
        part, first, database, policy, vectors[rows], query_ids[rows], own[rows], num_neighbors)
  return ids, distances


def _exactly(
    part: Any, first: int, database: ChunkDatabase, policy: Policy, vectors: np.ndarray,
    query_ids: np.ndarray, own: Any, num_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
  """The K nearest allowed chunks of a part, looking at every one of its vectors."""
  rows_of = database.embeddings.part(first, first + part.size)

  def blocks():
    for begin in range(0, part.size, _EXACT_BLOCK):
      yield first + begin, rows_of[begin:begin + _EXACT_BLOCK].astype(np.float32)

  forbidden = lambda block: policy.forbidden_in(int(block[0]), len(block), query_ids, own)
  width = num_neighbors
  while True:
    found, distances = exact_search(vectors, blocks(), width, forbidden)
    # Near-duplicates are too dear to look for in every chunk: only in what would be returned.
    stays = policy.allowed(query_ids, own, found, count=False)
    if width >= part.size or not np.any((stays.sum(-1) < num_neighbors) & (found[:, -1] >= 0)):
      return padded(*nearest_first(np.where(stays, found, -1), distances, num_neighbors),
                    num_neighbors)
    width = min(part.size, width * _WIDER)


def nearest_visible(index: Index, queries: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
  """The k nearest chunks that belong to no removed document.

  Args:
    index: over a store.
    queries: float32 [q, d0]; for BM25 a sequence of q texts.
    k: how many.

  Returns:
    ids int64 [q, k] and distances float32 [q, k]; -1 and inf where there are fewer.
  """
  database, width, effort = index.database, k, 1
  while True:
    ids, distances = index.search(queries, width, effort)
    gone = (ids >= 0) & np.isin(database.document(np.maximum(ids, 0)), database.removed)
    enough = (~gone & (ids >= 0)).sum(-1) >= k
    if index.method == 'bm25':
      enough |= ids[:, -1] < 0  # nothing more has a word in common
    if width >= index.size or np.all(enough):
      return padded(*nearest_first(np.where(gone, -1, ids), distances, k), k)
    width, effort = min(index.size, _WIDER * width), 4


def check_of_database(index: Index, database: ChunkDatabase) -> None:
  """Refuses, with a `UserError`, an index over another number of chunks than the database has."""
  if index.size != database.num_chunks:
    raise UserError(f'the index holds {index.size:,} vectors, but {database.folder} holds '
                    f'{database.num_chunks:,} chunks; build the index of this database')


def queries_of(texts: Sequence[str], index: Index, embedder: Any) -> Any:
  """Texts as `nearest_visible` takes them; `embedder` is the database's, of no use to BM25."""
  if index.method == 'bm25':
    return texts
  # Rounded as stored vectors are: a chunk of the database is at distance 0 of itself.
  return embedder.embed(texts).astype('<f2').astype(np.float32)


def merged(
    found: Sequence[tuple[np.ndarray, np.ndarray]], num_neighbors: int
) -> tuple[np.ndarray, np.ndarray]:
  """The K nearest of what several parts returned, ties by chunk id: exact."""
  ids = np.concatenate([ids for ids, _ in found], 1)
  distances = np.concatenate([distances for _, distances in found], 1)
  return padded(*nearest_first(ids, distances, num_neighbors), num_neighbors)


def neighbors_of_sequences(
    queries: ChunkDatabase,
    database: ChunkDatabase,
    index: Index,
    policy: Policy,
    chunk_ids: np.ndarray,
    num_neighbors: int,
    margin: int = 32,
) -> Neighbors:
  """The K nearest allowed chunks of each chunk of each sequence (paper, sections 2.1-2.3).

  `search_part` over all parts of `index`, merged; the arguments are the same.
  """
  found = [search_part(index.part(number), first, queries, database, policy, chunk_ids,
                       num_neighbors, margin)
           for number, (first, _) in enumerate(index.ranges())]
  return placed(chunk_ids, *merged(found, num_neighbors), policy)


def random_neighbors(
    queries: ChunkDatabase,
    database: ChunkDatabase,
    policy: Policy,
    chunk_ids: np.ndarray,
    num_neighbors: int,
    seed: int = 0,
) -> Neighbors:
  """K random allowed chunks for each chunk: the control that no retrieval should beat.

  Which ones depends on `seed`, the chunk and what is allowed, not on the other sequences in
  the call. The arguments are those of `neighbors_of_sequences`; ordered by distance too where
  there are embeddings.
  """
  real = np.argwhere(chunk_ids >= 0)
  query_ids = chunk_ids[chunk_ids >= 0]
  own = policy.own_documents(documents_of(queries, chunk_ids))[real[:, 0]]
  keys = key(seed, query_ids)
  ids = np.full((len(real), num_neighbors), -1, np.int64)
  taken = np.zeros(len(real), np.int64)
  rows, begin = np.arange(len(real)), 0
  width = 2 * num_neighbors + 4
  while len(rows) and begin < database.num_chunks:
    end = min(database.num_chunks, begin + width)
    drawn = permute(np.arange(begin, end), database.num_chunks, keys[rows, None])
    stays = policy.allowed(query_ids[rows], own[rows], drawn)
    place = taken[rows, None] + np.cumsum(stays, -1) - 1
    use = stays & (place < num_neighbors)
    ids[np.broadcast_to(rows[:, None], use.shape)[use], place[use]] = drawn[use]
    taken[rows] += use.sum(-1)
    rows = rows[taken[rows] < num_neighbors]
    begin, width = end, width * 2
  distances = np.where(ids >= 0, 0, np.inf).astype(np.float32)
  if database.embedding_dimension:
    for begin in range(0, len(ids), _SEARCH_ROWS):
      part = slice(begin, begin + _SEARCH_ROWS)
      there = ids[part] >= 0
      theirs = database.embedding(np.maximum(ids[part], 0))
      squares = np.sum((theirs - queries.embedding(query_ids[part])[:, None]) ** 2, -1)
      distances[part] = np.where(there, squares, np.inf)
  return placed(chunk_ids, *nearest_first(ids, distances, num_neighbors), policy)


def padded(ids: np.ndarray, distances: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """k columns; -1 wherever the distance is infinite."""
  spare = ((0, 0), (0, k - ids.shape[1]))
  ids = np.where(np.isinf(distances), -1, ids)
  return (np.pad(ids, spare, constant_values=-1), np.pad(distances, spare, constant_values=np.inf))


def placed(
    chunk_ids: np.ndarray, ids: np.ndarray, distances: np.ndarray, policy: Policy) -> Neighbors:
  """Rows of real chunks back in their places [s, l, K]; counts chunks and empty places."""
  real = chunk_ids >= 0
  missing = (ids < 0).sum(-1)
  policy.drops['chunks'] += len(ids)
  policy.drops['chunks_with_fewer'] += int((missing > 0).sum())
  policy.drops['empty_places'] += int(missing.sum())
  shape = chunk_ids.shape + (ids.shape[1],)
  result = Neighbors(np.full(shape, -1, np.int64), np.full(shape, np.inf, np.float32))
  result.ids[real] = ids
  result.distances[real] = distances
  return result
