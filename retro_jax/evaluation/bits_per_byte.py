"""Bits-per-byte of a model on a set of sequences, with an interval (paper 4.1).

bits-per-byte = sum of -log2 p over all tokens / bytes of the text they stand for. Every
token of a document but its [bos] is predicted exactly once over the sequences of a split,
so the two sums belong to the same text. Which neighbours are read is a matter of the
batches handed in.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from retro_jax.data import batches as batches_lib

_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Score:
  """Sums by document, each [documents]: `ordinals` int, `bits`, `text_bytes`, `tokens` float64."""
  ordinals: np.ndarray
  bits: np.ndarray
  text_bytes: np.ndarray
  tokens: np.ndarray

  @property
  def bits_per_byte(self) -> float:
    return float(self.bits.sum() / max(self.text_bytes.sum(), 1))

  def interval(self, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of bits-per-byte over documents."""
    return bootstrap(lambda i: self.bits[i].sum() / max(self.text_bytes[i].sum(), 1),
                     len(self.bits), seed)

  def of(self, ordinals: Sequence[int]) -> 'Score':
    """The part that belongs to these documents."""
    here = np.isin(self.ordinals, np.asarray(ordinals))
    return Score(*(getattr(self, field.name)[here] for field in dataclasses.fields(self)))


def gain_interval(better: Score, worse: Score, seed: int = 0) -> tuple[float, float]:
  """95 % paired bootstrap interval of 1 - better / worse, both on the same documents."""
  return bootstrap(lambda i: 1 - better.bits[i].sum() / worse.bits[i].sum(), len(better.bits),
                   seed)


def score(evaluation_step: Callable[[Any, Mapping[str, jax.Array]], Mapping[str, jax.Array]],
          parameters: Any, batches: Iterable[Mapping[str, np.ndarray]], inputs: Sequence[str],
          mesh: Mesh) -> Score:
  """Scores all batches.

  Args:
    evaluation_step: from training/step.py.
    parameters: of the model.
    batches: numpy batches, this process's rows.
    inputs: which of a batch's arrays the step takes.
    mesh: that the parameters lie on.
  """
  columns: dict[str, list[np.ndarray]] = {
      'documents': [], 'bits': [], 'text_bytes': [], 'tokens': []}
  for batch in batches:
    sums = evaluation_step(
        parameters, batches_lib.to_global({name: batch[name] for name in inputs}, mesh))
    for name, values in columns.items():
      values.append(np.asarray(sums[name], np.int64 if name == 'documents' else np.float64).ravel())
  joined = {name: np.concatenate(values) for name, values in columns.items()}
  real = joined['documents'] >= 0  # the rest is padding
  ordinals, place = np.unique(joined['documents'][real], return_inverse=True)
  by_document = lambda name: np.bincount(place, joined[name][real], minlength=len(ordinals))
  return Score(ordinals, by_document('bits'), by_document('text_bytes'), by_document('tokens'))


def bootstrap(statistic: Callable[[np.ndarray], float], size: int, seed: int
              ) -> tuple[float, float]:
  """95 % interval of a statistic of the indices of `size` things, drawn with replacement."""
  rng = np.random.default_rng(seed)
  values = [statistic(rng.integers(0, size, size)) for _ in range(_RESAMPLES)]
  low, high = np.percentile(values, [2.5, 97.5])
  return float(low), float(high)
