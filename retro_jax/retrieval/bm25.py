"""BM25 over the words of chunks: finding chunks, and scoring candidates found otherwise.

A part indexes consecutive chunks, with word statistics of its own. The scores of every word
in every chunk are computed by the package bm25s when the part is built (Lù 2024, "BM25S:
Orders of magnitude faster lexical search via eager sparse scoring"); a query then sums them
(bm25_kernels.py). Which parts there are and how their answers merge is the business of
sharded_index.py.

  words.txt    one word a line, in the order of their numbers
  starts.npy   int64 [words + 1], where each word's list begins
  chunks.npy   int32 [entries], chunks that hold the word, ascending
  scores.npy   float32 [entries], BM25 score of the word in the chunk
"""

import collections
import contextlib
import dataclasses
import functools
import importlib
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax import storage
from retro_jax.errors import UserError
from retro_jax.retrieval.embedder_base import valid_unicode

KIND = 'bm25'
METHODS = ('lucene', 'robertson', 'atire')
_WORDS = 'words.txt'
_COLUMNS = {'starts': np.int64, 'chunks': np.int32, 'scores': np.float32}
# Scripts written without spaces: every character counts as a word.
_IDEOGRAPHS = '\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff'
_WORD = re.compile(rf'[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+')


@dataclasses.dataclass(frozen=True)
class Bm25Config:
  """How words are counted and weighed.

  Attributes:
    k1: how soon repeating a word stops adding to the score.
    b: how far a chunk's length is held against it, 0 to 1.
    method: 'lucene', 'robertson' or 'atire', variants of the formula that bm25s names.
    lowercase: whether case is ignored.
    stopwords: name ('en', 'german', ...) of a list of bm25s whose words are left out, '' for
      none. They are most of the time of a search and little of a score.
    max_query_terms: a query is cut to so many of its words, the rarest ones; 0 for all.
    vectors_per_part: most chunks in one part; bounds the memory of building and searching.
  """

  k1: float = 0.9
  b: float = 0.4
  method: str = 'lucene'
  lowercase: bool = True
  stopwords: str = ''
  max_query_terms: int = 0
  vectors_per_part: int = 262_144

  def __post_init__(self):
    if self.method not in METHODS:
      raise UserError(f'Bm25Config: method is {self.method!r}, expected one of '
                      f'{", ".join(METHODS)}')
    if self.k1 <= 0 or not 0 <= self.b <= 1:
      raise UserError(f'Bm25Config: k1 is {self.k1} and b is {self.b}, expected a positive k1 '
                      'and b from 0 to 1')
    if self.max_query_terms < 0 or self.vectors_per_part < 1:
      raise UserError(f'Bm25Config: max_query_terms {self.max_query_terms} must not be negative, '
                      f'vectors_per_part {self.vectors_per_part} must be positive')


def words_of(text: str, lowercase: bool = True) -> list[str]:
  r"""The words of a text: runs of \w, and single characters of scripts without spaces.

  Characters that only look different (composed and decomposed accents, full-width letters)
  are made one (Unicode NFKC).
  """
  if not text.isascii():
    text = unicodedata.normalize('NFKC', valid_unicode(text))
  return _WORD.findall(text.lower() if lowercase else text)


def build_part(folder: Path, texts: Iterable[str], config: Bm25Config) -> dict[str, Any]:
  """Indexes chunks 0, 1, ... in the order of `texts`; the same bytes in every process.

  Args:
    folder: exists and is empty; filled with the files described above.
    texts: of the chunks; read once. Numbers of words are held, not texts.
    config: how words are weighed.

  Returns:
    Facts that JSON can hold, which `load_part` needs: config, size, words (different ones),
    entries, bytes.
  """
  bm25s = _import_bm25s()
  ignored = _stopwords(config.stopwords)
  numbers: dict[str, int] = {}
  rows = [[numbers.setdefault(word, len(numbers))
           for word in words_of(text, config.lowercase) if word not in ignored] for text in texts]
  if numbers:
    index = bm25s.BM25(config.k1, config.b, method=config.method, csc_backend='scipy')
    index.index((rows, numbers), create_empty_token=False, show_progress=False)
    columns = {'starts': index.scores['indptr'], 'chunks': index.scores['indices'],
               'scores': index.scores['data']}
  else:
    columns = {'starts': [0], 'chunks': [], 'scores': []}
  (folder / _WORDS).write_bytes('\n'.join(numbers).encode())
  for name, kind in _COLUMNS.items():
    storage.save_array(folder / f'{name}.npy', np.asarray(columns[name], kind))
  return {'kind': KIND, 'config': dataclasses.asdict(config), 'size': len(rows),
          'words': len(numbers), 'entries': len(columns['chunks']),
          'bytes': sum(path.stat().st_size for path in folder.iterdir())}


def load_part(folder: Path, facts: dict[str, Any]) -> 'Bm25Part':
  """A part that `build_part` filled and described by `facts`; lists are memory-mapped.

  Raises:
    UserError: the files are not those that the facts describe.
  """
  words = (folder / _WORDS).read_bytes().decode()
  part = Bm25Part(
      Bm25Config(**facts['config']), facts['size'], words.split('\n') if words else [],
      *(np.load(folder / f'{name}.npy', mmap_mode='r') for name in _COLUMNS))
  found = (len(part.words), len(part.starts) - 1, len(part.chunks), len(part.scores))
  if found != (facts['words'], facts['words'], facts['entries'], facts['entries']):
    raise UserError(f'{folder}: holds {found[0]} words and {found[2]} entries, expected '
                    f'{facts["words"]} and {facts["entries"]}; build the index again')
  return part


