"""Embedders that need no weights: hashed n-grams, and random vectors as a control.

Both hash with functions of their own, equal in every process and on every machine, and
are vectorised over blocks of texts. Use them through retro_jax/retrieval/embedders.py.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrieval.embedder_base import EmbedderBase, valid_unicode

_WORD = re.compile(r'\w+|[^\w\s]')


@dataclasses.dataclass(frozen=True)
class LexicalEmbedder(EmbedderBase):
  r"""Hashed n-grams: no weights, texts that share words lie close.

  Features are words (runs of \w, or single punctuation marks), sequences of them up to
  `word_ngrams` long and character n-grams. A feature's hash picks one of
  `dimension` places and a sign (so that collisions cancel on average); it counts
  log(1 + times in the text). Vectors have unit length. Texts without features share one
  direction of their own: zeros would be nearer to every text than most texts are to each other.

  Attributes:
    dimension: of the vectors.
    word_ngrams: longest sequence of words that is a feature.
    character_ngrams: length of character n-grams, 0 for none. They see inside identifiers:
      on source code cut into pieces of 220 characters, 4 finds a piece of the same file
      first in 60 % of cases, words alone in 50 %.
    punctuation_weight: factor for features made of punctuation alone, which is frequent in
      source code and tells little.
    lowercase: whether case is ignored.
  """

  dimension: int = 512
  word_ngrams: int = 2
  character_ngrams: int = 4
  punctuation_weight: float = 0.3
  lowercase: bool = True

  def __post_init__(self):
    if self.dimension < 1 or self.word_ngrams < 0 or self.character_ngrams < 0 or not (
        self.word_ngrams or self.character_ngrams):
      raise UserError(f'LexicalEmbedder: dimension {self.dimension} must be positive, and '
                      f'word_ngrams {self.word_ngrams} or character_ngrams '
                      f'{self.character_ngrams} too')

  def describe(self) -> dict[str, Any]:
    return {'kind': 'lexical', 'version': 2, **dataclasses.asdict(self)}

  def embed(self, texts: Sequence[str],
            on_progress: Callable[[int], None] | None = None) -> np.ndarray:
    """Vectors of `texts`: float32 [N, dimension]; see Embedder.embed."""
    vectors = np.zeros((len(texts), self.dimension), np.float32)
    for start in range(0, len(texts), 4096):
      block = [valid_unicode(text) for text in texts[start:start + 4096]]
      if self.lowercase:
        block = [text.lower() for text in block]
      vectors[start:start + len(block)] = self._embed_block(block)
      if on_progress:
        on_progress(len(block))
    return vectors

  def _embed_block(self, texts: list[str]) -> np.ndarray:
    text_of, hash_of, plain_of = [], [], []
    words = [_WORD.findall(text) for text in texts] if self.word_ngrams else []
    # (kind, elements, the text of each, whether it is punctuation, lengths of n-grams)
    sources = []
    if words:
      flat = [word for row in words for word in row]
      known = {word: _hash(word) for word in set(flat)}
      marks = {word: not (word[0].isalnum() or word[0] == '_') for word in known}
      sources.append((0, np.array([known[w] for w in flat], np.uint64),
                      np.repeat(np.arange(len(texts)), [len(row) for row in words]),
                      np.array([marks[w] for w in flat], bool), range(1, self.word_ngrams + 1)))
    if self.character_ngrams:
      points = np.frombuffer(''.join(texts).encode('utf-32-le'), np.uint32).astype(np.uint64)
      sources.append((1, points, np.repeat(np.arange(len(texts)), [len(text) for text in texts]),
                      np.zeros(len(points), bool), [self.character_ngrams]))
    for kind, elements, owner, mark, lengths in sources:
      for n in lengths:
        count = max(0, len(elements) - n + 1)
        hashed = np.full(count, (kind << 32) + n, np.uint64)
        plain = np.ones(count, bool)
        for i in range(n):
          hashed = _mix(hashed + elements[i:i + count])
          plain &= mark[i:i + count]
        inside = owner[:count] == owner[n - 1:n - 1 + count]
        text_of.append(owner[:count][inside])
        hash_of.append(hashed[inside])
        plain_of.append(plain[inside])
    owner, hashed, plain = map(np.concatenate, (text_of, hash_of, plain_of))
    # One number for (text, feature), so that counting is one sort; 52 bits of hash do.
    key, first, times = np.unique((owner.astype(np.uint64) << np.uint64(52)) | (
        hashed >> np.uint64(12)), return_index=True, return_counts=True)
    owner, hashed, plain = owner[first], hashed[first], plain[first]
    weight = np.log1p(times) * np.where(plain, self.punctuation_weight, 1.0)
    weight *= np.where(hashed >> np.uint64(63), 1.0, -1.0)
    place = (hashed & np.uint64((1 << 40) - 1)) % np.uint64(self.dimension)
    sums = np.bincount(owner * self.dimension + place.astype(np.int64), weight,
                       minlength=len(texts) * self.dimension).reshape(len(texts), self.dimension)
    signs = _mix(np.arange(self.dimension, dtype=np.uint64)) >> np.uint64(63)
    sums[~sums.any(1)] = np.where(signs, 1.0, -1.0)
    return _unit(sums)


@dataclasses.dataclass(frozen=True)
class RandomEmbedder(EmbedderBase):
  """Unit vectors in random directions, a pure function of (seed, text): a control.

  Attributes:
    dimension: of the vectors.
    seed: another seed, other directions.
  """

  dimension: int = 384
  seed: int = 0

  def __post_init__(self):
    if self.dimension < 1:
      raise UserError(f'RandomEmbedder: dimension {self.dimension} must be positive')

  def describe(self) -> dict[str, Any]:
    return {'kind': 'random', 'version': 1, **dataclasses.asdict(self)}

  def embed(self, texts: Sequence[str],
            on_progress: Callable[[int], None] | None = None) -> np.ndarray:
    """Vectors of `texts`: float32 [N, dimension]; see Embedder.embed."""
    vectors = np.zeros((len(texts), self.dimension), np.float32)
    counters = _mix(np.arange(2 * self.dimension, dtype=np.uint64))
    for start in range(0, len(texts), 4096):
      block = texts[start:start + 4096]
      keys = np.array([_hash(f'{self.seed}:{valid_unicode(text)}') for text in block], np.uint64)
      # (0, 1]: 53 bits, never zero, so that the logarithm is finite.
      uniform = ((_mix(keys[:, None] ^ counters) >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
      radius, angle = uniform[:, ::2], uniform[:, 1::2]
      vectors[start:start + len(block)] = _unit(
          np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle))
      if on_progress:
        on_progress(len(block))
    return vectors


def _hash(text: str) -> int:
  """64 bits of a text, equal in every process (Python's own hash is not)."""
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')


def _mix(x: np.ndarray) -> np.ndarray:
  """A bijection of uint64 whose output bits all depend on all input bits (splitmix64)."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _unit(rows: np.ndarray) -> np.ndarray:
  """float32 rows of unit length; a row of zeros stays one."""
  norm = np.linalg.norm(rows, axis=1, keepdims=True)
  return (rows / np.where(norm > 0, norm, 1)).astype(np.float32)
