"""Sequences and their neighbours as TFRecords: python tools/retrieve_neighbors.py --gin_file=... .

Skipped when current. The work is in retro_jax/retrieval/pipeline.py.
"""

import dataclasses

from retro_jax import configuration
from retro_jax.retrieval import pipeline
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.pipeline import ExamplesConfig
from retro_jax.retrieval.policies import PolicyConfig

CONFIGURABLES = (ExamplesConfig, PolicyConfig)


@dataclasses.dataclass(frozen=True)
class RetrieveNeighborsJob:
  """What to retrieve, from where.

  Attributes:
    examples: folder of the records.
    queries: chunk store whose sequences they are.
    database: chunk store that is searched; may be the same.
    index: folder of an index over `database`; '' for random neighbours.
    examples_config: lengths, numbers and the policy.
  """
  examples: str
  queries: str
  database: str
  index: str = ''
  examples_config: ExamplesConfig = ExamplesConfig()


def run(job: RetrieveNeighborsJob) -> None:
  """Opens the stores and writes the records."""
  pipeline.build_examples(
      job.examples, ChunkDatabase.open(job.queries), ChunkDatabase.open(job.database),
      job.index or None, job.examples_config)


if __name__ == '__main__':
  configuration.main(RetrieveNeighborsJob, run, CONFIGURABLES)
