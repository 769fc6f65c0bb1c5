"""Nearest neighbours among the embeddings of a store: exact, or by ScaNN.

An index is a folder that knows which embeddings it was made from. Distances are squared
L2, equal ones are ordered by chunk id. Which neighbours are allowed is not its business
(policies.py), nor is asking again when too few were (search.py).
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from retro_jax import storage
from retro_jax.errors import UserError
from retro_jax.progress import Progress, duration

KIND = 'index'
FORMAT_VERSION = 1
# Candidates beyond k kept through the float32 matrix product, before distances are exact.
_SPARE = 16
_QUERY_BLOCK = 512
_VECTOR_BLOCK = 16384


@dataclasses.dataclass(frozen=True)
class IndexConfig:
  """How to index; 0 lets the number of vectors decide.

  Attributes:
    kind: 'auto', 'exact' or 'scann'.
    exact_below: with 'auto', databases of fewer vectors are searched exactly.
    leaves: partitions of the ScaNN tree (about the square root of the number of vectors).
    leaves_to_search: how many of them a query looks into (a quarter, at most 150).
    reorder: how many candidates are scored again with full precision.
    training_sample: vectors that the tree is trained on.
    anisotropic_threshold: of ScaNN's quantisation.
    recall_sample: how many vectors recall is measured with.
    recall_at: k of that measurement.
  """

  kind: str = 'auto'
  exact_below: int = 20_000
  leaves: int = 0
  leaves_to_search: int = 0
  reorder: int = 0
  training_sample: int = 250_000
  anisotropic_threshold: float = 0.2
  recall_sample: int = 500
  recall_at: int = 10


class Index(Protocol):
  """What can be searched."""

  kind: str
  size: int

  def search(self, queries: np.ndarray, k: int, effort: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest vectors of each query.

    Args:
      queries: float32 [q, d0].
      k: how many.
      effort: multiplies the work of an approximate search (leaves, candidates).

    Returns:
      ids int64 [q, k] and squared distances float32 [q, k], nearest first; -1 and inf
      where there are fewer than k.
    """
    ...


