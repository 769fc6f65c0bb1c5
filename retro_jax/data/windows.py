"""Whole documents out of stored sequences, and windows that slide over them.

The sequences of a split hold every chunk of every document once, in order, with its
neighbours, but cut the documents anywhere. Here the chunks are numbered through all
sequences, so that a document is a range of them, and rows of a batch are put together from
ranges again: windows with a stride (paper, section 4.1), or the sequences as they lie. Only
the chunks of one batch are in memory. Scoring them is evaluation/token_scores.py's.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from retro_jax.data.permutation import key, permute
from retro_jax.data.records import EXAMPLES, NEIGHBORS, Examples
from retro_jax.errors import UserError

_RECORDS_AT_ONCE = 256
_SHUFFLE = 3
# Images of the permutation that are tried for one in another document.
_TRIES = 64


class Documents:
  """The documents of a split as ranges of chunks.

  Attributes:
    examples: the stored sequences.
    ordinals: of each document in the store of the queries, int64 [documents].
    starts: the first chunk of each document and, last, the number of chunks: int64
      [documents + 1].
    text_bytes: UTF-8 bytes that each chunk stands for, int32 [chunks].
    targets: tokens of each chunk that are predicted, int32 [chunks]: all but padding and the
      first of a document.
  """

  def __init__(self, examples: Examples, max_examples: int = 0):
    """Reads the columns that tell documents apart; neighbours are not touched.

    Args:
      examples: of the split.
      max_examples: take only the documents that begin in the first so many sequences; 0: all.

    Raises:
      UserError: a damaged record, a document in two places or with chunks missing, or questions,
        of which only the answers count.
    """
    if examples.shape.scored:
      raise UserError(f'{examples.folder}: holds questions, whose answers are what is scored; '
                      'use python -m retro_jax.answer')
    self.examples = examples
    columns: dict[str, list[np.ndarray]] = {
        'documents': [], 'chunk_ids': [], 'text_bytes': [], 'real': []}
    for first in range(0, len(examples), _RECORDS_AT_ONCE):
      some = examples.read(np.arange(first, min(first + _RECORDS_AT_ONCE, len(examples))),
                           (EXAMPLES,))
      some['real'] = (some['tokens'].reshape(-1, examples.shape.chunk_length) != 0).sum(-1)
      for name, values in columns.items():
        values.append(some[name].ravel())
    whole = {name: np.concatenate(values) for name, values in columns.items()}
    there = int((whole['documents'] >= 0).sum())  # padding ends the last sequence
    documents, ids = (whole[name][:there].astype(np.int64) for name in ('documents', 'chunk_ids'))
    begins = np.concatenate([[True], documents[1:] != documents[:-1]])[:there]
    starts = np.flatnonzero(begins)
    if len(np.unique(documents[starts])) < len(starts) or (
        np.diff(ids)[~begins[1:]] != 1).any():
      raise UserError(f'{examples.folder}: the chunks of a document do not follow each other; '
                      'rebuild the examples')
    if max_examples:
      starts = starts[starts < max_examples * examples.shape.num_chunks]
    ends = np.append(np.flatnonzero(begins), there)[1:len(starts) + 1]
    self.ordinals = documents[starts]
    self.starts = np.append(starts, ends[-1:]) if len(starts) else np.zeros(1, np.int64)
    self.text_bytes = whole['text_bytes'][:self.num_chunks].astype(np.int32)
    self.targets = whole['real'][:self.num_chunks].astype(np.int32)
    self.targets[starts] -= 1

  def __len__(self) -> int:
    return len(self.ordinals)

  @property
  def num_chunks(self) -> int:
    return int(self.starts[-1])

  @functools.cached_property
  def document(self) -> np.ndarray:
    """Which document each chunk belongs to, counted here: int64 [chunks]."""
    return np.repeat(np.arange(len(self)), np.diff(self.starts))

  def read(self, chunks: np.ndarray, sets: Sequence[str] = (EXAMPLES, NEIGHBORS),
           examples: Examples | None = None) -> dict[str, np.ndarray]:
    """Chunks by number, of any shape [...]; -1 gives an empty one.

    Args:
      chunks: int64.
      sets: of records, as in `Examples.read`.
      examples: other records of the same sequences to read them from.

    Returns:
      tokens int32 [..., m], next_token (of the sequence) and what else the sets hold by
      chunk, with `chunks`' shape in front.
    """
    examples = examples or self.examples
    per_sequence = examples.shape.num_chunks
    records, place = np.unique(np.where(chunks < 0, -1, chunks // per_sequence),
                               return_inverse=True)
    place, within = place.reshape(chunks.shape), np.where(chunks < 0, 0, chunks % per_sequence)
    result = {}
    for name, values in examples.read(records, sets).items():
      if name == 'next_token':
        continue
      by_chunk = values.reshape(len(records), per_sequence, *(
          (-1,) if name == 'tokens' else values.shape[2:]))
      result[name] = by_chunk[place, within]
    return result

  def shuffled(self, chunks: np.ndarray, seed: int) -> np.ndarray:
    """For each chunk one of another document: the same for the same seed; -1 for -1.

    Raises:
      UserError: there is only one document.
    """
    if len(self) < 2:
      raise UserError(f'{self.examples.folder}: shuffled neighbours need two documents, '
                      'it holds one')
    result = np.array(chunks, np.int64)
    own = np.where(chunks < 0, -1, self.document[np.maximum(chunks, 0)])
    todo = chunks >= 0
    for _ in range(_TRIES):
      result[todo] = permute(result[todo], self.num_chunks, key(seed, _SHUFFLE))
      todo = (chunks >= 0) & (self.document[np.maximum(result, 0)] == own)
      if not todo.any():
        return result
    # A document of nearly the whole split; what follows it is of another.
    result[todo] = self.starts[own[todo] + 1] % self.num_chunks
    return result


@dataclasses.dataclass(frozen=True)
class Row:
  """One sequence of a batch: ranges of chunks side by side.

  Attributes:
    chunks: int64 [l], -1 for padding.
    scored: bool [l], whether the targets of the chunk's positions count here.
  """

  chunks: np.ndarray
  scored: np.ndarray


def stride_in_chunks(examples: Examples, stride: int) -> int:
  """The stride as a number of chunks, l for sequences as they lie.

  Args:
    examples: with sequences of n tokens.
    stride: in tokens; 0 for n / 2, as in the paper.

  Raises:
    UserError: no multiple of the chunk length, or more than n.
  """
  n, m = examples.shape.sequence_length, examples.shape.chunk_length
  tokens = stride or n // 2
  if tokens % m or not 0 < tokens <= n or (not stride and n % 2):
    raise UserError(f'stride {stride or f"n / 2 = {n / 2:g}"} for windows of n = {n} tokens in '
                    f'chunks of {m}; EvaluationConfig.stride has to be a multiple of {m} up to {n}')
  return tokens // m


def rows(documents: Documents, first: int, last: int, stride: int) -> Iterator[Row]:
  """The rows in which documents [first, last) are scored, every chunk once.

  With a stride below l, windows of l chunks begin at multiples of `stride` inside a document;
  the first scores all its positions, each further one those the one before did not reach.
  Ends of documents share a row where they fit in whole. With stride l the rows are the stored
  sequences, which cut documents anywhere.

  Args:
    documents: of the split.
    first, last: which of them.
    stride: in chunks.
  """
  length = documents.examples.shape.num_chunks
  if stride == length:
    begin, end = documents.starts[first], documents.starts[last]
    for sequence in range(begin // length, -(-end // length)):
      chunks = np.arange(sequence * length, (sequence + 1) * length)
      inside = (chunks >= begin) & (chunks < end)
      yield Row(np.where(inside, chunks, -1), inside)
    return
  row, filled = _empty_row(length), 0
  for start, scored, end in _windows(documents, first, last, stride, length):
    size = end - start
    if filled + size > length:
      yield row
      row, filled = _empty_row(length), 0
    here = np.arange(start, end)
    row.chunks[filled:filled + size] = here
    row.scored[filled:filled + size] = here >= scored
    filled += size
  if filled:
    yield row


def _empty_row(length: int) -> Row:
  return Row(np.full(length, -1, np.int64), np.zeros(length, bool))


def _windows(documents: Documents, first: int, last: int, stride: int, length: int
             ) -> Iterator[tuple[int, int, int]]:
  """(first chunk, first scored chunk, end) of every window."""
  for document in range(first, last):
    start, stop = (int(x) for x in documents.starts[document:document + 2])
    scored = start
    while True:
      end = min(start + length, stop)
      yield start, scored, end
      if end == stop:
        break
      start, scored = start + stride, end


@dataclasses.dataclass(frozen=True)
class Reading:
  """What a model is given beside the text.

  Attributes:
    num_neighbors: k, nearest first; 0 turns retrieval off.
    parts: which halves of [N, F] it sees: 'NF', 'N', 'F', or '' for neither.
    shuffled: give each chunk the neighbours of a chunk of another document.
    seed: of the shuffle.
  """

  num_neighbors: int
  parts: str = 'NF'
  shuffled: bool = False
  seed: int = 0


def arrays(documents: Documents, some: Sequence[Row], reading: Reading,
           neighbors: Examples) -> dict[str, np.ndarray]:
  """Rows as the model takes them (data/features.py), numpy, with a leading axis of rows.

  A position's target is the next token of its document; it has a weight where the row scores
  the position.

  Args:
    documents: of the split.
    some: rows.
    reading: what is retrieved.
    neighbors: records of the same sequences to take neighbours from.
  """
  m = documents.examples.shape.chunk_length
  chunks = np.stack([row.chunks for row in some])
  following = np.where((chunks >= 0) & _goes_on(documents, chunks), chunks + 1, -1)
  tokens = documents.read(chunks, (EXAMPLES,))['tokens'].astype(np.int32)
  after = documents.read(following[:, -1:], (EXAMPLES,))['tokens'].astype(np.int32)[..., :1]
  # The first token of the chunk after each: of the next in the row, and of the one after it.
  first = np.where(following[:, :-1, None] >= 0, tokens[:, 1:, :1], 0)
  targets = np.concatenate([tokens[..., 1:], np.concatenate([first, after], 1)], -1)
  scored = np.stack([row.scored for row in some])[..., None] & (targets != 0)
  flat = lambda x: x.reshape(len(some), -1)
  result: dict[str, Any] = {
      'tokens': flat(tokens), 'targets': flat(targets),
      'loss_weights': flat(scored).astype(np.float32),
      'documents': np.where(chunks < 0, -1, documents.document[np.maximum(chunks, 0)]
                            ).astype(np.int32)}
  if reading.num_neighbors:
    source = documents.shuffled(chunks, reading.seed) if reading.shuffled else chunks
    found = documents.read(source, (NEIGHBORS,), neighbors)
    retrieved = found['neighbor_tokens'][:, :, :reading.num_neighbors].astype(np.int32)
    there = found['neighbor_ids'][:, :, :reading.num_neighbors] >= 0
    seen = np.repeat(['N' in reading.parts, 'F' in reading.parts], m)
    result |= {'neighbor_tokens': retrieved,
               'neighbor_mask': (retrieved != 0) & there[..., None] & seen}
  return result


def _goes_on(documents: Documents, chunks: np.ndarray) -> np.ndarray:
  """Whether the document of each chunk has one more after it."""
  chunks = np.maximum(chunks, 0)
  return chunks + 1 < documents.starts[documents.document[chunks] + 1]
