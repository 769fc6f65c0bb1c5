"""Text to token ids and back, byte for byte: a SentencePiece model, trained or loaded.

Cutting token rows into chunks lives in chunking.py. Whatever string goes in comes out
again (NUL, U+2581, carriage returns, emoji included) and no string, not even a literal
'</s>', can produce the ids of pad, bos, eos or unk. Only lone surrogates, which UTF-8
cannot hold, are replaced.
"""

import functools
import hashlib
import heapq
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from retro_jax import files
from retro_jax.errors import UserError

PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
# SentencePiece writes a space as U+2581, so a U+2581 of the text itself has to travel as bytes.
SPACE = '\u2581'
_SPACE_BYTES = SPACE.encode()
SPACES = re.compile(f'({SPACE}+)')
_SURROGATES = re.compile('[\ud800-\udfff]')
# Each always is one token: line ends with the indentation after them, runs of spaces, tabs.
_LAYOUT = (
    ['\n', '\n\n', '\n\n\n', '\r\n', '\t', '\t\t', '\n\t', '\n\t\t']
    + ['\n' + SPACE * n for n in (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24)]
    + ['\n\n' + SPACE * n for n in (2, 4, 8)]
    + [SPACE * n for n in (2, 4, 8, 16)])
# Characters encoded in one piece, about, where a piece can be cut; and where it cannot. Of all
# sizes the first was the fastest.
_PIECE_CHARACTERS = 4096
_LONGEST_PIECE = 1 << 18
# Characters whose ids are held as Python's integers, and how many a part costs beside its own.
_CHARACTERS_AT_ONCE = 1 << 20
_CHARACTERS_A_PART = 16
# What SentencePiece is fed at a time in training; longer "sentences" only slow its training down.
_SENTENCE_CHARACTERS = 4096
_NUM_THREADS = 2


def clean_text(text: str) -> str:
  """`text` as UTF-8 can hold it: each lone surrogate becomes U+FFFD."""
  return _SURROGATES.sub('\ufffd', text)


class _Part(NamedTuple):
  """Text that is encoded by itself: a part of text `row`, after so many U+2581."""

  row: int
  spaces: int
  text: str


