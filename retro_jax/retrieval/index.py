"""One part of an index: planned, built with settings that follow from measurement, loaded.

A part answers for the vectors it is given; several are put together in sharded_index.py.
Here it is decided how a part searches; the ways are exact.py, scann_part.py and
mesh_search.py. Which neighbours are allowed is not the business of any of them
(policies.py), nor is asking again when too few were (search.py).
"""

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from retro_jax.errors import UserError, nearest
from retro_jax.progress import duration
from retro_jax.retrieval import scann_part
from retro_jax.retrieval.exact import ExactPart
from retro_jax.retrieval.recall import RecallSample
from retro_jax.retrieval.scann_part import STORAGE_BYTES, ScannPart, ScannSettings, same_length

KINDS = ('auto', 'exact', 'scann', 'mesh')
# Candidates that tuning tries; the first is enough for vectors of one length.
_REORDERS = (20, 40, 80, 160, 320)
# What scoring one candidate again costs, in vectors scored by their hash (measured, d0 = 384).
_REORDER_COST = 15
# Below, ScaNN has too little to train its sixteen codes on.
_FEWEST_FOR_SCANN = 64


@dataclasses.dataclass(frozen=True)
class IndexConfig:
  """How to index; 0 lets measurement, or the number of vectors and the memory, decide.

  Attributes:
    kind: 'auto', 'exact', 'scann', or 'mesh' (brute force on the accelerators at hand).
    exact_below: with 'auto', parts of fewer vectors are searched exactly.
    vectors_per_part: an index over more vectors has more parts; memory is for one.
    memory_gib: what building one part may take beyond the process itself.
    target_recall: leaves_to_search and reorder, where they are 0, are the cheapest that
      reach it on a sample (surely, so by a standard error more); 0 takes a rule of thumb.
    leaves: partitions of the ScaNN tree (about the square root of the number of vectors).
    leaves_to_search: how many of them a query looks into.
    reorder: how many candidates are scored again.
    storage: of the vectors that ScaNN scores them with: 'float32', 'bfloat16' or 'int8'. The
      few that remain are scored from the embeddings themselves in any case.
    training_sample: vectors that tree and hashes are trained on.
    anisotropic_threshold: of ScaNN's quantisation.
    mesh_approximate: with kind 'mesh', approx_max_k instead of the exact top k.
    recall_sample: how many vectors recall is measured with.
    recall_at: k of that measurement.
    recall_warning: a part with less recall says so loudly.
  """

  kind: str = 'auto'
  exact_below: int = 20_000
  vectors_per_part: int = 262_144
  memory_gib: float = 4.0
  target_recall: float = 0.97
  leaves: int = 0
  leaves_to_search: int = 0
  reorder: int = 0
  storage: str = 'int8'
  training_sample: int = 0
  anisotropic_threshold: float = 0.2
  mesh_approximate: bool = False
  recall_sample: int = 1000
  recall_at: int = 10
  recall_warning: float = 0.9

  def __post_init__(self):
    if self.kind not in KINDS:
      raise UserError(f'IndexConfig: kind {self.kind!r} is unknown{nearest(self.kind, KINDS)}; '
                      f'expected one of {", ".join(KINDS)}')
    if self.storage not in STORAGE_BYTES:
      raise UserError(f'IndexConfig: storage {self.storage!r} is unknown'
                      f'{nearest(self.storage, STORAGE_BYTES)}; expected one of '
                      f'{", ".join(STORAGE_BYTES)}')
    for name in ('vectors_per_part', 'recall_sample', 'recall_at'):
      if getattr(self, name) < 1:
        raise UserError(f'IndexConfig: {name} is {getattr(self, name)}, expected at least 1')
    for name in ('exact_below', 'leaves', 'leaves_to_search', 'reorder', 'training_sample'):
      if getattr(self, name) < 0:
        raise UserError(f'IndexConfig: {name} is {getattr(self, name)}, expected at least 0')
    for name in ('target_recall', 'recall_warning'):
      if not 0 <= getattr(self, name) <= 1:
        raise UserError(f'IndexConfig: {name} is {getattr(self, name)}, expected 0 to 1')


