"""Which chunks a person looks at, and what their neighbours have in common with them.

Chunks of stored examples are chosen here, typed text is retrieved for, and both become the
same description. How it looks in a terminal or on a page is inspection_views.py's business.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from retro_jax.data.vocabulary import PAD_ID, Vocabulary
from retro_jax.errors import UserError, nearest
from retro_jax.evaluation.chunk_samples import Chunks, StoredChunks
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.overlap import (
  common_substring_spans,
  longest_common_prefix,
  longest_common_substring,
)

# Shorter common runs of tokens are chance (spaces, brackets, frequent words).
SHORTEST_RUN = 3
_CHOICES = ('random', 'most', 'least')


@dataclasses.dataclass(frozen=True)
class Selection:
  """Which chunks to look at; `chunks` goes before `document`, that before `choose`.

  Attributes:
    chunks: pairs (number of the example, number of the chunk in it), both from 0.
    document: id of a document of the queries: its first chunks.
    choose: 'random', or the 'most' or 'least' overlapping: by the longest run of tokens that
      the next chunk shares with one of the neighbours, within a sample.
    count: how many chunks.
    seed: of the random choice and of the sample.
    sample: chunks among which the most or least overlapping are found.
  """

  chunks: tuple[tuple[int, int], ...] = ()
  document: str = ''
  choose: str = 'random'
  count: int = 5
  seed: int = 0
  sample: int = 2048

  def __post_init__(self):
    if self.choose not in _CHOICES:
      raise UserError(f'choose is {self.choose!r}{nearest(str(self.choose), _CHOICES)}; expected '
                      "'random', 'most' or 'least'")
    if self.count < 1 or self.sample < 1:
      raise UserError(f'count is {self.count} and sample {self.sample}, expected at least 1')


@dataclasses.dataclass(frozen=True)
class Shared:
  """What a neighbour has in common with a chunk, in tokens.

  Attributes:
    prefix: with how many equal tokens both begin.
    run: length of the longest common run.
    at: where the run begins in [N, F].
    of: where it begins in the chunk.
  """

  prefix: int
  run: int
  at: int
  of: int


@dataclasses.dataclass(frozen=True)
class InspectedNeighbor:
  """One neighbour of a chunk.

  Attributes:
    place: 1 for the nearest.
    distance: as it is stored.
    title, document: of its document, and the id of that.
    number, of: which chunk of its document it is, from 1, and of how many.
    tokens: N, then F, int32 [2m].
    asked: common with C_u; the prefix is that of N.
    next: common with C_{u+1}; the prefix is that of F.
    flags: what a person should notice.
  """

  place: int
  distance: float
  title: str
  document: str
  number: int
  of: int
  tokens: np.ndarray
  asked: Shared
  next: Shared
  flags: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class InspectedChunk:
  """One chunk C_u with what it retrieved.

  Attributes:
    where: which chunk this is, in words.
    title, document: of its document.
    tokens, following: C_u and C_{u+1}, int32 [m]; the latter all padding where there is none.
    neighbors: nearest first.
    flags: what a person should notice.
  """

  where: str
  title: str
  document: str
  tokens: np.ndarray
  following: np.ndarray
  neighbors: tuple[InspectedNeighbor, ...]
  flags: tuple[str, ...]


def choose(stored: StoredChunks, selection: Selection, num_neighbors: int) -> np.ndarray:
  """Places of the chunks that `selection` means, int64.

  Raises:
    UserError: there is no such example, chunk or document.
  """
  if selection.chunks:
    return _numbered(stored, selection.chunks)
  if selection.document:
    ordinal = stored.queries.ordinal_of(selection.document)
    if ordinal is None:
      raise UserError(f'{stored.queries.folder}: holds no document {selection.document!r}; '
                      'give the id of one of its documents')
    first, last = stored.queries.document_starts[ordinal:ordinal + 2]
    return stored.places_of_chunks(np.arange(first, min(last, first + selection.count)))
  if selection.choose == 'random':
    # A margin, because places of padding hold no chunk.
    places = stored.sample(selection.count + stored.chunks_per_example, selection.seed)
    chosen = stored.read(places).places
    order = np.random.default_rng(selection.seed).permutation(len(chosen))[:selection.count]
    return np.sort(chosen[order])
  places, overlap = [], []
  for chunks in stored.blocks(stored.sample(selection.sample, selection.seed)):
    chunks = chunks.of(chunks.following[:, 0] != PAD_ID)
    places.append(chunks.places)
    overlap.append(longest_common_substring(
        chunks.following, chunks.neighbor_tokens[:, :num_neighbors]).max(-1, initial=0))
  sign = -1 if selection.choose == 'most' else 1
  order = np.lexsort((np.concatenate(places), sign * np.concatenate(overlap)))
  return np.concatenate(places)[order[:selection.count]]


def _numbered(stored: StoredChunks, chunks: Sequence[tuple[int, int]]) -> np.ndarray:
  examples, l = len(stored.examples), stored.chunks_per_example
  for pair in chunks:
    if (not isinstance(pair, tuple) or len(pair) != 2 or not 0 <= pair[0] < examples
        or not 0 <= pair[1] < l):
      raise UserError(
          f'{stored.examples.folder}: no chunk {pair!r}; expected pairs (example, chunk) with '
          f'examples 0 to {examples - 1} and chunks 0 to {l - 1}')
  return np.array([example * l + chunk for example, chunk in chunks], np.int64)


def inspect_stored(stored: StoredChunks, places: np.ndarray, num_neighbors: int,
                   near_duplicate: float) -> list[InspectedChunk]:
  """Describes chunks of examples; see `_inspected`."""
  chunks = stored.read(places)
  owners = []
  for place, chunk, ordinal in zip(
      chunks.places.tolist(), chunks.ids.tolist(), chunks.documents.tolist()):
    info = stored.queries.document_info(ordinal)
    example, u = divmod(place, stored.chunks_per_example)
    owners.append((f'example {example}, chunk {u}: chunk {chunk - info["first_chunk"] + 1} of '
                   f'{info["num_chunks"]}', info['title'], info['id']))
  return _inspected(chunks, owners, stored.database, num_neighbors, near_duplicate)


def inspect_text(text: str, retriever: Any, vocabulary: Vocabulary, near_duplicate: float
                 ) -> list[InspectedChunk]:
  """Retrieves for typed text, cut into chunks as a document would be.

  Args:
    text: what was typed; a last piece shorter than a chunk is padded.
    retriever: a `LiveRetriever`.
    vocabulary: of the database.
    near_duplicate: see `_inspected`.

  Raises:
    UserError: there is nothing in the text.
  """
  m, tokens = retriever.chunk_length, vocabulary.encode(text)
  if not tokens:
    raise UserError('the text is empty; give some words to retrieve for')
  count = -(-len(tokens) // m)
  rows = np.full((count + 1, m), PAD_ID, np.int32)  # nothing follows the last chunk
  rows.reshape(-1)[:len(tokens)] = tokens
  found = [retriever.neighbors(row) for row in rows[:count]]
  stack = lambda name: np.stack([getattr(neighbors, name) for neighbors in found])
  none = np.full(count, -1, np.int64)
  chunks = Chunks(none, none, none, rows[:count], rows[1:], stack('ids'), stack('distances'),
                  stack('tokens'))
  owners = [(f'chunk {u} of {count}', 'typed text', '') for u in range(1, count + 1)]
  return _inspected(chunks, owners, retriever.database, retriever.num_neighbors, near_duplicate)


def _inspected(chunks: Chunks, owners: Sequence[tuple[str, str, str]], database: ChunkDatabase,
               num_neighbors: int, near_duplicate: float) -> list[InspectedChunk]:
  """Describes chunks beside their first neighbours.

  Args:
    chunks: p of them.
    owners: for each (where it is, title and id of its document).
    database: that the neighbours are of.
    num_neighbors: how many to show.
    near_duplicate: a neighbour is called a near-duplicate when [N, F] shares a run of more
      than this share of m with C_u (paper, section 2.6).
  """
  m = chunks.tokens.shape[1]
  theirs = chunks.neighbor_tokens[:, :num_neighbors]
  shared = []
  for ours, begin in ((chunks.tokens, theirs[..., :m]), (chunks.following, theirs[..., m:])):
    spans = common_substring_spans(ours, theirs)
    shared.append(np.stack([longest_common_prefix(ours, begin), spans.lengths, spans.b_starts,
                            spans.a_starts], -1))
  result = []
  for row, (where, title, document) in enumerate(owners):
    neighbors = []
    for place, found in enumerate(chunks.neighbor_ids[row, :num_neighbors].tolist()):
      if found < 0:
        continue
      asked, following = (Shared(*pairs[row, place].tolist()) for pairs in shared)
      info = database.document_info(int(database.document(found)))
      flags = []
      if np.array_equal(theirs[row, place, :m], chunks.tokens[row]):
        flags.append('exact duplicate')
      elif asked.run / m > near_duplicate:
        flags.append('near-duplicate')
      if title and info['title'].casefold() == title.casefold():
        flags.append('same title')
      neighbors.append(InspectedNeighbor(
          place + 1, float(chunks.distances[row, place]), info['title'], info['id'],
          found - info['first_chunk'] + 1, info['num_chunks'], theirs[row, place], asked,
          following, tuple(flags)))
    flags = []
    if not neighbors:
      flags.append('no neighbour')
    elif len(neighbors) < theirs.shape[1]:
      flags.append(f'only {len(neighbors)} of {theirs.shape[1]} neighbours')
    result.append(InspectedChunk(where, title, document, chunks.tokens[row],
                                 chunks.following[row], tuple(neighbors), tuple(flags)))
  return result


def kinds_of_neighbor(neighbor: InspectedNeighbor) -> np.ndarray:
  """What each of the 2m tokens of [N, F] has in common: str [2m].

  Words out of 'asked' (in the longest run common with C_u), 'next' (with C_{u+1}), 'both',
  and 'begins' (N begins as C_u does, or F as C_{u+1}); '' for nothing.
  """
  m = len(neighbor.tokens) // 2
  runs = [_run(2 * m, shared.at, shared.run) for shared in (neighbor.asked, neighbor.next)]
  begins = np.zeros(2 * m, bool)
  for start, shared in ((0, neighbor.asked), (m, neighbor.next)):
    begins |= _run(2 * m, start, shared.prefix)
  return _words(*runs, begins)


def kinds_of_chunks(chunk: InspectedChunk) -> tuple[np.ndarray, np.ndarray]:
  """Which tokens of C_u and of C_{u+1} lie in a longest common run: str [m] each."""
  m, result = len(chunk.tokens), []
  for name in ('asked', 'next'):
    common, begins = np.zeros(m, bool), np.zeros(m, bool)
    for neighbor in chunk.neighbors:
      shared = getattr(neighbor, name)
      common |= _run(m, shared.of, shared.run)
      begins |= _run(m, 0, shared.prefix)
    nothing = np.zeros(m, bool)
    result.append(_words(*((common, nothing) if name == 'asked' else (nothing, common)), begins))
  return result[0], result[1]


def _run(size: int, first: int, length: int) -> np.ndarray:
  """bool [size]: a run, if it is longer than chance."""
  result = np.zeros(size, bool)
  if length >= SHORTEST_RUN:
    result[first:first + length] = True
  return result


def _words(asked: np.ndarray, following: np.ndarray, begins: np.ndarray) -> np.ndarray:
  words = np.where(asked & following, 'both', np.where(asked, 'asked',
                                                       np.where(following, 'next', '')))
  both = np.where(words == '', 'begins', np.char.add(words, ' begins'))
  return np.where(begins, both, words)