class Vocabulary:
  """A SentencePiece model with exact bytes.

  Attributes:
    path: the model file.
    size: number of ids.
    fingerprint: 16 hex digits of the model's bytes; equal means the same token ids.
    pad_id: 0, never stands for text. Likewise bos_id and eos_id.
    token_bytes: int32 [size], how many UTF-8 bytes each id stands for (special ids: 0).
  """

  def __init__(self, path: str | os.PathLike, model: bytes):
    """Use `Vocabulary.load`; this takes the bytes already read from `path`."""
    self.path = str(path)
    self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
    try:
      if not model:  # SentencePiece would wait for one, then crash the process
        raise ValueError('empty file')
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
      self.size = self._processor.get_piece_size()
    except (RuntimeError, OSError, ValueError):
      raise UserError(
          f'{path}: not a SentencePiece model; train one or name another file') from None
    processor = self._processor
    self.pad_id, self.bos_id, self.eos_id = (
        processor.pad_id(), processor.bos_id(), processor.eos_id())
    if self.pad_id != PAD_ID:
      raise UserError(f'{path}: pad id is {self.pad_id}, expected 0; '
                      'train the SentencePiece model with pad_id=0')
    if self.bos_id < 1 or self.eos_id < 1:
      raise UserError(f'{path}: no bos or no eos id; train the SentencePiece model with both')
    self._pieces = [self._bytes_of(i) for i in range(self.size)]
    self._byte_ids = {p: i for i, p in enumerate(self._pieces) if processor.is_byte(i)}
    if len(self._byte_ids) != 256:
      raise UserError(f'{path}: {len(self._byte_ids)} byte pieces, expected 256; '
                      'train the SentencePiece model with byte_fallback')
    self.token_bytes = np.array([len(p) for p in self._pieces], np.int32)
    self.token_bytes.flags.writeable = False
    probe = ' a  b\n\n c\t \ufb01 e\u0301'
    if self.decode_bytes(self.encode(probe)) != probe.encode():
      raise UserError(
          f'{path}: changes text (white space or Unicode form); train the SentencePiece model '
          'with identity normalisation, no dummy prefix and remove_extra_whitespaces=False')

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Vocabulary':
    """Reads a model file, or the vocabulary of a public model (public_vocabulary.py).

    Raises:
      UserError: no such file, not a SentencePiece model, or one that is unfit: pad must be
        0, bos and eos must exist, text must round-trip (byte fallback, no normalisation).
    """
    if not files.exists(path):
      raise UserError(f'{files.shown(path)}: no vocabulary there; '
                      'train one or name a SentencePiece .model file')
    model = files.read_bytes(path)
    if model.startswith(b'{'):
      from retro_jax.data.public_vocabulary import PublicVocabulary  # builds upon this file
      return PublicVocabulary(path, model)
    return cls(path, model)

  def _bytes_of(self, token: int) -> bytes:
    processor = self._processor
    if processor.is_control(token) or processor.is_unknown(token):
      return b''
    piece = processor.id_to_piece(token)
    if processor.is_byte(token):
      return bytes([int(piece[3:5], 16)])  # '<0x0A>'
    return piece.replace(SPACE, ' ').encode()

  def encode(self, text: str) -> list[int]:
    """Token ids of `text`, without bos and eos."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without bos and eos; equal to `encode` one by one."""
    return [row.tolist() for row in self.encode_arrays(texts)]

  def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
    """`encode_batch` as int32 arrays; memory and time are linear in the texts' length.

    SentencePiece holds about 110 bytes a character, and slows down with length, so it is given
    texts in pieces. They are cut where no token can span: between two characters that stand
    side by side in no piece of the model. For a byte-pair model the ids are those of the whole
    text. Only a run of 262,144 characters without such a place is cut anywhere; its ids still
    stand for its exact bytes.
    """
    arrays: list[list[np.ndarray]] = [[np.zeros(0, np.int32)] for _ in texts]
    space = [self._byte_ids[bytes([b])] for b in _SPACE_BYTES]
    for group in _groups(self._parts(texts)):
      encoded = self._processor.encode([part.text for part in group], num_threads=_NUM_THREADS)
      ids: list[int] = []
      for position, part in enumerate(group):
        ids += space * part.spaces
        ids += encoded[position]
        if position + 1 == len(group) or group[position + 1].row != part.row:
          arrays[part.row].append(np.array(ids, np.int32))
          ids = []
    return [np.concatenate(row) for row in arrays]

  def _parts(self, texts: Sequence[str]) -> Iterator['_Part']:
    """What SentencePiece encodes by itself: pieces of texts, without U+2581."""
    for row, text in enumerate(texts):
      text = clean_text(text)
      start = 0
      while start < len(text):
        end = self._cut(text, start + _PIECE_CHARACTERS, start + _LONGEST_PIECE)
        between = SPACES.split(text[start:end])
        yield _Part(row, 0, between[0])
        for spaces, part in zip(between[1::2], between[2::2]):
          yield _Part(row, len(spaces), part)
        start = end

  def _cut(self, text: str, first: int, last: int) -> int:
    """The first place in `first`..`last` that no token of `text` can span, or the last one."""
    last = min(last, len(text))
    for place in range(first, last):
      if text[place - 1:place + 1] not in self._pairs:
        return place
    return last

  @functools.cached_property
  def _pairs(self) -> frozenset[str]:
    """Every two characters that stand side by side in some piece."""
    texts = (piece.decode('utf-8', 'replace') for piece in self._pieces)
    return frozenset(text[i:i + 2] for text in texts for i in range(len(text) - 1))

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """The exact bytes that `ids` stand for; pad, bos, eos and unk stand for none."""
    return b''.join([self._pieces[i] for i in ids])

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
    return self.decode_bytes(ids).decode('utf-8', 'replace')

  def piece(self, token: int) -> str:
    """How one token is shown to a person, e.g. in a table."""
    return self._processor.id_to_piece(int(token))

  def seqio(self) -> Any:
    """A `seqio.SentencePieceVocabulary` over the same file (it encodes U+2581 as a space)."""
    import seqio
    return seqio.SentencePieceVocabulary(self.path)