class Part(Protocol):
  """What can be searched.

  Attributes:
    kind: 'exact', 'scann' or 'mesh'.
    size: number of vectors.
  """

  kind: str
  size: int

  def search(self, queries: np.ndarray, k: int, effort: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest vectors of each query.

    Args:
      queries: float32 [q, d0].
      k: how many.
      effort: multiplies the work of an approximate search (leaves, candidates).

    Returns:
      ids int64 [q, k] in this part and exact squared distances float32 [q, k], nearest
      first, equally far ones by id; -1 and inf where there are fewer than k.

    Raises:
      UserError: queries of another dimension, or not finite.
    """
    ...


@dataclasses.dataclass(frozen=True)
class PartPlan:
  """What building a part will take; estimates from measurements on a 2-core x86 machine.

  Attributes:
    search: 'exact', 'scann' or 'mesh'.
    size, dimension: of the vectors.
    settings: for 'scann'; leaves_to_search and reorder are a first guess where `tuned`.
    tuned: whether those two follow from measured recall.
    memory_bytes: while building, beyond the process itself.
    resident_bytes: while searching, beyond the embeddings.
    disk_bytes: of the stored part; an exact one stores nothing.
    seconds: of one core.
  """

  search: str
  size: int
  dimension: int
  settings: ScannSettings | None
  tuned: bool
  memory_bytes: int
  resident_bytes: int
  disk_bytes: int
  seconds: float

  def __str__(self) -> str:
    text = f'{self.size:,} vectors of {self.dimension}, '
    if self.settings is None:
      text += {'exact': 'exact search', 'mesh': 'brute force on the accelerators'}[self.search]
    else:
      s = self.settings
      searched = 'as measured' if self.tuned else f'{s.leaves_to_search:,} searched'
      text += f'ScaNN, {s.leaves:,} leaves, {searched}, {s.storage}'
    return (f'{text}; about {self.memory_bytes / 2**20:,.0f} MiB to build, '
            f'{self.resident_bytes / 2**20:,.0f} MiB to search, '
            f'{self.disk_bytes / 2**20:,.0f} MiB on disk, {duration(self.seconds)}')


def plan_part(size: int, dimension: int, config: IndexConfig) -> PartPlan:
  """What a part of `size` vectors of `dimension` would be.

  Raises:
    UserError: no vectors, or building does not fit into `memory_gib`.
  """
  if not size:
    raise UserError('no vectors to index; build the database with documents in it')
  search = config.kind
  if search == 'auto':
    search = 'exact' if size < config.exact_below else 'scann'
  if search == 'scann' and size < _FEWEST_FOR_SCANN:
    search = 'exact'
  if search != 'scann':
    # One block of float32 at a time here; on the accelerators, all of it.
    block = min(size, 16384) * dimension * 4
    resident = size * dimension * 4 if search == 'mesh' else 0
    return PartPlan(search, size, dimension, None, False, 3 * block, resident, 0, 0.0)
  settings, tuned = _settings(size, dimension, config)
  resident = settings.bytes_in_memory(size, dimension)
  memory = _build_bytes(size, dimension, settings)
  if memory > config.memory_gib * 2**30:
    fits = int(size * config.memory_gib * 2**30 / memory)
    raise UserError(
        f'a part of {size:,} vectors of {dimension} takes {memory / 2**30:.1f} GiB to build, '
        f'memory_gib is {config.memory_gib:g}; set IndexConfig.vectors_per_part to {fits:,} or '
        'less, or memory_gib higher')
  return PartPlan('scann', size, dimension, settings, tuned, memory, resident,
                  settings.bytes_on_disk(size, dimension),
                  _build_seconds(size, dimension, settings))


def _settings(size: int, dimension: int, config: IndexConfig) -> tuple[ScannSettings, bool]:
  """Settings before anything is measured, and whether measurement will change them."""
  leaves = min(size, config.leaves or max(1, round(math.sqrt(size))))
  settings = ScannSettings(
      leaves=leaves,
      leaves_to_search=min(leaves, config.leaves_to_search or math.ceil(1.6 * math.sqrt(leaves))),
      reorder=config.reorder or _REORDERS[1],
      storage=config.storage,
      one_length=True,
      training_sample=min(size, config.training_sample or 100_000),
      anisotropic_threshold=config.anisotropic_threshold)
  tuned = bool(config.target_recall) and not (config.leaves_to_search and config.reorder)
  return settings, tuned


def _build_bytes(size: int, dimension: int, settings: ScannSettings) -> int:
  # The rows, ScaNN's copy of them, what it trains on, what it keeps.
  rows = 4 * dimension * (2 * size + settings.training_sample)
  return rows + settings.bytes_on_disk(size, dimension)


def _build_seconds(size: int, dimension: int, settings: ScannSettings) -> float:
  return size * dimension * 1.2e-6


def build_part(
    folder: Path, vectors: Any, config: IndexConfig, threads: int = 0) -> dict[str, Any]:
  """Builds a part into a fresh folder; the same bytes from any process, with any `threads`.

  Args:
    folder: exists and is empty; it may be renamed afterwards.
    vectors: [n, d0], float16 or float32: anything with .shape, len() and rows by slice or
      integer array. An exact part reads them when it is searched, and stores nothing.
    config: the settings.
    threads: of ScaNN's training, 0 for all cores.

  Returns:
    What `load_part` needs and the manifest keeps: `search`, `settings`, `size`, `dimension`,
    `recall` (see recall.RecallSample.measure), `bytes_per_vector` of the stored files.

  Raises:
    UserError: no vectors, vectors that are not finite, or too little memory allowed.
  """
  size, dimension = vectors.shape
  plan = plan_part(size, dimension, config)
  print(f'index part: {plan}', flush=True)
  one_length = same_length(vectors)  # and all finite
  facts: dict[str, Any] = {'search': plan.search, 'size': size, 'dimension': dimension,
                           'settings': {}}
  if plan.search == 'exact':
    part: Part = ExactPart(vectors)
  elif plan.search == 'mesh':
    facts['settings'] = {'approximate': config.mesh_approximate}
    part = load_part(folder, facts, vectors) if config.mesh_approximate else ExactPart(vectors)
  else:
    settings = dataclasses.replace(plan.settings, one_length=one_length)
    part = scann_part.build(folder, vectors, settings, threads)
  if part.kind == 'exact':
    facts['recall'] = {'at': config.recall_at, 'sample': 0, 'recall': 1.0, 'self_recall': 1.0}
  else:
    sample = RecallSample.of(vectors, config.recall_at, config.recall_sample)
    if plan.tuned:
      tune(part, sample, config)
    facts['recall'] = sample.measure(part)
    _report_recall(facts['recall'], config)
  if isinstance(part, ScannPart):
    facts['settings'] = dataclasses.asdict(part.settings)
  stored = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
  facts['bytes_per_vector'] = round(stored / size, 1)
  return facts


def tune(part: ScannPart, sample: RecallSample, config: IndexConfig) -> None:
  """Gives `part` the cheapest leaves_to_search and reorder that reach the target recall.

  Cost is counted in vectors scored, not in seconds, so that every machine chooses alike.
  Where nothing reaches the target, what finds most is taken.
  """
  settings = part.settings
  target = min(config.target_recall + sample.standard_error, 1.0)
  per_leaf = part.size / settings.leaves
  leaves = [config.leaves_to_search] if config.leaves_to_search else _steps(settings.leaves)
  best: tuple[float, float, ScannSettings] | None = None
  for reorder in [config.reorder] if config.reorder else _REORDERS:
    low, high = 0, len(leaves) - 1
    while low <= high:
      middle = (low + high) // 2
      part.settings = dataclasses.replace(
          settings, leaves_to_search=leaves[middle], reorder=reorder)
      recall = sample.measure(part)['recall']
      cost = leaves[middle] * per_leaf + _REORDER_COST * reorder
      missing = max(0.0, target - recall)
      if best is None or (missing, cost) < best[:2]:
        best = missing, cost, part.settings
      if missing:
        low = middle + 1
      else:
        high = middle - 1
  part.settings = best[2]


def _steps(last: int) -> list[int]:
  """1, 2, 3, 4, 5, 7, 9, ...: each about a quarter more than the one before, up to `last`."""
  steps = [1]
  while steps[-1] < last:
    steps.append(min(last, max(steps[-1] + 1, round(steps[-1] * 1.25))))
  return steps


def _report_recall(recall: dict[str, Any], config: IndexConfig) -> None:
  """One line, and a loud one where recall is too low."""
  print(f'index part: recall@{recall["at"]} {recall["recall"]:.4f} against exact search for '
        f'{recall["sample"]:,} vectors, {recall["self_recall"]:.4f} find themselves', flush=True)
  if recall['recall'] < config.recall_warning:
    print(f'WARNING: recall@{recall["at"]} is {recall["recall"]:.4f}, below recall_warning '
          f'{config.recall_warning:g}: many of the nearest chunks will be missed. Set IndexConfig '
          "leaves_to_search or reorder higher (0 lets target_recall choose), or kind='exact'.",
          file=sys.stderr, flush=True)


def load_part(folder: Path, facts: dict[str, Any], vectors: Any, threads: int = 1) -> Part:
  """Opens what `build_part` made.

  Args:
    folder: where it lies now.
    facts: what `build_part` returned.
    vectors: the same vectors.
    threads: of ScaNN's search; the answers are the same.

  Raises:
    UserError: other vectors than it was built from, or files that cannot be read.
  """
  if tuple(vectors.shape) != (facts['size'], facts['dimension']):
    raise UserError(f'{folder}: indexes {facts["size"]} vectors of {facts["dimension"]}, the '
                    f'store holds {vectors.shape[0]} of {vectors.shape[1]}; build it again')
  if facts['search'] == 'exact':
    return ExactPart(vectors)
  if facts['search'] == 'mesh':
    from retro_jax.retrieval import mesh_search
    return mesh_search.MeshSearch(
        mesh_search.all_devices(), vectors, approximate=facts['settings']['approximate'])
  return scann_part.load(folder, ScannSettings(**facts['settings']), vectors, threads)


def latency(part: Part, queries: np.ndarray, k: int) -> dict[str, float]:
  """How long `part` takes, now, on this machine.

  Args:
    part: what is asked.
    queries: float32 [q, d0], at least one; each is asked alone, then all together.
    k: neighbours of each.

  Returns:
    `p50_ms`, `p90_ms`, `p99_ms` of wall-clock time for one query, and
    `queries_per_second` for all at once.
  """
  part.search(queries[:2], k)
  seconds = []
  for row in range(len(queries)):
    start = time.perf_counter()
    part.search(queries[row:row + 1], k)
    seconds.append(time.perf_counter() - start)
  start = time.perf_counter()
  part.search(queries, k)
  together = time.perf_counter() - start
  p50, p90, p99 = np.percentile(np.array(seconds) * 1e3, [50, 90, 99]).tolist()
  return {'p50_ms': p50, 'p90_ms': p90, 'p99_ms': p99,
          'queries_per_second': len(queries) / together}
