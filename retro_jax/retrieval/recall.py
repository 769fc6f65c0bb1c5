"""How much of the exact answer an approximate part of an index gives, by measurement.

The judge is exact.py; what follows from a measurement (settings, a warning) is index.py's.
"""

import dataclasses
from typing import Any

import numpy as np

from retro_jax.progress import Progress
from retro_jax.retrieval.exact import array_blocks, exact_search

_QUERY_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class RecallSample:
  """Vectors of a part, evenly spread, with the distances of their nearest others.

  Attributes:
    rows: int64 [s], which vectors.
    queries: float32 [s, d0], themselves.
    worst: float32 [s], distance of the `at`-th nearest other vector.
    at: how many nearest others are asked about; 0 where there is but one vector.
  """

  rows: np.ndarray
  queries: np.ndarray
  worst: np.ndarray
  at: int

  @classmethod
  def of(cls, vectors: Any, at: int, sample: int) -> 'RecallSample':
    """Searches `vectors` [n, d0] exactly for `sample` of its own rows."""
    rows = np.unique(np.linspace(0, len(vectors) - 1, min(sample, len(vectors))).astype(np.int64))
    at = min(at, len(vectors) - 1)
    queries = np.asarray(vectors[rows], np.float32)
    worst = np.zeros(len(rows), np.float32)
    progress = Progress('recall', len(rows), 'exact searches')
    for first in range(0, len(rows) if at else 0, _QUERY_BLOCK):
      part = slice(first, first + _QUERY_BLOCK)
      ids, distances = exact_search(queries[part], array_blocks(vectors), at + 1)
      others = ids != rows[part, None]
      # Where the vector itself is not in its own list (more copies than k), one place is spare.
      others[np.all(others, -1), -1] = False
      worst[part] = np.max(distances, -1, where=others, initial=0)
      progress.update(len(ids))
    return cls(rows, queries, worst, at)

  @property
  def standard_error(self) -> float:
    """Of a recall of 0.97 measured on this sample, were every neighbour found independently."""
    return float(np.sqrt(0.97 * 0.03 / max(1, self.at * len(self.rows))))

  def measure(self, part: Any) -> dict[str, Any]:
    """Asks `part` (see index.Part) for the sample.

    Returns:
      `recall`: share of the exact nearest others that are among those found, equally far
      ones counting as found; `self_recall`: share of vectors that find themselves or a copy;
      `at` and `sample`.
    """
    ids, distances = part.search(self.queries, self.at + 1)
    itself = ids == self.rows[:, None]
    found = np.sum((ids >= 0) & ~itself & (distances <= self.worst[:, None]), -1)
    # Distances are those of exact search to the last bit, so a copy is at distance 0.
    self_recall = float(np.mean(np.any(itself, -1) | (distances[:, 0] == 0)))
    recall = float(np.mean(np.minimum(found, self.at))) / self.at if self.at else 1.0
    return {'at': self.at, 'sample': len(self.rows), 'recall': recall, 'self_recall': self_recall}
