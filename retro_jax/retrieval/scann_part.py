"""One part of an index by ScaNN: tree, asymmetric hashing, re-ordering; built, stored, searched.

Which settings, and whether ScaNN at all, is index.py's decision; recall is recall.py's.
Built so that two processes, with any number of threads, write the same bytes. ScaNN proposes
candidates; their distances are taken again from the vectors themselves (exact.py).
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrieval.exact import (
  array_blocks,
  check_queries,
  joined,
  nearest_first,
  squared_distances,
)

STORAGE_BYTES = {'float32': 4, 'bfloat16': 2, 'int8': 1}
_FOLDER = 'scann'
# Two dimensions share one code of four bits: packed in memory, one byte each on disk.
_DIMENSIONS_PER_CODE = 2
# Lengths that differ by less are one: float16 moves a unit vector of 8 dimensions by less.
_SAME_LENGTH = 1e-3
# Candidates beyond k whose distances are taken again: what coarser storage may have swapped.
_SPARE = 4
# ScaNN chooses leaves by other arithmetic for small batches than for large ones, and now and then
# another leaf. Blocks of one size make an answer independent of how many are asked; only a few
# queries, which should not wait for a whole block, are asked in blocks of another.
_FEW_QUERIES, _FEW_BLOCK, _BLOCK = 16, 2, 64


@dataclasses.dataclass(frozen=True)
class ScannSettings:
  """What a searcher is built with and asked by.

  Attributes:
    leaves: partitions of the tree.
    leaves_to_search: how many of them a query looks into.
    reorder: how many candidates of the hashes are scored again.
    storage: of the vectors that they are scored with, a key of STORAGE_BYTES.
    one_length: whether all vectors have one length. Their order by dot product is that by
      distance, and for dot products ScaNN hashes what a vector's leaf leaves over: a fifth
      of the candidates are then enough.
    training_sample: vectors that tree and hashes are trained on.
    anisotropic_threshold: of ScaNN's quantisation (Guo et al. 2020).
  """

  leaves: int
  leaves_to_search: int
  reorder: int
  storage: str
  one_length: bool
  training_sample: int
  anisotropic_threshold: float

  def bytes_on_disk(self, size: int, dimension: int) -> int:
    """Of the serialised searcher, to about 1 %."""
    return size * self._vector_bytes(dimension, 1) + self.leaves * dimension * 8

  def bytes_in_memory(self, size: int, dimension: int) -> int:
    """Of the searcher once it is loaded, to about 10 %."""
    return size * self._vector_bytes(dimension, 2) + self.leaves * dimension * 8

  def _vector_bytes(self, dimension: int, codes_per_byte: int) -> int:
    codes = -(-dimension // _DIMENSIONS_PER_CODE)
    return dimension * STORAGE_BYTES[self.storage] + -(-codes // codes_per_byte) + 4


class ScannPart:
  """A searcher and the vectors it proposes from.

  Attributes:
    settings: may be replaced by others of the same `leaves` and `storage`; used by tuning.
  """

  kind = 'scann'

  def __init__(self, searcher: Any, settings: ScannSettings, vectors: Any, threads: int = 1):
    """Use `build` or `load`."""
    self._searcher, self._vectors, self._threads = searcher, vectors, threads
    self.settings = settings
    self.size = len(vectors)
    if threads > 1:
      searcher.set_num_threads(threads)

  def search(self, queries: np.ndarray, k: int, effort: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """See `index.Part.search`; `effort` multiplies leaves and candidates.

    The answer to a query does not depend on the others, unless there are fewer than 16.
    """
    queries = check_queries(queries, self._vectors.shape[1])
    wanted = min(k, self.size)
    if not len(queries) or not wanted:
      return joined([], k)
    ids = self.candidates(queries, min(self.size, wanted + _SPARE), effort)
    ids, distances = nearest_first(ids, squared_distances(queries, self._vectors, ids), wanted)
    missing = ((0, 0), (0, k - ids.shape[1]))
    return (np.pad(ids, missing, constant_values=-1),
            np.pad(distances, missing, constant_values=np.inf))

  def candidates(self, queries: np.ndarray, count: int, effort: int = 1) -> np.ndarray:
    """What ScaNN alone answers: int64 [q, count], -1 where it found fewer."""
    settings = self.settings
    arguments = {
        'final_num_neighbors': count,
        'pre_reorder_num_neighbors': min(self.size, max(settings.reorder * effort, 2 * count)),
        'leaves_to_search': min(settings.leaves, settings.leaves_to_search * effort)}
    few = len(queries) < _FEW_QUERIES
    block = _FEW_BLOCK if few else _BLOCK
    asked = np.pad(queries, ((0, -len(queries) % block), (0, 0)), 'edge')
    if self._threads > 1 and not few:
      ids, scores = self._searcher.search_batched_parallel(asked, **arguments, batch_size=block)
    else:
      found = [self._searcher.search_batched(asked[first:first + block], **arguments)
               for first in range(0, len(asked), block)]
      ids, scores = (np.concatenate(column) for column in zip(*found))
    # Places it could not fill come back as id 0 with score NaN.
    return np.where(np.isnan(scores), -1, ids.astype(np.int64))[:len(queries)]


def build(
    folder: Path, vectors: Any, settings: ScannSettings, threads: int = 0) -> ScannPart:
  """Trains a searcher and serialises it below `folder`.

  Args:
    folder: an existing folder; it may be renamed afterwards.
    vectors: [n, d0], float16 or float32, all finite.
    settings: `one_length` as `same_length` says of these vectors.
    threads: of the training, 0 for all cores; the result is the same.
  """
  scann, reorder_type = _scann()
  # float16 rows become float32 block by block: ScaNN wants one array, and copies it.
  rows = np.empty(vectors.shape, np.float32)
  for first, block in array_blocks(vectors):
    rows[first:first + len(block)] = block
  searcher = (
      # random_init=False: the default seeds the tree from memory addresses, other every time.
      scann.builder(rows, 10, 'dot_product' if settings.one_length else 'squared_l2')
      .set_n_training_threads(threads)
      .tree(settings.leaves, settings.leaves_to_search,
            training_sample_size=settings.training_sample, random_init=False)
      .score_ah(_DIMENSIONS_PER_CODE, training_sample_size=settings.training_sample,
                anisotropic_quantization_threshold=settings.anisotropic_threshold)
      .reorder(settings.reorder, quantize=reorder_type[settings.storage.upper()])
      .build())
  target = folder.resolve() / _FOLDER
  target.mkdir()
  # Relative names inside, since the folder will be renamed; loading takes an absolute path.
  searcher.serialize(str(target), relative_path=True)
  return ScannPart(searcher, settings, vectors)


def load(folder: Path, settings: ScannSettings, vectors: Any, threads: int = 1) -> ScannPart:
  """Opens what `build` left in `folder`.

  Raises:
    UserError: it cannot be read.
  """
  scann, _ = _scann()
  path = folder.resolve() / _FOLDER
  try:
    searcher = scann.load_searcher(str(path), assets_backcompat_shim=False)
  except (ValueError, RuntimeError, OSError) as error:
    reason = ' '.join(str(error).split())[:200]
    raise UserError(f'{path}: ScaNN cannot read it ({reason}); build the index again') from None
  return ScannPart(searcher, settings, vectors, threads)


def same_length(vectors: Any) -> bool:
  """Whether all vectors have one length, to what float16 leaves of it.

  Raises:
    UserError: a vector holds a number that is not finite.
  """
  shortest, longest = np.inf, 0.0
  for first, block in array_blocks(vectors):
    lengths = np.linalg.norm(block, axis=-1)
    if not np.isfinite(lengths).all():
      raise UserError(f'vector {first + int(np.argmin(np.isfinite(lengths)))} holds a number that '
                      'is not finite; embed its chunk again')
    shortest, longest = min(shortest, float(lengths.min())), max(longest, float(lengths.max()))
  return longest - shortest <= _SAME_LENGTH * longest


def _scann() -> tuple[Any, Any]:
  """The package's builder module and its enumeration of storages."""
  try:

    from scann import scann_ops_pybind
    from scann.scann_ops.py.scann_builder import ReorderType
  except ImportError as error:
    raise UserError(f"scann does not import ({error}); install the pinned versions, or set the "
                    "index kind to 'exact'") from None
  return scann_ops_pybind, ReorderType
