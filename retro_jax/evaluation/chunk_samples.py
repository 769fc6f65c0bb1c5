"""Stored chunks with what they retrieved and what follows them, by place or as a sample.

What the inspector, the corpus report and potential.py look at. Places are numbered over all
examples of a folder: place p is chunk p % l of example p // l. Nothing is judged here.
"""

import dataclasses
import os
from collections.abc import Iterator

import numpy as np

from retro_jax.data import records
from retro_jax.errors import UserError
from retro_jax.retrieval.database import ChunkDatabase

# Examples decoded together: bounds memory, since each holds the tokens of all its neighbours.
_EXAMPLES_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Chunks:
  """p chunks; K neighbours are stored of each.

  Attributes:
    places: int64 [p].
    ids: in the store of the queries, int64 [p].
    documents: ordinals there, int64 [p].
    tokens: of the chunk C_u, int32 [p, m].
    following: of C_{u+1}, int32 [p, m]; all padding where the document ends with C_u.
    neighbor_ids: in the database, int64 [p, K], nearest first; -1 where there is none.
    distances: squared L2, float32 [p, K]; inf where there is none.
    neighbor_tokens: N, then F, int32 [p, K, 2m].
  """

  places: np.ndarray
  ids: np.ndarray
  documents: np.ndarray
  tokens: np.ndarray
  following: np.ndarray
  neighbor_ids: np.ndarray
  distances: np.ndarray
  neighbor_tokens: np.ndarray

  def __len__(self) -> int:
    return len(self.places)

  def of(self, rows: np.ndarray) -> 'Chunks':
    """Some of them: int [q] or bool [p]."""
    return Chunks(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


class StoredChunks:
  """The chunks of a folder of retrieval examples, with both stores they belong to."""

  def __init__(self, examples: str | os.PathLike, queries: str = '', database: str = ''):
    """Opens examples and stores.

    Args:
      examples: folder of the records.
      queries, database: where the stores are now; '' for where they were at the time.

    Raises:
      UserError: something is missing, or a store is not the one the examples were made from.
    """
    self.examples = records.Examples(examples)
    if self.examples.shape.scored:
      raise UserError(f'{examples}: holds questions, which are no chunks of a store; '
                      'python -m retro_jax.answer writes a page of them')
    self.queries = _store(self.examples, 'queries', queries)
    self.database = _store(self.examples, 'database', database)
    self.chunks_per_example = self.examples.shape.num_chunks
    self.num_places = len(self.examples) * self.chunks_per_example

  def read(self, places: np.ndarray) -> Chunks:
    """The chunks at `places` [p], in their order; places of padding are left out."""
    return _joined(list(self.blocks(places)))

  def blocks(self, places: np.ndarray) -> Iterator[Chunks]:
    """As `read`, some at a time: at most those of 64 different examples."""
    numbers = np.asarray(places, np.int64) // self.chunks_per_example
    # Where another example begins, in the order given.
    changes = np.flatnonzero(np.diff(numbers, prepend=-1))
    for first in range(0, len(changes), _EXAMPLES_AT_ONCE):
      begin = changes[first]
      after = first + _EXAMPLES_AT_ONCE
      end = changes[after] if after < len(changes) else len(numbers)
      yield self._block(np.asarray(places[begin:end], np.int64))
    if not len(changes):
      yield self._block(np.zeros(0, np.int64))

  def sample(self, size: int, seed: int) -> np.ndarray:
    """At most `size` different places, ascending; every chunk is equally likely."""
    size = min(size, self.num_places)
    chosen = np.random.default_rng(seed).choice(
        self.num_places, size, replace=False, shuffle=False)
    return np.sort(chosen).astype(np.int64)

  def places_of_chunks(self, ids: np.ndarray) -> np.ndarray:
    """Places of chunks of the query store; those without a place are left out.

    Examples hold chunks in ascending order, so each is found by bisection.
    """
    places = []
    for chunk in np.asarray(ids).tolist():
      low, high = 0, len(self.examples)
      while low < high:
        middle = (low + high) // 2
        if self.examples.read([middle])['chunk_ids'].max() < chunk:
          low = middle + 1
        else:
          high = middle
      if low < len(self.examples):
        there = np.flatnonzero(self.examples.read([low])['chunk_ids'][0] == chunk)
        places += (low * self.chunks_per_example + there).tolist()
    return np.array(places, np.int64)

  def _block(self, places: np.ndarray) -> Chunks:
    shape = self.examples.shape
    numbers, where = np.unique(places // self.chunks_per_example, return_inverse=True)
    rows = self.examples.read(numbers)
    at = where, places % self.chunks_per_example
    tokens = rows['tokens'].reshape(len(numbers), shape.num_chunks, shape.chunk_length)
    chunks = Chunks(
        places, rows['chunk_ids'][at], rows['documents'][at].astype(np.int64),
        tokens[at].astype(np.int32),
        np.zeros((len(places), shape.chunk_length), np.int32), rows['neighbor_ids'][at],
        rows['neighbor_distances'][at], rows['neighbor_tokens'][at].astype(np.int32))
    chunks = chunks.of(chunks.ids >= 0)
    if len(chunks):
      # From the store: an example ends in the middle of a document.
      both, _ = self.queries.with_continuation(chunks.ids)
      chunks.following[:] = both[:, shape.chunk_length:]
    return chunks


def _store(examples: records.Examples, role: str, folder: str) -> ChunkDatabase:
  """The store that the examples name as `role`, at `folder` if that is given."""
  facts = examples.manifest[role]
  store = ChunkDatabase.open(folder or facts['folder'])
  if store.fingerprint != facts['fingerprint']:
    raise UserError(f'{store.folder}: is not what {examples.folder} was made from ({role} '
                    f'{facts["fingerprint"]}, found {store.fingerprint}); name the right store or '
                    'retrieve the neighbours again')
  return store


def _joined(parts: list[Chunks]) -> Chunks:
  return Chunks(*(np.concatenate([getattr(part, field.name) for part in parts])
                  for field in dataclasses.fields(Chunks)))
