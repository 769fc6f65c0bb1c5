"""Bits of every single token of a split, in one pass that can be interrupted.

What all further numbers come from: bits-per-byte with any stride, leakage curves, perplexity
of words. Which windows are read is data/windows.py's business; here they run through the
model in batches, and finished shards of documents are kept beside what they depend on:

  NAME/shard-00000/   kind 'token-scores': bits.npy, float32 [chunks, m]

The bits of a token stand in its own chunk at its own place, wherever it was predicted from.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from retro_jax import storage
from retro_jax.data import batches, windows
from retro_jax.data.records import Examples
from retro_jax.data.windows import Documents, Reading
from retro_jax.errors import UserError
from retro_jax.evaluation.bits_per_byte import Score
from retro_jax.models.config import RetroConfig
from retro_jax.progress import Progress
from retro_jax.training import checkpoints, distributed, partitioning, step

KIND = 'token-scores'
FORMAT_VERSION = 1
# A shard is scored anew when it is interrupted.
CHUNKS_A_SHARD = 1 << 14


@dataclasses.dataclass(frozen=True)
class Model:
  """A model ready to score: `config`, `parameters` by name, and a fingerprint of both."""

  config: RetroConfig
  parameters: Mapping[str, jax.Array]
  fingerprint: str


def fingerprinted(config: RetroConfig, parameters: Mapping[str, jax.Array]) -> Model:
  """The model with a fingerprint of its values, whatever file they came from."""
  digest = hashlib.sha256()
  for name in sorted(parameters):
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(parameters[name]).data)
  return Model(config, parameters,
               storage.fingerprint([dataclasses.asdict(config), digest.hexdigest()]))


def load(folder: str, examples: Examples) -> Model:
  """A finished model that fits some examples.

  Args:
    folder: of a run or exported model.
    examples: it is to be asked about.

  Raises:
    UserError: no model there, or one of another vocabulary or chunk length.
  """
  config, parameters, vocabulary = checkpoints.load_model(folder)
  made_with = examples.manifest['vocabulary']['fingerprint']
  if made_with != vocabulary['fingerprint']:
    raise UserError(f'{folder} was trained with vocabulary {vocabulary["fingerprint"]}, but '
                    f'{examples.folder} was made with {made_with}; rebuild the examples '
                    "with the model's vocabulary")
  if examples.shape.chunk_length != config.chunk_length:
    raise UserError(f'{folder} has chunks of {config.chunk_length} tokens, {examples.folder} of '
                    f'{examples.shape.chunk_length}; rebuild the examples')
  return fingerprinted(config, parameters)


@dataclasses.dataclass(frozen=True)
class TokenScores:
  """Bits of all tokens of some documents.

  Attributes:
    documents: which, and their bytes.
    shards: bits, float32 [chunks, m] each, of consecutive documents; 0 for tokens that nobody
      predicts. Memory maps where they were kept on disk.
  """

  documents: Documents
  shards: Sequence[np.ndarray]

  @functools.cached_property
  def by_chunk(self) -> np.ndarray:
    """Bits of each chunk's tokens, float64 [chunks]."""
    return np.concatenate([shard.sum(-1, dtype=np.float64) for shard in self.shards])

  def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
    """(first chunk, bits [chunks, m]) of each shard."""
    first = 0
    for shard in self.shards:
      yield first, np.asarray(shard)
      first += len(shard)

  def score(self, chunks: np.ndarray | None = None) -> Score:
    """Sums by document, of all chunks or those where `chunks`, bool [chunks], is true.

    Documents without such a chunk are left out.
    """
    keep = np.ones(self.documents.num_chunks, bool) if chunks is None else chunks
    by_document = lambda x: np.bincount(self.documents.document, x * keep, len(self.documents))
    there = by_document(np.ones(len(keep))) > 0
    return Score(self.documents.ordinals[there], *(by_document(x)[there] for x in (
        self.by_chunk, self.documents.text_bytes, self.documents.targets)))