class Bm25Part:
  """Chunks that can be searched and scored by the words they share with a query.

  Attributes:
    kind: 'bm25'.
    size: number of chunks.
  """

  kind = KIND

  def __init__(self, config: Bm25Config, size: int, words: list[str], starts: np.ndarray,
               chunks: np.ndarray, scores: np.ndarray):
    """Use `load_part`."""
    self.config, self.size, self.words = config, size, words
    self.starts, self.chunks, self.scores = starts, chunks, scores
    self._numbers = {word: number for number, word in enumerate(words)}

  def search(self, texts: Sequence[str], k: int,
             effort: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The k chunks of highest score for each text, exactly; ties go to the smaller chunk.

    Args:
      texts: q queries of any length, repeated words counting so many times.
      k: how many.
      effort: for the interface; the search is exact.

    Returns:
      ids int64 [q, k] and negated scores float32 [q, k], best first; -1 and inf where fewer
      than k chunks share a word with the query.
    """
    from retro_jax.retrieval import bm25_kernels
    ids = np.full((len(texts), k), -1, np.int64)
    distances = np.full((len(texts), k), np.inf, np.float32)
    if k:
      bm25_kernels.search(self.starts, self.chunks, self.scores, *self._queries(texts), self.size,
                          ids, distances)
    return ids, distances

  def score(self, texts: Sequence[str], ids: np.ndarray) -> np.ndarray:
    """Negated scores of given chunks: what re-ranks candidates.

    Args:
      texts: q queries.
      ids: int64 [q, c], chunks of this part, -1 for none.

    Returns:
      float32 [q, c], 0 where no word is shared, inf where there is no chunk; the very numbers
      of `search`.
    """
    from retro_jax.retrieval import bm25_kernels
    ids = np.asarray(ids, np.int64)
    if ids.shape[:1] != (len(texts),) or ids.max(initial=-1) >= self.size:
      raise ValueError(f'ids {ids.shape} up to {ids.max(initial=-1)} do not fit {len(texts)} '
                       f'queries over {self.size} chunks')
    distances = np.empty(ids.shape, np.float32)
    bm25_kernels.score(*self._rows, *self._queries(texts), ids, distances)
    return distances

  @functools.cached_property
  def _rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrix by chunk: starts int64 [size + 1], words int32 and scores float32 [entries]."""
    import scipy.sparse
    rows = scipy.sparse.csc_array(
        (self.scores, self.chunks, self.starts), shape=(self.size, len(self.words))).tocsr()
    rows.sort_indices()
    return rows.indptr.astype(np.int64), rows.indices.astype(np.int32), rows.data

  def _queries(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Known words of the texts, the rarest of a text first, with the times they occur.

    Returns:
      starts int64 [q + 1], words int32 and weights float32 of all queries in a row.
    """
    counts = [collections.Counter(
        self._numbers[word] for word in words_of(text, self.config.lowercase)
        if word in self._numbers) for text in texts]
    owners = np.repeat(np.arange(len(texts)), [len(count) for count in counts])
    words = np.array([word for count in counts for word in count], np.int32)
    times = np.array([n for count in counts for n in count.values()], np.float32)
    order = np.lexsort((words, self.starts[words + 1] - self.starts[words], owners))
    owners, words, times = owners[order], words[order], times[order]
    if self.config.max_query_terms:
      rank = np.arange(len(owners)) - np.searchsorted(owners, owners)
      kept = rank < self.config.max_query_terms
      owners, words, times = owners[kept], words[kept], times[kept]
    return np.searchsorted(owners, np.arange(len(texts) + 1)), words, times


def _stopwords(language: str) -> frozenset[str]:
  if not language:
    return frozenset()
  lists = importlib.import_module('bm25s.stopwords')
  prefix = 'STOPWORDS_'
  found = getattr(lists, prefix + language.upper(), None)
  if found is None:
    known = sorted(name.removeprefix(prefix).lower() for name in dir(lists)
                   if name.startswith(prefix))
    raise UserError(f'Bm25Config: stopwords is {language!r}, expected one of {", ".join(known)}, '
                    "or '' for none")
  return frozenset(found)


def _import_bm25s() -> Any:
  """The package bm25s, kept from starting JAX.

  It computes with JAX while it is imported, where JAX is installed, though nothing used here
  does. That would take the accelerators for this process, and leave no chance to set JAX's
  flags or to join other hosts.
  """
  if 'bm25s' not in sys.modules:
    with _without('jax', 'jax.lax'):
      importlib.import_module('bm25s')
  return sys.modules['bm25s']


@contextlib.contextmanager
def _without(*modules: str) -> Iterator[None]:
  """Modules that cannot be imported while the block runs, as if they were not installed."""
  loaded = {name: sys.modules[name] for name in modules if name in sys.modules}
  sys.modules.update(dict.fromkeys(modules))
  try:
    yield
  finally:
    for name in modules:
      del sys.modules[name]
    sys.modules.update(loaded)
