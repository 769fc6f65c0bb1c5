"""Bits-per-byte of a baseline and a RETRO: python -m retro_jax.evaluate --gin_file=... ."""

import dataclasses

from retro_jax import configuration
from retro_jax.evaluation import ablations, results
from retro_jax.evaluation.ablations import EvaluationConfig
from retro_jax.training.checkpoints import read_model_description
from retro_jax.training.partitioning import MeshConfig

CONFIGURABLES = (EvaluationConfig, MeshConfig)


@dataclasses.dataclass(frozen=True)
class EvaluateJob:
  """What to score, and where `results.json` goes.

  Attributes:
    output: folder for `results.json`.
    retro: folder of a RETRO run or exported model.
    baseline: folder of its baseline, or ''.
    examples: held-out retrieval examples.
    random_examples: the same sequences with random neighbours, or ''.
  """
  output: str
  retro: str
  examples: str
  baseline: str = ''
  random_examples: str = ''
  evaluation: EvaluationConfig = EvaluationConfig()
  mesh: MeshConfig = MeshConfig()


def evaluate(job: EvaluateJob) -> None:
  """Scores every setting there is material for and writes the results."""
  scores = ablations.compare(job.retro, job.baseline, job.examples, job.random_examples,
                             job.evaluation, job.mesh)
  neighbors = job.evaluation.num_neighbors or read_model_description(job.retro)[0].num_neighbors
  facts = results.examples_facts(job.examples)
  path = results.write(job.output, job, {
      'fingerprints': {key: facts[key] for key in ('queries', 'database', 'vocabulary')},
      'seed': 0,
      'examples': facts,
      'bits_per_byte': {setting: score.bits_per_byte for setting, score in scores.items()},
      'gains': results.gains(scores),
      'rows': results.rows(scores, job.examples, neighbors)})
  print(f'evaluate: wrote {path}')


if __name__ == '__main__':
  configuration.main(EvaluateJob, evaluate, CONFIGURABLES)
