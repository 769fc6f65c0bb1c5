"""Sequences and their neighbours as TFRecords: python tools/retrieve_neighbors.py --gin_file=... .

Does only what is not done. The work is in retro_jax/retrieval/pipeline.py.
"""

import dataclasses
from typing import Any

from retro_jax import configuration
from retro_jax.retrieval import pipeline, planning
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.pipeline import ExamplesConfig
from retro_jax.retrieval.policies import PolicyConfig
from retro_jax.retrieval.stages import BeamRunner, DistributedRunner, LocalRunner

CONFIGURABLES = (ExamplesConfig, PolicyConfig, LocalRunner, BeamRunner, DistributedRunner)


@dataclasses.dataclass(frozen=True)
class RetrieveNeighborsJob:
  """What to retrieve, from where.

  Attributes:
    examples: folder of the records.
    queries: chunk store whose sequences they are.
    database: chunk store that is searched; may be the same.
    index: folder of an index over `database`; '' for random neighbours.
    rerank: folder of a BM25 index over `database` that orders the nearest anew; '' for none.
    examples_config: lengths, numbers and the policy.
    runner: who searches and writes.
  """
  examples: str
  queries: str
  database: str
  index: str = ''
  rerank: str = ''
  examples_config: ExamplesConfig = ExamplesConfig()
  runner: Any = LocalRunner()


def run(job: RetrieveNeighborsJob) -> None:
  """Opens the stores and writes the records."""
  pipeline.build_examples(
      job.examples, ChunkDatabase.open(job.queries), ChunkDatabase.open(job.database),
      job.index or None, job.examples_config, job.runner, job.rerank or None)


def plan(job: RetrieveNeighborsJob) -> str:
  """What `run` would do, for `--dry_run`."""
  return planning.describe_examples(
      job.examples, ChunkDatabase.open(job.queries), ChunkDatabase.open(job.database),
      job.index or None, job.examples_config, job.rerank or None)


if __name__ == '__main__':
  configuration.main(RetrieveNeighborsJob, run, CONFIGURABLES, plan=plan)
