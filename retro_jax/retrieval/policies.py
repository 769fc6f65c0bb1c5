"""Which chunks of the database a training chunk may see, and how many were turned away.

Nothing of any document packed in the query's sequence is allowed, matched by document id,
because query and database may be the same store or two. A deny-list forbids further ones.
"""

import collections
import dataclasses
from pathlib import Path

import numpy as np

from retro_jax import storage
from retro_jax.errors import UserError
from retro_jax.retrieval.database import ChunkDatabase


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """What is not allowed.

  Attributes:
    deny_documents: ids of database documents that nobody may retrieve.
    deny_file: a text file with one more such id a line, '' for none.
    exclude_query_documents: drop every document of the query sequence; False shows what a
      leak does and is good for nothing else.
  """

  deny_documents: tuple[str, ...] = ()
  deny_file: str = ''
  exclude_query_documents: bool = True


class Policy:
  """`PolicyConfig` applied to one pair of stores.

  Attributes:
    drops: how many candidates were turned away, by reason.
    description: what the stored neighbours depend on, for their manifest.
  """

  def __init__(self, config: PolicyConfig, queries: ChunkDatabase, database: ChunkDatabase):
    """Looks up every id.

    Raises:
      UserError: the deny-list file is missing.
    """
    self.config = config
    self.drops: collections.Counter[str] = collections.Counter()
    self.description = describe(config)
    self._denied = np.zeros(database.num_documents, bool)
    for document in denied_documents(config):
      ordinal = database.ordinal_of(document)
      if ordinal is not None:
        self._denied[ordinal] = True
    ordinals = [database.ordinal_of(document) for document in queries.document_ids]
    self._of_query = np.array([-1 if o is None else o for o in ordinals], np.int64)
    self._database = database

  @property
  def num_denied(self) -> int:
    """Documents of the database that are on the deny-list."""
    return int(self._denied.sum())

  def own_documents(self, documents: np.ndarray) -> np.ndarray:
    """Where the documents of query sequences are in the database.

    Args:
      documents: ordinals in the query store, int [s, l]; -1 where there is no chunk.

    Returns:
      ordinals in the database, int64 [s, l]; -1 where the database has no such document.
    """
    if not self.config.exclude_query_documents:
      return np.full(documents.shape, -1, np.int64)
    return np.where(documents >= 0, self._of_query[np.maximum(documents, 0)], -1)

  def allowed(self, ids: np.ndarray, own: np.ndarray, count: bool = True) -> np.ndarray:
    """Which candidates may stay.

    Args:
      ids: candidate chunks, int64 [s, l, c]; -1 is never allowed.
      own: `own_documents` of the sequences, int64 [s, l].
      count: whether what is turned away enters `drops`.

    Returns:
      bool [s, l, c].
    """
    there = ids >= 0
    documents = np.full(ids.shape, -2, np.int64)
    documents[there] = self._database.document(ids[there])
    same = np.any(documents[..., None] == own[:, None, None, :], -1)
    denied = there & self._denied[np.maximum(documents, 0)] & ~same
    if count:
      self.drops['same_document'] += int(same.sum())
      self.drops['deny_list'] += int(denied.sum())
    return there & ~same & ~denied

  def forbidden_in(self, first: int, size: int, own: np.ndarray) -> np.ndarray:
    """Which of the chunks [first, first + size) each row may not see.

    Args:
      first: a chunk id.
      size: how many.
      own: database ordinals of the row's own documents, int64 [q, l], -1 for none.

    Returns:
      bool [q, size].
    """
    starts = self._database.document_starts
    documents = self._database.document(np.arange(first, first + size))
    result = np.broadcast_to(self._denied[documents], (len(own), size)).copy()
    for row, ordinals in enumerate(own):
      for ordinal in np.unique(ordinals[ordinals >= 0]):
        begin, end = np.clip(starts[ordinal:ordinal + 2] - first, 0, size)
        result[row, begin:end] = True
    return result


def denied_documents(config: PolicyConfig) -> list[str]:
  """All ids on the deny-list.

  Raises:
    UserError: the file is missing.
  """
  result = list(config.deny_documents)
  if config.deny_file:
    try:
      result += Path(config.deny_file).read_text(encoding='utf-8').splitlines()
    except OSError as error:
      raise UserError(f'{config.deny_file}: cannot read the deny-list ({error.strerror}); '
                      "name a text file with one document id a line, or ''") from None
  return result


def describe(config: PolicyConfig) -> dict[str, object]:
  """JSON that changes when other neighbours would be allowed."""
  return {'exclude_query_documents': config.exclude_query_documents,
          'deny_list': storage.fingerprint(sorted(set(denied_documents(config))))}
