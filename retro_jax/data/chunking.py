"""Documents to chunks of m tokens that never cross a document, with their exact bytes.

Which text is cut is corpus.py's business, where chunks are kept is retrieval/database.py's.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from retro_jax.data.vocabulary import Vocabulary
from retro_jax.errors import UserError

# Documents encoded together: enough to keep the tokenizer's threads busy, little enough to hold.
_BATCH_CHARACTERS = 4_000_000
_BATCH_DOCUMENTS = 512


@dataclasses.dataclass(frozen=True)
class Chunks:
  """The c chunks of one document, in order.

  Attributes:
    tokens: int32 [c, m]; the first starts with bos, the last ends with eos, then pad (0).
    valid_length: int32 [c], tokens that are not padding, in 1..m.
    text_bytes: int32 [c], UTF-8 bytes each chunk stands for; they sum to the document's.
  """

  tokens: np.ndarray
  valid_length: np.ndarray
  text_bytes: np.ndarray

  def __len__(self) -> int:
    return len(self.tokens)


def chunk_document(text: str, vocabulary: Vocabulary, chunk_length: int) -> Chunks:
  """Cuts [bos] + pieces + [eos] into chunks of `chunk_length`; an empty text makes none.

  Raises:
    UserError: `chunk_length` below 1.
  """
  return chunk_token_row(vocabulary.encode_arrays([text])[0], vocabulary, chunk_length)


def chunk_documents(texts: Iterable[str], vocabulary: Vocabulary,
                    chunk_length: int) -> Iterator[Chunks]:
  """`chunk_document` of each text, in order, encoding many of them at a time."""
  for batch in _batches(texts):
    for row in vocabulary.encode_arrays(batch):
      yield chunk_token_row(row, vocabulary, chunk_length)


def chunk_token_row(
    pieces: Sequence[int] | np.ndarray, vocabulary: Vocabulary, chunk_length: int) -> Chunks:
  """Cuts one document's token ids [t] (without bos and eos) into chunks of `chunk_length`."""
  if chunk_length < 1:
    raise UserError(f'chunk_length is {chunk_length}, expected at least 1; set another')
  if not len(pieces):
    none = np.zeros((0,), np.int32)
    return Chunks(np.zeros((0, chunk_length), np.int32), none, none)
  length = len(pieces) + 2
  count = -(-length // chunk_length)
  row = np.full((count * chunk_length,), vocabulary.pad_id, np.int32)
  row[0] = vocabulary.bos_id
  row[1:length - 1] = pieces
  row[length - 1] = vocabulary.eos_id
  tokens = row.reshape(count, chunk_length)
  valid_length = np.full((count,), chunk_length, np.int32)
  valid_length[-1] = length - (count - 1) * chunk_length
  text_bytes = vocabulary.token_bytes[tokens].sum(axis=1, dtype=np.int32)
  return Chunks(tokens, valid_length, text_bytes)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
  batch: list[str] = []
  characters = 0
  for text in texts:
    batch.append(text)
    characters += len(text)
    if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
      yield batch
      batch, characters = [], 0
  if batch:
    yield batch
