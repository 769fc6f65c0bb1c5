"""Neighbours of a chunk that has just been written: embed, search, continue (paper section 2).

The same three steps as offline (retrieval/pipeline.py), for the chunks of several texts at a
time. When a chunk is complete and what the model does with its neighbours is decided in engine.py.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from retro_jax.data.vocabulary import PAD_ID, Vocabulary
from retro_jax.errors import UserError
from retro_jax.models.config import RetroConfig
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.embedders import Embedder
from retro_jax.retrieval.search import check_of_database, nearest_visible, queries_of
from retro_jax.retrieval.sharded_index import Index

# Given the name of a part of the work, the context to do it in; to take its time.
Watch = Callable[[str], contextlib.AbstractContextManager]


def _unwatched(part: str) -> contextlib.AbstractContextManager:
  del part
  return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class FoundNeighbors:
  """RET(C) of one chunk, nearest first.

  Attributes:
    ids: chunks of the database, int64 [k]; -1 where there is none.
    distances: squared L2 between embeddings, float32 [k]; inf where there is none.
    tokens: int32 [k, r], each neighbour and its continuation in its document, 0 for padding.
    lengths: int32 [k], tokens that are not padding; 0 where there is none.
  """

  ids: np.ndarray
  distances: np.ndarray
  tokens: np.ndarray
  lengths: np.ndarray

  def nearest(self, count: int) -> 'FoundNeighbors':
    """The first `count` of them; the others are none, so that shapes stay."""
    kept = np.arange(len(self.ids)) < count
    return FoundNeighbors(np.where(kept, self.ids, -1), np.where(kept, self.distances, np.inf),
                          np.where(kept[:, None], self.tokens, PAD_ID),
                          np.where(kept, self.lengths, 0))


class LiveRetriever:
  """Finds the neighbours of new chunks in a finished database.

  Attributes:
    database: that is searched.
    chunk_length: m of the database.
    num_neighbors: k.
    vocabulary_fingerprint: of the token ids of the database.
  """

  def __init__(self, database: ChunkDatabase, index: Index, embedder: Embedder,
               vocabulary: Vocabulary, num_neighbors: int):
    """Puts the parts together.

    Raises:
      UserError: the embedder or the vocabulary is not the one the database was built with, the
        index holds another number of vectors, or `num_neighbors` is less than 1.
    """
    if num_neighbors < 1:
      raise UserError(f'num_neighbors is {num_neighbors}, expected at least 1; '
                      'to read no neighbours, turn retrieval off')
    if database.vocabulary_fingerprint != vocabulary.fingerprint:
      raise UserError(
          f'{database.folder} was built with vocabulary {database.vocabulary_fingerprint}, but '
          f'{vocabulary.path} is {vocabulary.fingerprint}; give the vocabulary of the database')
    if database.embedder_fingerprint != embedder.fingerprint:
      built = _kind(database.manifest['embedder'])
      raise UserError(
          f'{database.folder} was built with embedder {built} {database.embedder_fingerprint}, '
          f'but chunks would be embedded by {embedder.describe().get("kind")} '
          f'{embedder.fingerprint}; choose the embedder of the database')
    check_of_database(index, database)
    self.database = database
    self.chunk_length = database.chunk_length
    self.num_neighbors = num_neighbors
    self.vocabulary_fingerprint = vocabulary.fingerprint
    self._index, self._embedder, self._vocabulary = index, embedder, vocabulary

  def check_fit(self, config: RetroConfig) -> None:
    """Refuses, with a `UserError`, a model that cannot read what is found here."""
    folder = self.database.folder
    if not config.has_retrieval:
      raise UserError('the model has no layers that read neighbours (a baseline); '
                      'turn retrieval off or give a RETRO model')
    if self.chunk_length != config.chunk_length:
      raise UserError(f'{folder} holds chunks of {self.chunk_length} tokens, but the model '
                      f'works with {config.chunk_length}; use a database of that chunk length')
    if config.retrieved_length != 2 * config.chunk_length:
      raise UserError(f'the model reads {config.retrieved_length} tokens of each neighbour, but '
                      f'{folder} gives {2 * config.chunk_length} (chunk and continuation); '
                      'use a model with retrieved_length = 2 chunk_length')

  def warm_up(self, chunks: int) -> None:
    """Compiles what `neighbors_of` up to so many chunks needs, which else its first calls do."""
    self._embedder.warm_up(chunks)

  def neighbors(self, chunk_tokens: np.ndarray) -> FoundNeighbors:
    """`neighbors_of` one chunk [m]."""
    return self.neighbors_of(np.asarray(chunk_tokens)[None])[0]

  def neighbors_of(self, chunks: np.ndarray, watch: Watch = _unwatched) -> list[FoundNeighbors]:
    """The k nearest chunks of the database to each of several, with their continuations.

    Only removed documents are filtered: text that is being written belongs to no document yet.

    Args:
      chunks: int [q, m]; padding, before or after the tokens, stands for no text.
      watch: makes a context for each of the parts 'embed', 'search' and 'neighbour tokens'.

    Raises:
      UserError: the chunks have another length than those of the database.
    """
    chunks = np.asarray(chunks)
    if chunks.shape[1:] != (self.chunk_length,):
      raise UserError(f'a chunk of shape {list(chunks.shape[1:])} was asked for neighbours, but '
                      f'{self.database.folder} holds chunks of {self.chunk_length} tokens; '
                      'use a model of that chunk length')
    with watch('embed'):
      texts = [self._vocabulary.decode(row) for row in chunks.tolist()]
      query = queries_of(texts, self._index, self._embedder)
    with watch('search'):
      ids, distances = nearest_visible(self._index, query, self.num_neighbors)
    with watch('neighbour tokens'):
      return [FoundNeighbors(*row, *self.database.with_continuation(row[0]))
              for row in zip(ids, distances)]


def _kind(described: dict[str, Any] | None) -> str:
  """'bert', 'lexical', ... of a database's manifest."""
  return described['description'].get('kind', '?') if described else 'no'
