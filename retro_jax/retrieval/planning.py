"""What a build would do, before it does it: shards, what is stale and why, memory, disk, time.

Rates are those measured on CPU cores (docs/benchmarks/scaling.md); they say minutes or days,
not seconds.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

from retro_jax.data.vocabulary import Vocabulary
from retro_jax.progress import duration
from retro_jax.retrieval import database_build, neighbor_build, pipeline, sharded_index, stages
from retro_jax.retrieval import index as index_lib
from retro_jax.retrieval.bm25 import Bm25Config
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.database_build import DatabaseConfig
from retro_jax.retrieval.neighbor_build import ExamplesConfig

# Per worker: bytes of text cut a second, and chunks embedded a second by kind of embedder.
_BYTES_PER_SECOND = 2.5e6
_CHUNKS_PER_SECOND = {'bert': 30.0, 'lexical': 4000.0, 'random': 10000.0}
_BYTES_PER_TOKEN = 4.3
# Python, numpy, TensorFlow's and JAX's libraries in a worker.
_BASE_MEMORY = 0.7e9


def for_runner(embedder: Any, runner: Any, on_local_devices: Callable[[Any], Any]) -> Any:
  """The embedder as the processes of `runner` want it.

  Workers have one device each, and an embedder that names devices of this process cannot go
  there; a runner that works in this process uses all of them.
  """
  here = isinstance(runner, stages.DistributedRunner) or (
      isinstance(runner, stages.LocalRunner) and runner.workers == 0)
  if isinstance(runner, stages.DistributedRunner):
    assert isinstance(runner.leads, bool)  # joins the job before JAX looks for devices
  return on_local_devices(embedder) if here else embedder


def describe_build(job: Any, add: bool = False) -> str:
  """The plan of tools/build_database.py, for `--dry_run`; touches nothing.

  Args:
    job: a BuildDatabaseJob.
    add: whether documents are added to what there is.
  """
  state = pipeline.vocabulary_state(job.vocabulary, job.source, 0 if add else job.vocabulary_size)
  lines = [f'vocabulary {job.vocabulary}: {state}']
  workers = _workers(job.runner)
  inputs = job.source.shards()
  size = sum(shard.weight for shard in inputs)
  if state == 'train':
    lines.append(f'chunks: all {len(inputs):,} inputs, {size / 1e6:,.1f} MB, after the vocabulary')
    return '\n'.join(lines + _estimates(size, job, workers))
  vocabulary = Vocabulary.load(job.vocabulary)
  before = database_build.existing_manifest(job.database)
  tasks, _ = database_build.planned_chunks(
      job.database, job.source, vocabulary, job.database_config, before, add)
  lines.append(stages.describe('chunks', tasks, 'bytes'))
  done = [task for task in tasks if task.why_not_current() is None]
  if job.embedder:
    embed = database_build.embedding_tasks(
        job.database, [shard for task in done for shard in database_build.shards_of(task)],
        vocabulary, job.embedder)
    lines.append(stages.describe('embeddings', embed, 'chunks')
                 + (f' (of {len(done):,} inputs that are cut)' if len(done) < len(tasks) else ''))
  if job.index and len(done) == len(tasks) and not stages.pending(embed if job.embedder else []):
    try:
      database = ChunkDatabase.open(job.database)
      lines.append(stages.describe(
          'index', sharded_index.index_tasks(job.index, database, job.index_config), 'chunks'))
    except ValueError as error:
      lines.append(f'index: after the database ({error})')
  left = sum(task.weight for task in stages.pending(tasks))
  return '\n'.join(lines + _estimates(size, job, workers, left))


def describe_examples(
    folder: str, queries: ChunkDatabase, database: ChunkDatabase, index: str | None,
    config: ExamplesConfig, rerank: str | None = None) -> str:
  """The plan of tools/retrieve_neighbors.py, for `--dry_run`; touches nothing."""
  retrieval, _ = neighbor_build.prepared(folder, queries, database, index, config, rerank)
  num_chunks = config.sequence_length // queries.chunk_length
  sequences = -(-queries.num_chunks // num_chunks)
  blocks = neighbor_build.block_tasks(retrieval, sequences, num_chunks)
  lines = [stages.describe('near-duplicate documents', near, 'tasks')
           for near in [neighbor_build.near_task(retrieval)] if near]
  todo = [block for block, task in enumerate(blocks) if task.why_not_current() is not None]
  if retrieval.index:
    lines.append(stages.describe('neighbours', [
        task for block in todo for task in neighbor_build.search_tasks(
            retrieval, block, sequences, num_chunks)], 'chunks x parts'))
  lines.append(stages.describe('records', blocks, 'chunks'))
  width = 2 if queries.manifest['vocabulary']['size'] <= 1 << 16 else 4
  size = queries.num_chunks * (queries.chunk_length * width + config.num_neighbors * (
      2 * queries.chunk_length * width + 12))
  return '\n'.join([*lines, f'expected: {sequences:,} sequences, {size / 1e9:,.2f} GB on disk'])


def _workers(runner: Any) -> int:
  if isinstance(runner, stages.LocalRunner):
    return (os.cpu_count() or 1) if runner.workers < 0 else max(1, runner.workers)
  return 1


def _estimates(size: float, job: Any, workers: int, left: float | None = None) -> Sequence[str]:
  """Expected chunks, disk, memory and time of a build over `size` bytes of input."""
  config: DatabaseConfig = job.database_config
  chunks = max(1, int(size / (_BYTES_PER_TOKEN * config.chunk_length)))
  width = job.embedder.dimension if job.embedder else 0
  kind = job.embedder.describe()['kind'] if job.embedder else ''
  seconds = (size if left is None else left) / _BYTES_PER_SECOND / workers
  if job.embedder:
    seconds += chunks / _CHUNKS_PER_SECOND.get(kind, 100.0) / workers
  disk = chunks * (config.chunk_length * 2 + 12 + 2 * width)
  memory = _BASE_MEMORY + config.chunks_per_shard * (4 * config.chunk_length + 6 * width)
  lines = [f'expected: {chunks:,} chunks, {disk / 1e9:,.2f} GB on disk, '
           f'{memory / 1e9:,.1f} GB of memory in each of {workers} workers, '
           f'about {duration(seconds)} on CPU cores like those of the benchmark']
  if job.index and not isinstance(job.index_config, Bm25Config) and width:
    part = min(chunks, job.index_config.vectors_per_part)
    plan = index_lib.plan_part(part, width, job.index_config)
    lines.append(f'index: {-(-chunks // part):,} parts, each {plan}')
  return lines