def score(model: Model, documents: Documents, reading: Reading, mesh: Mesh, *,
          batch_size: int, stride: int = 0, neighbors: Examples | None = None,
          folder: str | os.PathLike | None = None, chunks_a_shard: int = CHUNKS_A_SHARD,
          label: str = '') -> TokenScores:
  """Scores every token but the first of each document, once.

  Args:
    model: any; without CCA layers it can only read nothing.
    documents: of the split.
    reading: what is retrieved.
    mesh: rows of a batch lie over data x fsdp.
    batch_size: rows, of all processes together; changes nothing but speed.
    stride: in tokens between windows inside a document; 0 for half a window, as in the paper;
      n for the stored sequences, cut anywhere, as training sees them.
    neighbors: records of the same sequences to take neighbours from; None for the split's own.
    folder: where finished shards are kept and taken from; None keeps them in memory.
    chunks_a_shard: documents are put together until they have so many.
    label: for the progress line.

  Raises:
    UserError: a stride, batch or neighbours that do not fit.
  """
  neighbors = neighbors or documents.examples
  check(model.config, documents, reading, neighbors)
  in_chunks = windows.stride_in_chunks(documents.examples, stride)
  rows_here = batches.rows_of_process(mesh, batch_size)
  shards = list(_shards(documents, chunks_a_shard))
  progress = Progress(f'evaluate: {label or "tokens"}', documents.num_chunks, 'chunks')
  run: Callable[[windows.Row], np.ndarray] | None = None
  parts = []
  leads = jax.process_index() == 0
  keeping = folder is not None and leads
  with storage.locked(folder) if keeping else contextlib.nullcontext():
    for number, (first, last) in enumerate(shards):
      inputs = _inputs(model, documents, reading, neighbors, in_chunks, first, last)
      place = folder and Path(folder) / f'shard-{number:05d}'
      why = storage.why_not_current(place, KIND, inputs) if keeping else 'not kept'
      if folder is not None and not distributed.agreed(float(why is not None)):
        parts.append(np.load(place / 'bits.npy', mmap_mode='r'))
        progress.done += len(parts[-1])
        continue
      if why is not None and why.startswith(('stale', 'damaged')):
        print(f'evaluate: {place}: {why}; scored anew', flush=True)
      run = run or _runner(model, documents, reading, neighbors, mesh, rows_here)
      bits = _score_shard(run, documents, first, last, in_chunks, batch_size, progress)
      if keeping:
        with storage.building(place, {'kind': KIND, 'format_version': FORMAT_VERSION,
                                      'inputs': inputs}) as temporary:
          storage.save_array(temporary / 'bits.npy', bits)
        bits = np.load(place / 'bits.npy', mmap_mode='r')
      parts.append(bits)
  progress.close()
  return TokenScores(documents, parts)


def check(model: RetroConfig, documents: Documents, reading: Reading, neighbors: Examples) -> None:
  """Refuses what cannot be scored.

  Raises:
    UserError: a baseline that is to read, neighbours of other texts, or too few of them.
  """
  if reading.num_neighbors and not model.has_retrieval:
    raise UserError('a baseline without CCA layers cannot read neighbours; give a RETRO')
  check_same_texts(documents.examples, neighbors)
  if reading.num_neighbors > neighbors.shape.num_neighbors:
    raise UserError(f'{neighbors.folder}: holds {neighbors.shape.num_neighbors} neighbours a '
                    f'chunk, {reading.num_neighbors} asked for; retrieve more or lower '
                    'num_neighbors')


def check_same_texts(ours: Examples, theirs: Examples) -> None:
  """Refuses two folders of examples that are not the same sequences.

  Raises:
    UserError: says in what they differ.
  """
  for what in ('sequence_length', 'chunk_length', 'vocabulary', 'num_examples'):
    if ours.manifest[what] != theirs.manifest[what]:
      raise UserError(f'{ours.folder} has {what} {ours.manifest[what]} but {theirs.folder} has '
                      f'{theirs.manifest[what]}; build both from the same queries')
  if ours.manifest['inputs']['queries'] != theirs.manifest['inputs']['queries']:
    raise UserError(f'{theirs.folder} holds neighbours of other texts than {ours.folder}; build '
                    'both from the same queries')


