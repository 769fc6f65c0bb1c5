"""Which documents are near-identical to which others: exact Jaccard of 13-gram shingles.

As the paper (section 2.1) finds test documents again in its database: two documents are
near-identical when their sets of 13-word shingles have a Jaccard similarity of 0.8 or
more. Who is dropped for it is decided elsewhere (python_corpus.py).

No sampling: pairs that can reach the threshold must share one of their rarest shingles
(prefix filter), and every such pair is then compared exactly. The only approximation is
that a shingle is its 64-bit hash.
"""

import re
from collections.abc import Sequence

import numpy as np

_WORDS = re.compile(r'\w+')
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it loses bits


def shingles(texts: Sequence[str], width: int = 13) -> list[np.ndarray]:
  """The set of `width`-word shingles of each text, as sorted uint64 [s] hashes.

  Words are runs of letters, digits and underscores, in lower case. A text with fewer words
  than `width` has one shingle, all its words; a text with none has none.
  """
  numbers: dict[str, int] = {}
  sets = []
  for text in texts:
    words = _WORDS.findall(text.lower())
    row = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.uint64)
    sets.append(hash_windows(mix(row + np.uint64(1)), width))
  return sets


def near_duplicates(candidates: Sequence[np.ndarray], references: Sequence[np.ndarray],
                    threshold: float = 0.8) -> np.ndarray:
  """For each candidate, the most similar reference at or above the threshold.

  Args:
    candidates: shingle sets, as `shingles` returns them.
    references: likewise, computed in the same call (hashes number words by first use).
    threshold: Jaccard similarity, in (0, 1], from which two sets are near-identical.

  Returns:
    int64 [number of candidates], the reference's position, -1 where there is none.
  """
  best = np.full((len(candidates),), -1, np.int64)
  candidate_prefix, reference_prefix = _prefixes(candidates, references, threshold)
  pairs = sharing(candidate_prefix, reference_prefix)
  best_similarity = np.zeros((len(candidates),))
  for i, j in pairs:
    a, b = candidates[i], references[j]
    if min(len(a), len(b)) < threshold * max(len(a), len(b)):
      continue
    common = len(np.intersect1d(a, b, assume_unique=True))
    similarity = common / (len(a) + len(b) - common)
    if similarity >= threshold and similarity > best_similarity[i]:
      best[i], best_similarity[i] = j, similarity
  return best


def mix(values: np.ndarray) -> np.ndarray:
  """splitmix64: neighbouring numbers become unrelated ones."""
  values = values * _BASE
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))


def hash_windows(words: np.ndarray, width: int) -> np.ndarray:
  width = min(width, len(words))
  if not width:
    return words
  hashes = np.zeros((len(words) - width + 1,), np.uint64)
  for offset in range(width):  # the order of words counts: a polynomial in _BASE
    hashes = hashes * _BASE + words[offset:offset + len(hashes)]
  return np.unique(mix(hashes))


def _prefixes(candidates: Sequence[np.ndarray], references: Sequence[np.ndarray],
              threshold: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Of each set its rarest |s| - ceil(threshold |s|) + 1 shingles.

  A and B with Jaccard >= t share at least t max(|A|, |B|) shingles, so in any common order
  of all shingles these prefixes meet; ordered by rarity they meet seldom without reason.
  """
  everything = [*candidates, *references]
  values, counts = np.unique(
      np.concatenate([np.zeros((0,), np.uint64), *everything]), return_counts=True)
  rank = np.empty((len(values),), np.int64)
  rank[np.lexsort((values, counts))] = np.arange(len(values))

  def prefix(row: np.ndarray) -> np.ndarray:
    if not len(row):
      return row
    # The small allowance keeps 0.8 * 5 from becoming 5 by rounding.
    length = len(row) - int(np.ceil(threshold * len(row) - 1e-9)) + 1
    order = rank[np.searchsorted(values, row)]
    return row[np.argpartition(order, length - 1)[:length]]

  return [prefix(row) for row in candidates], [prefix(row) for row in references]


def sharing(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> np.ndarray:
  """int64 [p, 2]: the distinct pairs (i, j) for which left[i] and right[j] share a value."""
  def flatten(rows):
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    value = np.concatenate([np.zeros((0,), np.uint64), *rows])
    order = np.argsort(value, kind='stable')
    return value[order], owner[order]

  left_value, left_owner = flatten(left)
  right_value, right_owner = flatten(right)
  first = np.searchsorted(right_value, left_value, 'left')
  count = np.searchsorted(right_value, left_value, 'right') - first
  start = np.repeat(np.cumsum(count) - count, count)
  position = np.arange(count.sum()) - start + np.repeat(first, count)
  code = np.unique(np.repeat(left_owner, count) * max(len(right), 1) + right_owner[position])
  return np.stack([code // max(len(right), 1), code % max(len(right), 1)], axis=1)
