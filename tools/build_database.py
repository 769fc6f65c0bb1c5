"""Documents to a chunk database and its index, and what a database needs later.

  build_database.py [build] --gin_file=... [--gin.X=...] [--dry_run]
  build_database.py add --gin_file=...          keep what there is, put more documents behind it
  build_database.py remove DATABASE ID ...      nobody may see these documents any more; an ID
                                                @FILE names a file with one id a line
  build_database.py compact DATABASE [INDEX]    rewrite what still holds them
  build_database.py verify FOLDER ...           check every byte; exit code 1 when damaged

`build` does only what is missing or stale. The stages are in retro_jax/retrieval/.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from retro_jax import configuration
from retro_jax.data.corpus import JsonLines, TextFiles
from retro_jax.data.dataset_corpus import SeqioDocuments, TfdsDocuments
from retro_jax.data.python_corpus import PythonLibrary
from retro_jax.data.wikitext import WikiText
from retro_jax.errors import EXIT_CODE, UserError
from retro_jax.retrieval import database_edit, pipeline, planning
from retro_jax.retrieval.bm25 import Bm25Config
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.embedders import (
  BertEmbedder,
  LexicalEmbedder,
  RandomEmbedder,
  on_local_devices,
)
from retro_jax.retrieval.index import IndexConfig
from retro_jax.retrieval.pipeline import DatabaseConfig
from retro_jax.retrieval.sharded_index import rebuild_index
from retro_jax.retrieval.stages import BeamRunner, DistributedRunner, LocalRunner

CONFIGURABLES = (TextFiles, JsonLines, WikiText, TfdsDocuments, SeqioDocuments, PythonLibrary,
                 BertEmbedder, LexicalEmbedder, RandomEmbedder, DatabaseConfig, IndexConfig,
                 Bm25Config, LocalRunner, BeamRunner, DistributedRunner)


@dataclasses.dataclass(frozen=True)
class BuildDatabaseJob:
  """What to build and where.

  Attributes:
    database: folder of the chunk database.
    source: the documents.
    vocabulary: path of the SentencePiece model.
    embedder: turns chunks into vectors; None for a store that is searched by BM25 alone.
    vocabulary_size: pieces of a vocabulary to train on these documents; 0 loads an existing one.
    index: folder of the index; '' builds none (a store that is only queried needs none).
    database_config, index_config: the settings of the stages; a Bm25Config indexes words.
    runner: who runs the stages.
  """
  database: str
  source: Any
  vocabulary: str
  embedder: Any
  vocabulary_size: int = 0
  index: str = ''
  database_config: DatabaseConfig = DatabaseConfig()
  index_config: Any = IndexConfig()
  runner: Any = LocalRunner()


def build(job: BuildDatabaseJob, add: bool = False) -> None:
  """Runs the stages."""
  vocabulary = pipeline.build_vocabulary(
      job.vocabulary, job.source, 0 if add else job.vocabulary_size)
  embedder = job.embedder and planning.for_runner(job.embedder, job.runner, on_local_devices)
  database = pipeline.build_database(
      job.database, job.source, vocabulary, embedder, job.database_config, job.runner, add)
  if job.index:
    pipeline.build_index(job.index, database, job.index_config, job.runner)


def remove(folder: str, *ids: str) -> None:
  """The `remove` command."""
  wanted: list[str] = []
  for name in ids:
    try:
      wanted += Path(name[1:]).read_text(encoding='utf-8').splitlines() if (
          name.startswith('@')) else [name]
    except OSError as error:
      raise UserError(f'{name[1:]}: cannot read ids ({error.strerror}); name a text file with '
                      'one id a line') from None
  count = database_edit.remove_documents(folder, wanted)
  print(f'{folder}: {count:,} documents removed; no search returns them any more. Records made '
        'before still hold what they retrieved: run retrieve_neighbors.py again. `compact` takes '
        'the text off the disk.')


def compact(folder: str, index: str = '') -> None:
  """The `compact` command."""
  count = database_edit.compact(folder)
  print(f'{folder}: {count:,} documents taken out')
  if index:
    rebuild_index(index, ChunkDatabase.open(folder))
    print(f'{index}: built again where it held them')


def verify(*folders: str) -> None:
  """The `verify` command."""
  found = [line for folder in folders for line in database_edit.verify(folder)]
  print('\n'.join(found) if found else f'{", ".join(folders)}: every byte is as it was written')
  if found:
    print(f'{len(found)} damaged and set aside; run the build again: it makes them anew, and '
          'nothing else')
    sys.exit(1)


COMMANDS = {'remove': (remove, 2), 'compact': (compact, 1), 'verify': (verify, 1)}


def main(argv: list[str]) -> None:
  command = argv[0] if argv and not argv[0].startswith('-') else ''
  if command in COMMANDS:
    function, least = COMMANDS[command]
    try:
      if len(argv) <= least:
        raise UserError(f'{command}: too few arguments; see build_database.py --help')
      function(*argv[1:])
    except UserError as error:
      print(f'error: {error}', file=sys.stderr, flush=True)
      sys.exit(EXIT_CODE)
    return
  configuration.main(
      BuildDatabaseJob, lambda job: build(job, command == 'add'), CONFIGURABLES,
      argv[1:] if command in ('build', 'add') else argv,
      plan=lambda job: planning.describe_build(job, command == 'add'))


if __name__ == '__main__':
  main(sys.argv[1:])
