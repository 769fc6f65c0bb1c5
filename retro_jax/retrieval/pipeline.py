"""The offline stages in order: vocabulary, database, index, neighbours as records.

Each function does what is not done yet and says in one line what came of it. The stages
themselves are in database_build.py, sharded_index.py and neighbor_build.py, who runs them
in stages.py.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from retro_jax import files, storage
from retro_jax.data import records
from retro_jax.data.vocabulary import Vocabulary, train_vocabulary
from retro_jax.retrieval import database as database_lib
from retro_jax.retrieval import database_build, neighbor_build, sharded_index, stages
from retro_jax.retrieval.bm25 import Bm25Config
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.database_build import DatabaseConfig
from retro_jax.retrieval.index import IndexConfig
from retro_jax.retrieval.neighbor_build import ExamplesConfig
from retro_jax.retrieval.sharded_index import Index

__all__ = ['DatabaseConfig', 'ExamplesConfig', 'build_database', 'build_examples', 'build_index',
           'build_vocabulary']


def build_vocabulary(path: str | os.PathLike, source: Any, size: int, seed: int = 0) -> Vocabulary:
  """Stage 0: a vocabulary trained on a sample of a source.

  What it was trained on stands beside it in `path`.inputs. A model without that file is someone
  else's: it is loaded, never replaced.

  Args:
    path: the SentencePiece model.
    source: of documents.
    size: number of pieces; 0 only loads.
    seed: of the sample.

  Raises:
    UserError: nothing to load, a model that is unfit, or too little text for the size.
  """
  state = vocabulary_state(path, source, size, seed)
  if state != 'train':
    vocabulary = Vocabulary.load(path)
    print(f'vocabulary {path}: {state}, {vocabulary.size:,} pieces', flush=True)
    return vocabulary
  # In this order no kill can leave a model beside inputs that are not its own.
  Path(path).unlink(missing_ok=True)
  with storage.atomic_file(f'{path}.inputs') as file:
    file.write(_vocabulary_inputs(source, size, seed))
  vocabulary = train_vocabulary(
      (document.text for document in source.documents()), path, size, seed)
  print(f'vocabulary {path}: trained, {vocabulary.size:,} pieces', flush=True)
  return vocabulary


def vocabulary_state(path: str | os.PathLike, source: Any, size: int, seed: int = 0) -> str:
  """What `build_vocabulary` would do: 'loaded', 'current, skipped' or 'train'."""
  facts = Path(f'{path}.inputs')
  if not size or (files.exists(path) and not facts.exists()):
    return 'loaded'
  if Path(path).exists() and facts.read_text(encoding='utf-8') == _vocabulary_inputs(
      source, size, seed):
    return 'current, skipped'
  return 'train'


def _vocabulary_inputs(source: Any, size: int, seed: int) -> str:
  return storage.fingerprint({'source': source.describe(), 'size': size, 'seed': seed})


def build_database(
    folder: str | os.PathLike, source: Any, vocabulary: Any, embedder: Any | None,
    config: DatabaseConfig = DatabaseConfig(), runner: stages.Runner = stages.HERE,
    add: bool = False) -> ChunkDatabase:
  """Stage 1: a chunk store from a source of documents; see `build_chunk_database`."""
  before = _identity(folder)
  database = database_build.build_chunk_database(
      folder, source, vocabulary, config, embedder, runner, add)
  said = 'current, skipped' if _identity(folder) == before else 'built'
  if runner.leads:
    print(f'database {folder}: {said}; {database_lib.describe(database)}', flush=True)
    if said == 'built':
      known = {field.name for field in dataclasses.fields(source.report)}
      found = {k: v for k, v in database.manifest['report'].items() if k in known}
      print(f'database {folder}: {type(source.report)(**found)}', flush=True)
  return database


def build_index(
    folder: str | os.PathLike, database: ChunkDatabase,
    config: IndexConfig | Bm25Config = IndexConfig(),
    runner: stages.Runner = stages.HERE) -> Index:
  """Stage 2: an index over a store; see sharded_index.py."""
  before = _identity(folder)
  index = sharded_index.build_index(folder, database, config, runner)
  said = 'current, skipped' if _identity(folder) == before else 'built'
  recall = index.manifest['recall']
  measured = f', recall@{recall["at"]} {recall["recall"]:.4f}' if recall else ''
  if runner.leads:
    print(f'index {folder}: {said}; {index.kind}, {index.size:,} chunks in '
          f'{len(index.ranges()):,} parts{measured}', flush=True)
  return index


def build_examples(
    folder: str | os.PathLike,
    queries: ChunkDatabase,
    database: ChunkDatabase,
    index_folder: str | os.PathLike | None,
    config: ExamplesConfig = ExamplesConfig(),
    runner: stages.Runner = stages.HERE,
    rerank_folder: str | os.PathLike | None = None,
) -> records.Examples:
  """Stage 3: the sequences of a store with their neighbours; see neighbor_build.py."""
  before = _identity(folder)
  examples = neighbor_build.build_examples(
      folder, queries, database, index_folder, config, runner, rerank_folder)
  if not runner.leads:
    return examples
  if _identity(folder) == before:
    print(f'examples {folder}: current, skipped; {len(examples):,} sequences', flush=True)
    return examples
  counts = dict(examples.manifest['policy']['counts'])
  chunks, fewer = counts.pop('chunks', 0), counts.pop('chunks_with_fewer', 0)
  counts.pop('empty_places', None)
  print(f'examples {folder}: {len(examples):,} sequences; of {chunks:,} chunks {fewer:,} have '
        f'fewer than {config.num_neighbors} neighbours; '
        + (', '.join(f'{n:,} {reason}' for reason, n in counts.items()) or 'none turned away'),
        flush=True)
  return examples


def _identity(folder: str | os.PathLike) -> str | None:
  """Tells a finished artefact from one that replaces it; None where there is none."""
  path = files.join(folder, storage.MANIFEST)
  return storage.fingerprint(files.read_bytes(path).decode()) if files.exists(path) else None