def train_vocabulary(texts: Iterable[str], path: str | os.PathLike, vocab_size: int,
                     seed: int = 0, sample_bytes: int = 10_000_000) -> Vocabulary:
  """Trains a byte-pair SentencePiece model on a sample of `texts` and writes it to `path`.

  The same texts in the same order, size and seed give the same file, byte for byte.

  Args:
    texts: documents, read once; only the sample is held in memory.
    path: the model file to write, atomically.
    vocab_size: number of ids, 300 of them for bytes, special ids and layout.
    seed: chooses the sample when the texts are larger than `sample_bytes`.
    sample_bytes: about how much text to train on.

  Raises:
    UserError: no text, or too little for `vocab_size`, or `vocab_size` too small.
  """
  sample = _sample(texts, seed, sample_bytes)
  if not any(text.strip() for text in sample):
    raise UserError(f'{path}: no text to train a vocabulary on; check the corpus')
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(sample), model_writer=model, model_type='bpe',
        vocab_size=vocab_size, byte_fallback=True, character_coverage=0.9995,
        normalization_rule_name='identity', add_dummy_prefix=False,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
        user_defined_symbols=_LAYOUT, max_sentence_length=16 * _SENTENCE_CHARACTERS,
        shuffle_input_sentence=False, num_threads=1, pad_id=PAD_ID, bos_id=BOS_ID,
        eos_id=EOS_ID, unk_id=UNK_ID, minloglevel=2)
  except RuntimeError as error:
    reason = ' '.join(str(error).split())
    raise UserError(f'{path}: cannot train a vocabulary of {vocab_size} on '
                    f'{sum(map(len, sample)):,} characters; choose another vocab_size or give '
                    f'more text (SentencePiece: {reason[-200:]})') from None
  files.write_bytes(path, model.getvalue())
  return Vocabulary.load(path)


def _groups(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
  """Parts that are encoded together; bounds memory, and keeps SentencePiece's threads busy."""
  group: list[_Part] = []
  characters = 0
  for part in parts:
    group.append(part)
    characters += part.spaces + len(part.text) + _CHARACTERS_A_PART
    if characters >= _CHARACTERS_AT_ONCE:
      yield group
      group, characters = [], 0
  if group:
    yield group


def _sample(texts: Iterable[str], seed: int, sample_bytes: int) -> list[str]:
  """Whole texts chosen by a hash of (seed, position), in their order, within the budget."""
  kept: list[tuple[int, int, str]] = []  # (minus key, position, text): the largest key leaves first
  total = 0
  for position, text in enumerate(texts):
    text = clean_text(text)[:sample_bytes]
    digest = hashlib.blake2b(f'{seed}/{position}'.encode(), digest_size=8).digest()
    heapq.heappush(kept, (-int.from_bytes(digest, 'big'), position, text))
    total += len(text.encode())
    while total > sample_bytes and len(kept) > 1:
      total -= len(heapq.heappop(kept)[2].encode())
  return [text for _, _, text in sorted(kept, key=lambda item: item[1])]


def _sentences(texts: Iterable[str]) -> Iterator[str]:
  """Pieces of a length that SentencePiece trains on quickly, cut at line ends where it can."""
  for text in texts:
    # NUL and U+2581 always travel as bytes: SentencePiece reserves both.
    text = text.replace('\0', ' ').replace(SPACE, ' ')
    start = 0
    while start < len(text):
      end = start + _SENTENCE_CHARACTERS
      if end < len(text):
        newline = text.rfind('\n', start + 1, end)
        end = newline if newline > 0 else end
      yield text[start:end]
      start = end
