"""Everything that training and evaluation read, for several splits: one command.

  build_retrieval.py --gin_file=gin/data/retrieval.gin --gin.FOLDER=... --gin.TRAIN=... [--dry_run]

The train split is the database; the sequences of every split get their neighbours from it.
Does only what is missing or stale. The stages are in retro_jax/retrieval/.
"""

import dataclasses
from typing import Any

from retro_jax import configuration, files
from retro_jax.data.corpus import JsonLines, TextFiles
from retro_jax.data.dataset_corpus import SeqioDocuments, TfdsDocuments
from retro_jax.data.wikitext import WikiText
from retro_jax.retrieval import pipeline, planning
from retro_jax.retrieval.bm25 import Bm25Config
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.embedders import (
  BertEmbedder,
  LexicalEmbedder,
  RandomEmbedder,
  on_local_devices,
)
from retro_jax.retrieval.index import IndexConfig
from retro_jax.retrieval.pipeline import DatabaseConfig, ExamplesConfig
from retro_jax.retrieval.policies import PolicyConfig
from retro_jax.retrieval.stages import BeamRunner, DistributedRunner, LocalRunner

CONFIGURABLES = (TextFiles, JsonLines, WikiText, TfdsDocuments, SeqioDocuments, BertEmbedder,
                 LexicalEmbedder, RandomEmbedder, DatabaseConfig, IndexConfig, Bm25Config,
                 ExamplesConfig, PolicyConfig, LocalRunner, BeamRunner, DistributedRunner)


@dataclasses.dataclass(frozen=True)
class BuildRetrievalJob:
  """What to build and where.

  Attributes:
    folder: gets vocabulary.model, stores/SPLIT, index, examples/SPLIT.
    sources: documents by split; 'train' is the database.
    embedder: turns chunks into vectors; None with a Bm25Config as `index_config`.
    vocabulary: path of a SentencePiece model to load; '' trains one of `vocabulary_size` pieces.
    vocabulary_size: of a vocabulary to train on the train split.
    random: splits that also get random neighbours, in examples/SPLIT_random.
    database_config, index_config, examples_config: the settings of the stages.
    rerank_config: a Bm25Config orders the nearest anew by words; None does not.
    runner: who runs the stages.
  """
  folder: str
  sources: dict[str, Any]
  embedder: Any
  vocabulary: str = ''
  vocabulary_size: int = 32000
  random: tuple[str, ...] = ()
  database_config: DatabaseConfig = DatabaseConfig()
  index_config: Any = IndexConfig()
  examples_config: ExamplesConfig = ExamplesConfig()
  rerank_config: Any = None
  runner: Any = LocalRunner()

  def path(self, *parts: str) -> str:
    return files.join(self.folder, *parts)

  def given_sources(self) -> dict[str, Any]:
    """Splits that were named; a source without a pattern stands for none."""
    return {split: source for split, source in self.sources.items()
            if getattr(source, 'pattern', True)}


def run(job: BuildRetrievalJob) -> None:
  """Runs the stages."""
  sources = job.given_sources()
  vocabulary = pipeline.build_vocabulary(
      job.vocabulary or job.path('vocabulary.model'), sources['train'],
      0 if job.vocabulary else job.vocabulary_size)
  embedder = job.embedder and planning.for_runner(job.embedder, job.runner, on_local_devices)
  stores: dict[str, ChunkDatabase] = {
      split: pipeline.build_database(job.path('stores', split), source, vocabulary, embedder,
                                     job.database_config, job.runner)
      for split, source in sources.items()}
  index, rerank = job.path('index'), job.rerank_config and job.path('rerank')
  pipeline.build_index(index, stores['train'], job.index_config, job.runner)
  if rerank:
    pipeline.build_index(rerank, stores['train'], job.rerank_config, job.runner)
  for split, queries in stores.items():
    pipeline.build_examples(job.path('examples', split), queries, stores['train'], index,
                            job.examples_config, job.runner, rerank)
    if split in job.random:
      pipeline.build_examples(
          job.path('examples', f'{split}_random'), queries, stores['train'], None,
          dataclasses.replace(job.examples_config, kind='random'), job.runner)


def plan(job: BuildRetrievalJob) -> str:
  """What `run` would do, for `--dry_run`: split by split."""
  lines = []
  for split, source in job.given_sources().items():
    lines.append(f'{split}:')
    lines.append(planning.describe_build(_DatabasePart(
        job.path('stores', split), source, job.vocabulary or job.path('vocabulary.model'),
        0 if job.vocabulary or split != 'train' else job.vocabulary_size, job.embedder,
        job.path('index') if split == 'train' else '', job.database_config, job.index_config,
        job.runner)))
  return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class _DatabasePart:
  """One split as `planning.describe_build` wants it."""
  database: str
  source: Any
  vocabulary: str
  vocabulary_size: int
  embedder: Any
  index: str
  database_config: DatabaseConfig
  index_config: Any
  runner: Any


if __name__ == '__main__':
  configuration.main(BuildRetrievalJob, run, CONFIGURABLES, plan=plan)
