"""Documents to a chunk database and its index: python tools/build_database.py --gin_file=... .

Trains or loads the vocabulary, cuts and embeds the documents, builds the index. Stages that
are current are skipped. The stages themselves are in retro_jax/retrieval/pipeline.py.
"""

import dataclasses
from typing import Any

from retro_jax import configuration
from retro_jax.data.corpus import JsonLines, SeqioDocuments, TextFiles, TfdsDocuments
from retro_jax.data.python_corpus import PythonLibrary
from retro_jax.retrieval import pipeline
from retro_jax.retrieval.embedders import (
    BertEmbedder, LexicalEmbedder, RandomEmbedder, on_local_devices)
from retro_jax.retrieval.index import IndexConfig
from retro_jax.retrieval.pipeline import DatabaseConfig

CONFIGURABLES = (TextFiles, JsonLines, TfdsDocuments, SeqioDocuments, PythonLibrary, BertEmbedder,
                 LexicalEmbedder, RandomEmbedder, DatabaseConfig, IndexConfig)


@dataclasses.dataclass(frozen=True)
class BuildDatabaseJob:
  """What to build and where.

  Attributes:
    database: folder of the chunk database.
    source: the documents.
    vocabulary: path of the SentencePiece model.
    embedder: turns chunks into vectors.
    vocabulary_size: pieces of a vocabulary to train on these documents; 0 loads an existing one.
    index: folder of the index; '' builds none (a store that is only queried needs none).
    database_config, index_config: the settings of the stages.
  """
  database: str
  source: Any
  vocabulary: str
  embedder: Any
  vocabulary_size: int = 0
  index: str = ''
  database_config: DatabaseConfig = DatabaseConfig()
  index_config: IndexConfig = IndexConfig()


def run(job: BuildDatabaseJob) -> None:
  """Runs the stages."""
  vocabulary = pipeline.build_vocabulary(job.vocabulary, job.source, job.vocabulary_size)
  database = pipeline.build_database(
      job.database, job.source, vocabulary, on_local_devices(job.embedder), job.database_config)
  if job.index:
    pipeline.build_index(job.index, database, job.index_config)


if __name__ == '__main__':
  configuration.main(BuildDatabaseJob, run, CONFIGURABLES)
