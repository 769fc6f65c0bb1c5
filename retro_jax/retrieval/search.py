"""Neighbours of the chunks of training sequences: over-retrieve, filter, keep K.

Also the control: K random allowed chunks in the same form. What is allowed is decided in
policies.py; writing the result to disk is data/records.py.
"""

import dataclasses

import numpy as np

from retro_jax.data.permutation import key, permute
from retro_jax.errors import UserError
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.index import Index, exact_search, nearest_first
from retro_jax.retrieval.policies import Policy

_EXACT_ROWS = 256
_WIDER = 8


@dataclasses.dataclass(frozen=True)
class Neighbors:
  """Neighbours of s sequences of l chunks.

  Attributes:
    ids: chunks of the database, int64 [s, l, K], nearest first; -1 where there is none.
    distances: squared L2, float32 [s, l, K]; inf where there is none.
  """

  ids: np.ndarray
  distances: np.ndarray


def sequence_chunk_ids(num_chunks: int, chunks_per_sequence: int) -> np.ndarray:
  """Chunks of each training sequence: consecutive ones, int64 [s, l], -1 after the last."""
  count = -(-num_chunks // chunks_per_sequence)
  ids = np.arange(count * chunks_per_sequence, dtype=np.int64)
  return np.where(ids < num_chunks, ids, -1).reshape(count, chunks_per_sequence)


def documents_of(queries: ChunkDatabase, chunk_ids: np.ndarray) -> np.ndarray:
  """Ordinals in the query store, int32, of chunks of any shape; -1 where there is none."""
  result = np.full(chunk_ids.shape, -1, np.int32)
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

  Asks the index for K + margin; chunks that keep fewer than K ask for more, and in the end
  every chunk of the database is looked at, so that a place stays empty only when no allowed
  chunk is left. `policy.drops` counts what happened.

  Args:
    queries: the store of the sequences.
    database: the store that is searched, described by `index`.
    index: over the embeddings of `database`.
    policy: made for these two stores.
    chunk_ids: chunks of the query store, int64 [s, l]; -1 is padding. All chunks of a
      sequence must be there, since its documents are forbidden to all of them.
    num_neighbors: K.
    margin: candidates beyond K in the first search.
  """
  own = policy.own_documents(documents_of(queries, chunk_ids))
  real = np.argwhere(chunk_ids >= 0)
  vectors = queries.embedding(chunk_ids[chunk_ids >= 0])
  ids = np.full((len(real), num_neighbors), -1, np.int64)
  distances = np.full(ids.shape, np.inf, np.float32)
  policy.drops['chunks'] += len(real)

  def search(rows: np.ndarray, k: int, effort: int, count: bool) -> np.ndarray:
    found, found_distances = index.search(vectors[rows], k, effort)
    stays = policy.allowed(found[:, None], own[real[rows, 0]], count)[:, 0]
    ids[rows], distances[rows] = _padded(
        *nearest_first(np.where(stays, found, -1), found_distances, num_neighbors), num_neighbors)
    return rows[stays.sum(-1) < num_neighbors]

  width = num_neighbors + margin
  lacking = search(np.arange(len(real)), width, 1, True)
  if width >= database.num_chunks and index.kind == 'exact':
    lacking = lacking[:0]
  if len(lacking) and index.kind != 'exact':
    policy.drops['searched_wider'] += len(lacking)
    lacking = search(lacking, min(database.num_chunks, width * _WIDER), 4, False)
  policy.drops['searched_exactly'] += len(lacking)
  for first in range(0, len(lacking), _EXACT_ROWS):
    rows = lacking[first:first + _EXACT_ROWS]
    theirs = own[real[rows, 0]]
    ids[rows], distances[rows] = exact_search(
        vectors[rows], database.embedding_blocks(16384), num_neighbors,
        lambda block, theirs=theirs: policy.forbidden_in(int(block[0]), len(block), theirs))
  return _placed(chunk_ids, real, ids, distances, policy)


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
  the call. The arguments are those of `neighbors_of_sequences`; ordered by distance too.
  """
  own = policy.own_documents(documents_of(queries, chunk_ids))
  real = np.argwhere(chunk_ids >= 0)
  keys = key(seed, chunk_ids[chunk_ids >= 0])
  ids = np.full((len(real), num_neighbors), -1, np.int64)
  taken = np.zeros(len(real), np.int64)
  policy.drops['chunks'] += len(real)
  rows, begin = np.arange(len(real)), 0
  width = 2 * num_neighbors + 4
  while len(rows) and begin < database.num_chunks:
    end = min(database.num_chunks, begin + width)
    drawn = permute(np.arange(begin, end), database.num_chunks, keys[rows, None])
    stays = policy.allowed(drawn[:, None], own[real[rows, 0]])[:, 0]
    place = taken[rows, None] + np.cumsum(stays, -1) - 1
    use = stays & (place < num_neighbors)
    ids[np.broadcast_to(rows[:, None], use.shape)[use], place[use]] = drawn[use]
    taken[rows] += use.sum(-1)
    rows = rows[taken[rows] < num_neighbors]
    begin, width = end, width * 2
  distances = np.full(ids.shape, np.inf, np.float32)
  vectors = queries.embedding(chunk_ids[chunk_ids >= 0])
  for row, found in enumerate(ids):
    there = found >= 0
    distances[row, there] = np.sum((database.embedding(found[there]) - vectors[row]) ** 2, -1)
  return _placed(chunk_ids, real, *nearest_first(ids, distances, num_neighbors), policy)


def _padded(ids: np.ndarray, distances: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  spare = ((0, 0), (0, k - ids.shape[1]))
  ids = np.where(np.isinf(distances), -1, ids)
  return (np.pad(ids, spare, constant_values=-1), np.pad(distances, spare, constant_values=np.inf))


def _placed(
    chunk_ids: np.ndarray, real: np.ndarray, ids: np.ndarray, distances: np.ndarray,
    policy: Policy) -> Neighbors:
  """Rows of real chunks back in their places [s, l, K]; counts the empty ones."""
  missing = (ids < 0).sum(-1)
  policy.drops['chunks_with_fewer'] += int((missing > 0).sum())
  policy.drops['empty_places'] += int(missing.sum())
  shape = chunk_ids.shape + (ids.shape[1],)
  result = Neighbors(np.full(shape, -1, np.int64), np.full(shape, np.inf, np.float32))
  result.ids[real[:, 0], real[:, 1]] = ids
  result.distances[real[:, 0], real[:, 1]] = distances
  return result