def exact_search(
    queries: np.ndarray,
    blocks: Iterable[tuple[int, np.ndarray]],
    k: int,
    forbidden: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """The k nearest of all vectors in `blocks`, exactly; ties go to the smaller id.

  A blocked matrix product finds candidates; those, and for safety every vector that rounding
  could have kept out, get their distance from differences.

  Args:
    queries: float32 [q, d0].
    blocks: (first id, float32 [n, d0]) in order; each is read once.
    k: how many.
    forbidden: given the ids of a block, int64 [n], says which may not be returned, bool
      [q, n].

  Returns:
    ids int64 [q, k], squared distances float32 [q, k]; -1 and inf where there are fewer.
  """
  queries = np.ascontiguousarray(queries, np.float32)
  q, dimension = queries.shape
  keep = k + _SPARE
  query_norms = np.sum(queries * queries, -1)
  ids = np.full((q, 0), -1, np.int64)
  exact = np.zeros((q, 0), np.float32)
  for first, block in blocks:
    block = np.ascontiguousarray(block, np.float32)
    norms = np.sum(block * block, -1)
    block_ids = np.arange(first, first + len(block))
    distances = np.maximum(query_norms[:, None] - 2 * (queries @ block.T) + norms, 0)
    if forbidden is not None:
      distances[forbidden(block_ids)] = np.inf
    # What the float32 product can be off by: the worst-case rounding of a dot product.
    slack = 4 * (dimension + 4) * 2.0**-24 * (
        np.sqrt(query_norms) + math.sqrt(float(norms.max(initial=0)))) ** 2
    chosen = min(keep, len(block))
    columns = np.argpartition(distances, chosen - 1, axis=-1)[:, :chosen]
    picked = np.take_along_axis(distances, columns, -1)
    picked_exact = _differences(queries, block, columns)
    picked_exact[np.isinf(picked)] = np.inf
    # Rows with near-ties across the cut are resolved from the whole block.
    cut = picked.max(-1)
    kth = np.sort(picked, -1)[:, min(k, chosen) - 1]
    unsafe = np.flatnonzero((chosen < len(block)) & (cut <= kth + 2 * slack) & np.isfinite(cut))
    extra: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for row in unsafe:
      near = np.flatnonzero(distances[row] <= kth[row] + 2 * slack[row])
      near_exact = _differences(queries[row:row + 1], block, near[None])[0]
      order = np.lexsort((near, near_exact))[:chosen]
      extra[int(row)] = (near[order], near_exact[order])
    for row, (near, near_exact) in extra.items():
      columns[row], picked_exact[row] = -1, np.inf
      columns[row, :len(near)], picked_exact[row, :len(near)] = near, near_exact
    new_ids = np.where(np.isinf(picked_exact), -1, columns + first)
    ids = np.concatenate([ids, new_ids], -1)
    exact = np.concatenate([exact, picked_exact], -1)
    ids, exact = nearest_first(ids, exact, keep)
  ids, exact = nearest_first(ids, exact, k)
  missing = k - ids.shape[1]
  return (np.pad(ids, ((0, 0), (0, missing)), constant_values=-1),
          np.pad(exact, ((0, 0), (0, missing)), constant_values=np.inf))


def nearest_first(
    ids: np.ndarray, distances: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """The first k of each row by (distance, id); -1 counts as farther than anything."""
  distances = np.where(ids < 0, np.float32(np.inf), distances)
  order = np.lexsort((np.where(ids < 0, np.iinfo(np.int64).max, ids), distances))[:, :k]
  return np.take_along_axis(ids, order, -1), np.take_along_axis(distances, order, -1)


def _differences(queries: np.ndarray, block: np.ndarray, columns: np.ndarray) -> np.ndarray:
  """float32 [q, c]: squared distance of each query to its columns, summed in float64."""
  result = np.empty(columns.shape, np.float32)
  for first in range(0, len(queries), 256):
    part = slice(first, first + 256)
    difference = block[columns[part]] - queries[part, None]
    result[part] = np.einsum('qcd,qcd->qc', difference, difference, dtype=np.float64)
  return result


class ExactIndex:
  """Every vector is looked at."""

  kind = 'exact'

  def __init__(self, vectors: np.ndarray):
    self._vectors = vectors
    self.size = len(vectors)

  def search(self, queries: np.ndarray, k: int, effort: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """See `Index.search`; `effort` changes nothing."""
    del effort
    queries = check_queries(queries, self._vectors.shape[1])
    parts = [exact_search(queries[i:i + _QUERY_BLOCK], array_blocks(self._vectors), k)
             for i in range(0, len(queries), _QUERY_BLOCK)]
    return _joined(parts, k)


class ScannIndex:
  """A ScaNN searcher: tree, asymmetric hashing, re-ordering with full precision."""

  kind = 'scann'

  def __init__(self, searcher: Any, size: int, dimension: int, settings: dict[str, int]):
    self._searcher = searcher
    self._dimension = dimension
    self._settings = settings
    self.size = size

  def search(self, queries: np.ndarray, k: int, effort: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """See `Index.search`."""
    queries = check_queries(queries, self._dimension)
    wanted = min(k, self.size)
    if not len(queries) or not wanted:
      return _joined([], k)
    ids, distances = self._searcher.search_batched(
        queries,
        final_num_neighbors=wanted,
        pre_reorder_num_neighbors=min(self.size, max(self._settings['reorder'] * effort, 4 * k)),
        leaves_to_search=min(self._settings['leaves'],
                             self._settings['leaves_to_search'] * effort))
    # Places it could not fill come back as id 0 at distance NaN.
    ids = np.where(np.isnan(distances), -1, ids.astype(np.int64))
    ids, distances = nearest_first(ids, np.maximum(distances, 0), wanted)
    spare = ((0, 0), (0, k - wanted))
    return (np.pad(ids, spare, constant_values=-1),
            np.pad(distances, spare, constant_values=np.inf))


def check_queries(queries: np.ndarray, dimension: int) -> np.ndarray:
  """`queries` as contiguous float32 [q, dimension].

  Raises:
    UserError: they come from an embedder of another dimension.
  """
  queries = np.ascontiguousarray(queries, np.float32)
  if queries.ndim != 2 or queries.shape[1] != dimension:
    raise UserError(f'queries have shape {list(queries.shape)}, the index holds vectors of '
                    f'dimension {dimension}; embed both with the same embedder')
  return queries


def array_blocks(vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
  """`vectors` [n, d0] as (first row, float32 block)."""
  for first in range(0, len(vectors), _VECTOR_BLOCK):
    yield first, np.asarray(vectors[first:first + _VECTOR_BLOCK], np.float32)


def _joined(
    parts: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
  empty = (np.zeros((0, k), np.int64), np.zeros((0, k), np.float32))
  ids, distances = zip(empty, *parts)
  return np.concatenate(ids), np.concatenate(distances)


def scann_settings(size: int, config: IndexConfig) -> dict[str, int]:
  """The numbers ScaNN is built with for `size` vectors; what `config` sets wins."""
  leaves = config.leaves or max(1, round(math.sqrt(size)))
  return {
      'leaves': leaves,
      'leaves_to_search': min(leaves, config.leaves_to_search or min(150, max(8, leaves // 4))),
      'reorder': config.reorder or 200,
      'training_sample': min(size, config.training_sample),
  }


def build_index(
    folder: str | os.PathLike,
    embeddings: np.ndarray,
    config: IndexConfig = IndexConfig(),
    *,
    fingerprint: str,
) -> Index:
  """Builds and stores an index; skips when current.

  Args:
    folder: where it is to lie.
    embeddings: [n, d0], float16 or float32; row i is chunk i.
    config: the settings.
    fingerprint: of the embeddings; a store of another one is refused by `load_index`.

  Raises:
    UserError: no vectors, or an unknown kind.
  """
  size, dimension = embeddings.shape
  if not size:
    raise UserError(f'{folder}: no vectors to index; build the database with documents in it')
  if config.kind not in ('auto', 'exact', 'scann'):
    raise UserError(f"index kind {config.kind!r} is unknown; expected 'auto', 'exact' or 'scann'")
  exact = config.kind == 'exact' or (config.kind == 'auto' and size < config.exact_below)
  inputs = index_inputs(config, fingerprint)
  if storage.is_current(folder, KIND, inputs):
    return load_index(folder, fingerprint)
  manifest: dict[str, Any] = {
      'kind': KIND, 'format_version': FORMAT_VERSION, 'inputs': inputs,
      'search': 'exact' if exact else 'scann', 'embedding_fingerprint': fingerprint,
      'size': size, 'dimension': dimension}
  with storage.building(folder, manifest) as temporary:
    if exact:
      print(f'index: {size:,} vectors of {dimension}, exact search, '
            f'{embeddings.nbytes / 1e6:,.1f} MB')
      np.save(temporary / 'vectors.npy', embeddings)
      manifest['recall'] = {'at': config.recall_at, 'sample': 0, 'recall': 1.0, 'self_recall': 1.0}
    else:
      manifest['settings'] = scann_settings(size, config)
      manifest['recall'] = _build_scann(temporary, embeddings, config, manifest['settings'])
  return load_index(folder, fingerprint)


def index_inputs(config: IndexConfig, fingerprint: str) -> dict[str, Any]:
  """What the stored index depends on."""
  return {'format_version': FORMAT_VERSION, 'config': dataclasses.asdict(config),
          'embeddings': fingerprint}


def load_index(folder: str | os.PathLike, fingerprint: str | None = None) -> Index:
  """Opens a stored index.

  Args:
    folder: where it lies.
    fingerprint: of the embeddings the caller is about to search; None skips the check.

  Raises:
    UserError: nothing there, or made from other embeddings.
  """
  manifest = storage.read_manifest(folder, KIND)
  if fingerprint is not None and manifest['embedding_fingerprint'] != fingerprint:
    raise UserError(f'{folder}: indexes embeddings {manifest["embedding_fingerprint"]}, the '
                    f'database holds {fingerprint}; build the index again')
  if manifest['search'] == 'exact':
    return ExactIndex(np.load(Path(folder) / 'vectors.npy', mmap_mode='r'))
  return ScannIndex(_scann().load_searcher(str(Path(folder).resolve() / 'scann')),
                    manifest['size'], manifest['dimension'], manifest['settings'])


def _scann() -> Any:
  try:
    from scann import scann_ops_pybind  # pylint: disable=import-outside-toplevel
  except ImportError as error:
    raise UserError(f"scann does not import ({error}); install the pinned versions, or set the "
                    "index kind to 'exact'") from None
  return scann_ops_pybind


def _build_scann(
    folder: Path, embeddings: np.ndarray, config: IndexConfig, settings: dict[str, int]
) -> dict[str, Any]:
  """Trains, stores and judges a ScaNN searcher; returns its measured recall."""
  size, dimension = embeddings.shape
  # Measured on two cores: 39 thousand vectors of 384 in 9 s, 300 thousand in 55 s.
  seconds = size * dimension * 5e-7
  print(f'index: {size:,} vectors of {dimension}, ScaNN, {settings["leaves"]:,} leaves, '
        f'{settings["leaves_to_search"]:,} searched, {settings["reorder"]:,} re-ordered; '
        f'about {size * dimension * 4.6 / 1e6:,.0f} MB and {duration(seconds)}', flush=True)
  vectors = np.asarray(embeddings, np.float32)
  # random_init=False: the default seeds the tree from memory addresses, other every time.
  searcher = (
      _scann().builder(vectors, config.recall_at, 'squared_l2')
      .tree(settings['leaves'], settings['leaves_to_search'],
            training_sample_size=settings['training_sample'], random_init=False)
      .score_ah(2, anisotropic_quantization_threshold=config.anisotropic_threshold)
      .reorder(settings['reorder'])
      .build())
  target = folder.resolve() / 'scann'
  target.mkdir()
  # Relative names inside, since this folder is renamed; loading takes an absolute path.
  searcher.serialize(str(target), relative_path=True)
  index = ScannIndex(searcher, size, dimension, settings)
  recall = measure_recall(index, vectors, config.recall_at, config.recall_sample)
  print(f'index: recall@{recall["at"]} {recall["recall"]:.4f} against exact search on '
        f'{recall["sample"]} vectors, {recall["self_recall"]:.4f} find themselves', flush=True)
  return recall


def measure_recall(
    index: Index, vectors: np.ndarray, k: int, sample: int) -> dict[str, Any]:
  """How much of the exact answer an index gives, on evenly spread vectors of its own.

  Returns:
    `recall`: share of the exact k nearest others that are among those found, counting ties
    as found; `self_recall`: share of vectors that find a vector at distance 0.
  """
  rows = np.unique(np.linspace(0, len(vectors) - 1, min(sample, len(vectors))).astype(int))
  queries = np.asarray(vectors[rows], np.float32)
  k = min(k, len(vectors) - 1)
  ids, distances = index.search(queries, k + 1)
  self_recall = float(np.mean(np.any(ids == rows[:, None], -1) | (distances[:, 0] <= 1e-6)))
  if not k:
    return {'at': 0, 'sample': len(rows), 'recall': 1.0, 'self_recall': self_recall}
  progress = Progress('recall', len(rows), 'queries')
  found = 0
  for first in range(0, len(rows), _QUERY_BLOCK):
    part = slice(first, first + _QUERY_BLOCK)
    truth, true_distances = exact_search(queries[part], array_blocks(vectors), k + 1)
    others = truth != rows[part, None]
    # Where the vector itself is not in its own list (more copies than k), one place is spare.
    others[np.all(others, -1), -1] = False
    for row in range(len(truth)):
      worst = true_distances[row, others[row]][-1]
      got = set(ids[first + row][distances[first + row] <= worst * (1 + 1e-5) + 1e-6].tolist())
      got.discard(int(rows[first + row]))
      got.discard(-1)
      found += min(k, len(got))
    progress.update(len(truth))
  return {'at': k, 'sample': len(rows), 'recall': found / (k * len(rows)),
          'self_recall': self_recall}