def _inputs(model: Model, documents: Documents, reading: Reading, neighbors: Examples,
            stride: int, first: int, last: int) -> dict[str, Any]:
  """What the bits of a shard depend on. Batch size and mesh are not among it."""
  return {'format_version': FORMAT_VERSION, 'model': model.fingerprint,
          'examples': documents.examples.fingerprint,
          'neighbors': neighbors.fingerprint if reading.num_neighbors else None,
          'reading': dataclasses.asdict(reading), 'stride_chunks': stride,
          'documents': [first, last], 'chunks': documents.num_chunks if reading.shuffled else None}


def _shards(documents: Documents, chunks_a_shard: int) -> Iterator[tuple[int, int]]:
  """Ranges of documents, each of as few as have `chunks_a_shard` chunks."""
  first = 0
  while first < len(documents):
    last = int(np.searchsorted(documents.starts, documents.starts[first] + chunks_a_shard))
    last = min(max(last, first + 1), len(documents))
    yield first, last
    first = last


def _runner(model: Model, documents: Documents, reading: Reading, neighbors: Examples, mesh: Mesh,
            rows_here: slice) -> Callable[[Sequence[windows.Row]], jax.Array]:
  retrieval = reading.num_neighbors > 0
  token_step = _token_step(model.config, mesh, retrieval)
  parameters = jax.device_put(dict(model.parameters), partitioning.replicated(mesh))

  def run(some: Sequence[windows.Row]) -> jax.Array:
    """Bits of each position's target, float32 [rows of all processes, n], perhaps pending."""
    made = windows.arrays(documents, some[rows_here], reading, neighbors)
    return token_step(parameters, batches.to_global(
        {name: made[name] for name in step.scoring_inputs(retrieval)}, mesh))

  return run


@functools.lru_cache(8)  # the settings of a sweep share what was compiled
def _token_step(config: RetroConfig, mesh: Mesh, retrieval: bool) -> Callable[..., jax.Array]:
  return step.make_token_step(config, mesh, partitioning.replicated(mesh), retrieval)


def _score_shard(run: Callable[[Sequence[windows.Row]], jax.Array], documents: Documents,
                 first: int, last: int, stride: int, batch_size: int, progress: Progress
                 ) -> np.ndarray:
  """Bits of the tokens of documents [first, last): float32 [chunks, m]."""
  begin, end = int(documents.starts[first]), int(documents.starts[last])
  m = documents.examples.shape.chunk_length
  by_position = np.zeros((end - begin, m), np.float32)

  def keep(some: Sequence[windows.Row], pending: jax.Array) -> None:
    chunks = np.stack([row.chunks for row in some])
    scored = np.stack([row.scored for row in some])
    bits = np.asarray(pending).reshape(*chunks.shape, m)
    by_position[chunks[scored] - begin] = bits[scored]
    progress.update(int(scored.sum()))

  waiting = None  # the device works on one batch while the host makes the next
  for some in _batches(windows.rows(documents, first, last, stride), batch_size):
    started = some, run(some)
    if waiting:
      keep(*waiting)
    waiting = started
  if waiting:
    keep(*waiting)
  # The target of a position is the token after it.
  flat = by_position.ravel()
  return np.concatenate([np.zeros(1, np.float32), flat[:-1]]).reshape(by_position.shape)


def _batches(rows: Iterator[windows.Row], batch_size: int) -> Iterator[list[windows.Row]]:
  some: list[windows.Row] = []
  for row in rows:
    some.append(row)
    if len(some) == batch_size:
      yield some
      some = []
  if some:
    empty = windows.Row(np.full_like(some[0].chunks, -1), np.zeros_like(some[0].scored))
    yield some + [empty] * (batch_size - len(some))
