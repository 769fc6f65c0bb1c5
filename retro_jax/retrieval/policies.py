"""Which chunks of the database a query chunk may see, and how many were turned away.

Nothing of any document packed in the query's sequence is allowed. Further rules: removed
documents, a deny-list, near-duplicates (of chunks or of whole documents), cut-offs in time
and a share of the database. How alike two texts are is measured in overlap.py and
near_documents.py, when a document was written in document_dates.py; here it is decided what
follows.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from retro_jax import files, storage
from retro_jax.data.permutation import key
from retro_jax.errors import UserError
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.document_dates import UNDATED, Moments, dates_of, read_date
from retro_jax.retrieval.overlap import longest_common_substring

# Candidates whose tokens are compared with their query's at a time.
_PAIRS_AT_ONCE = 32768
_FRACTION = 4


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """What is not allowed.

  Attributes:
    deny_documents: ids of database documents that nobody may retrieve.
    deny_file: a text file with one more such id a line, '' for none.
    exclude_query_documents: drop every document of the query sequence; False shows what a
      leak does and is good for nothing else.
    near_duplicate_chunks: drop a neighbour whose [N, F] shares s consecutive tokens with the
      query chunk where s / m is above this (paper, section 2.6); 0 is off.
    near_duplicate_documents: drop documents whose 13-gram Jaccard similarity with any document
      of the query sequence is at least this (section 2.1 uses 0.8); 0 is off.
    date_field: the metadata field with the date of a document (`document_dates.read_date` says
      in which forms), '' for none.
    latest: drop documents dated after this date, '' for no such cut-off. '2015' allows the
      whole year.
    earlier_than_query: allow only documents dated strictly before the query's document.
    database_fraction: allow only this share of the database's documents, drawn by a hash of
      their place, so that a smaller share lies inside a larger one; 1 is all.

  While there is a cut-off, documents without a readable date are dropped too, and a query
  without one gets no neighbours when they have to be earlier. A date that is a period counts
  as its end in a neighbour and as its beginning in a query.
  """

  deny_documents: tuple[str, ...] = ()
  deny_file: str = ''
  exclude_query_documents: bool = True
  near_duplicate_chunks: float = 0.0
  near_duplicate_documents: float = 0.0
  date_field: str = ''
  latest: str = ''
  earlier_than_query: bool = False
  database_fraction: float = 1.0

  def __post_init__(self):
    if isinstance(self.deny_documents, str):
      raise UserError(f'deny_documents is the text {self.deny_documents!r}; '
                      'expected a list of document ids')
    if not 0 <= self.near_duplicate_chunks < 1:
      raise UserError(f'near_duplicate_chunks is {self.near_duplicate_chunks}; expected a share '
                      'of the chunk from 0 (off) to below 1')
    if not 0 <= self.near_duplicate_documents <= 1:
      raise UserError(f'near_duplicate_documents is {self.near_duplicate_documents}; expected a '
                      'Jaccard similarity from 0 (off) to 1')
    if not 0 < self.database_fraction <= 1:
      raise UserError(f'database_fraction is {self.database_fraction}; expected a share of the '
                      'documents above 0, up to 1')
    if (self.latest or self.earlier_than_query) and not self.date_field:
      raise UserError('latest and earlier_than_query compare dates; set date_field to the '
                      'metadata field that has them')
    if self.latest and read_date(self.latest) is None:
      raise UserError(f'latest is {self.latest!r}; expected an ISO 8601 date like 2015-03-01')

  @property
  def last_moment(self) -> Moments | None:
    """`latest`, read."""
    return read_date(self.latest) if self.latest else None


@dataclasses.dataclass(frozen=True)
class Own:
  """Documents of the database that rows may not see because of what the rows are.

  Attributes:
    same: the documents of the query sequence, ordinals int64 [rows, x], -1 for none.
    near: near-duplicates of them, int64 [rows, y], -1 for none.
  """

  same: np.ndarray
  near: np.ndarray

  def __len__(self) -> int:
    return len(self.same)

  def __getitem__(self, rows: Any) -> 'Own':
    """Some of the rows: a slice, a mask, or numbers, which may repeat."""
    return Own(self.same[rows], self.near[rows])


class Policy:
  """`PolicyConfig` applied to one pair of stores.

  Attributes:
    drops: how many candidates were turned away, by reason.
    description: what the stored neighbours depend on, for their manifest. Removed documents
      are not in it: they are part of the database's fingerprint.
  """

  def __init__(self, config: PolicyConfig, queries: ChunkDatabase, database: ChunkDatabase,
               near_documents: np.ndarray | None = None):
    """Looks up what is denied; everything else when it is asked for.

    Args:
      config: the settings.
      queries: the store of the query chunks.
      database: the store that is searched.
      near_documents: int64 [p, 2] pairs (query ordinal, database ordinal), as
        `near_documents.near_document_pairs` finds them at `config.near_duplicate_documents`.

    Raises:
      UserError: the deny-list file is missing, or near_documents is and the config needs it.
    """
    if config.near_duplicate_documents and near_documents is None:
      raise UserError('near_duplicate_documents is set but the pairs of near-duplicate documents '
                      'were not given; compute them with near_document_pairs')
    self.config = config
    self.drops: collections.Counter[str] = collections.Counter()
    self.description = describe(config)
    self._queries, self._database = queries, database
    ordinals = {database.ordinal_of(document) for document in denied_documents(config)}
    self._denied = np.array(sorted(ordinals - {None}), np.int64)
    pairs = np.zeros((0, 2), np.int64)
    if config.near_duplicate_documents:
      pairs = np.asarray(near_documents, np.int64).reshape(-1, 2)
    self._near = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    self._same_store = (queries.folder == database.folder and
                        queries.fingerprint == database.fingerprint)
    self._in_database = functools.lru_cache(1 << 16)(self._look_up)

  @property
  def num_denied(self) -> int:
    """Documents of the database that are on the deny-list."""
    return len(self._denied)

  def own_documents(self, documents: np.ndarray) -> Own:
    """What query sequences may not see because of the documents in them.

    Args:
      documents: ordinals in the query store, int [s, l]; -1 where there is no chunk.

    Returns:
      one row a sequence.
    """
    present, places = np.unique(documents, return_inverse=True)
    if not self.config.exclude_query_documents:
      same = np.full(documents.shape, -1, np.int64)
    elif self._same_store:
      same = documents.astype(np.int64)
    else:
      found = [self._in_database(int(ordinal)) for ordinal in present]
      same = np.array(found, np.int64)[places].reshape(documents.shape)
    return Own(same, self._near_rows(documents))

  def allowed(self, query_chunks: np.ndarray, own: Own, ids: np.ndarray,
              count: bool = True) -> np.ndarray:
    """Which candidates may stay.

    Args:
      query_chunks: chunks of the query store, int64 [q].
      own: `own_documents` of the sequence of each, [q].
      ids: candidate chunks of the database, int64 [q, c]; -1 is never allowed.
      count: whether what is turned away enters `drops`, each under its first reason.

    Returns:
      bool [q, c].
    """
    stays = ids >= 0
    documents = np.full(ids.shape, -1, np.int64)
    documents[stays] = self._database.document(ids[stays])
    members = [_pairs_in(documents, ordinals) for ordinals in (own.same, own.near)]
    for reason, forbidden in self._reasons(query_chunks, members, documents):
      forbidden = forbidden & stays
      stays &= ~forbidden
      if count:
        self.drops[reason] += int(forbidden.sum())
    if self.config.near_duplicate_chunks:
      before = int(stays.sum())
      stays[stays] = ~self._near_duplicates(query_chunks, ids, stays)
      if count:
        self.drops['near_duplicate'] += before - int(stays.sum())
    return stays

  def forbidden_in(self, first: int, size: int, query_chunks: np.ndarray,
                   own: Own) -> np.ndarray:
    """Which of the chunks [first, first + size) each row may not see, for exact scans.

    By every reason but near-duplicate chunks, which would mean comparing the tokens of every
    chunk with every query; `allowed` has the last word on what a scan finds.

    Args:
      first: a chunk id of the database.
      size: how many.
      query_chunks: chunks of the query store, int64 [q].
      own: `own_documents` of the sequence of each, [q].

    Returns:
      bool [q, size].
    """
    documents = self._database.document(np.arange(first, first + size)).astype(np.int64)
    members = [_ranges_in(documents, ordinals) for ordinals in (own.same, own.near)]
    result = np.zeros((len(own), size), bool)
    for _, forbidden in self._reasons(query_chunks, members, documents[None]):
      result |= forbidden
    return result

  def _reasons(self, query_chunks: np.ndarray, members: list[np.ndarray],
               documents: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(reason, bool broadcastable to [q, c]) in the order in which they count.

    Args:
      query_chunks: int64 [q].
      members: bool [q, c], whether a candidate is of `Own.same`, and of `Own.near`.
      documents: the document of each candidate, int64 [q or 1, c]; -1 for none.
    """
    yield 'same_document', members[0]
    yield 'near_duplicate_document', members[1]
    yield 'removed', _in_sorted(documents, self._database.removed)
    yield 'deny_list', _in_sorted(documents, self._denied)
    config = self.config
    if config.database_fraction < 1:
      yield 'outside_fraction', ~in_fraction(documents, config.database_fraction)
    if not (config.latest or config.earlier_than_query):
      return
    dates = dates_of(self._database, config.date_field)(np.maximum(documents, 0))
    last = dates[..., 1]
    undated, too_late = last == UNDATED, np.zeros(last.shape, bool)
    if config.latest:
      too_late = last > config.last_moment.last
    if config.earlier_than_query:
      of_query = self._queries.document(query_chunks)
      begin = dates_of(self._queries, config.date_field)(of_query)[:, :1]
      undated, too_late = undated | (begin == UNDATED), too_late | (last >= begin)
    yield 'undated', undated
    yield 'too_late', too_late

  def _near_duplicates(
      self, query_chunks: np.ndarray, ids: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Whether each candidate in `which` repeats its query chunk: bool [which.sum()]."""
    rows, columns = np.nonzero(which)
    result = np.zeros(len(rows), bool)
    for first in range(0, len(rows), _PAIRS_AT_ONCE):
      block = slice(first, first + _PAIRS_AT_ONCE)
      shared = longest_common_substring(
          self._queries.tokens(query_chunks[rows[block]]),
          self._database.with_continuation(ids[rows[block], columns[block]])[0])
      result[block] = shared / self._queries.chunk_length > self.config.near_duplicate_chunks
    return result

  def _near_rows(self, documents: np.ndarray) -> np.ndarray:
    """Near-duplicates of any document of each row: int64 [s, y], padded with -1."""
    sequence = np.repeat(np.arange(len(documents)), documents.shape[1])
    owners = np.unique(np.stack([sequence, documents.reshape(-1)], 1), axis=0)
    first = np.searchsorted(self._near[:, 0], owners[:, 1], 'left')
    count = np.searchsorted(self._near[:, 0], owners[:, 1], 'right') - first
    # The places first, first + 1, ... of every owner, one after the other.
    places = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
    found = np.unique(np.stack([np.repeat(owners[:, 0], count), self._near[places, 1]], 1), axis=0)
    by_row = np.bincount(found[:, 0], minlength=len(documents))
    result = np.full((len(documents), by_row.max(initial=0)), -1, np.int64)
    result[np.arange(result.shape[1]) < by_row[:, None]] = found[:, 1]
    return result

  def _look_up(self, ordinal: int) -> int:
    """A document of the query store in the database, -1 where it is not there."""
    if ordinal < 0:
      return -1
    found = self._database.ordinal_of(self._queries.document_info(ordinal)['id'])
    return -1 if found is None else found


def in_fraction(documents: np.ndarray, fraction: float) -> np.ndarray:
  """Whether documents, by ordinal, belong to a share of a database; bool of their shape."""
  return key(_FRACTION, documents) < np.uint64(min(fraction * 2.0**64, 2.0**64 - 2048))


def _in_sorted(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
  """Whether each value is in `ascending`; bool of the shape of `values`."""
  if not len(ascending):
    return np.zeros(values.shape, bool)
  places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
  return ascending[places] == values


def _pairs_in(documents: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
  """Whether documents[i, j] is one of ordinals[i], both int64; bool [q, c].

  By sorting, since [q, c, x] comparisons may be many.
  """
  there = ordinals >= 0
  # A number for each pair (row, document); no document is -1, so rows do not touch.
  width = max(documents.max(initial=0), ordinals.max(initial=0)) + 2
  row = np.arange(len(documents))[:, None] * width
  return _in_sorted(documents + row, np.unique((ordinals + row)[there]))


def _ranges_in(documents: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
  """Whether documents[j] is one of ordinals[i], for ascending documents [c]; bool [q, c]."""
  begin = np.searchsorted(documents, ordinals, 'left')
  end = np.searchsorted(documents, ordinals, 'right')
  result = np.zeros((len(ordinals), len(documents)), bool)
  # Few of a row's documents are in one block of the database, whatever their number.
  for row, column in np.argwhere(begin < end):
    result[row, begin[row, column]:end[row, column]] = True
  return result


def denied_documents(config: PolicyConfig) -> list[str]:
  """All ids on the deny-list.

  Raises:
    UserError: the file cannot be read or is not UTF-8.
  """
  result = list(config.deny_documents)
  if config.deny_file:
    try:
      text = files.read_bytes(config.deny_file).decode('utf-8-sig')
    except UserError as error:
      raise UserError(f"deny_file: {error}, or use '' for none") from None
    except UnicodeDecodeError:
      raise UserError(f'deny_file: {config.deny_file} is not UTF-8; '
                      'expected text with one document id a line') from None
    result += [line.rstrip('\r') for line in text.split('\n') if line.strip()]
  return result


def describe(config: PolicyConfig) -> dict[str, Any]:
  """JSON that changes when other neighbours would be allowed."""
  settings = dataclasses.asdict(config)
  del settings['deny_documents'], settings['deny_file']
  if config.database_fraction == 1:
    del settings['database_fraction']  # examples made before it could be set stay current
  return {**settings, 'deny_list': storage.fingerprint(sorted(set(denied_documents(config))))}
