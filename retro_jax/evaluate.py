"""Bits-per-byte of a baseline and a RETRO: python -m retro_jax.evaluate --gin_file=... [--gate].

With `--gate` the command ends with exit code 3 when RETRO does not gain from its neighbours.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax

from retro_jax import configuration
from retro_jax.errors import UserError
from retro_jax.evaluation import ablations, gate, leakage, results, words
from retro_jax.evaluation.ablations import EvaluationConfig, SweepConfig
from retro_jax.evaluation.gate import GateConfig
from retro_jax.evaluation.leakage import LeakageConfig
from retro_jax.training import distributed
from retro_jax.training.distributed import DistributedConfig
from retro_jax.training.partitioning import MeshConfig

CONFIGURABLES = (EvaluationConfig, SweepConfig, LeakageConfig, GateConfig, MeshConfig,
                 DistributedConfig)


@dataclasses.dataclass(frozen=True)
class EvaluateJob:
  """What to score, and where `results.json` goes.

  Attributes:
    output: folder for `results.json` and the scores of single tokens.
    retro: folder of a RETRO run or exported model.
    baseline: folder of its baseline, or ''.
    examples: held-out retrieval examples.
    random_examples: the same sequences with random neighbours, or ''.
    queries: the store of the held-out texts; '' looks where it was when the examples were made.
    evaluation: how it is scored.
    sweep: what else is scored.
    leakage: how shared text is measured; None leaves that out.
    words: whether to give the perplexity of words, by WikiText's convention.
    gate: what RETRO[ON] has to show, or None.
    mesh: devices.
    distributed: how this process finds the others.
  """
  output: str
  retro: str
  examples: str
  baseline: str = ''
  random_examples: str = ''
  queries: str = ''
  evaluation: EvaluationConfig = EvaluationConfig()
  sweep: SweepConfig = SweepConfig()
  leakage: LeakageConfig | None = LeakageConfig()
  words: bool = False
  gate: GateConfig | None = None
  mesh: MeshConfig = MeshConfig()
  distributed: DistributedConfig = DistributedConfig()


def evaluate(job: EvaluateJob) -> None:
  """Scores every setting there is material for and writes the results.

  Processes of one job share the model's work; the first of them writes, to a folder that all see.

  Raises:
    UserError: models, examples and settings that do not fit each other.
    GateFailed: the results, which are written, do not pass the gate.
  """
  distributed.join(job.distributed)
  settings = ablations.main_settings(
      job.retro, job.baseline, job.examples, job.random_examples, job.evaluation)
  more, left_out = ablations.sweep_settings(job.retro, job.examples, job.evaluation, job.sweep)
  settings += more
  scorer = ablations.Scorer(job.examples, job.evaluation, job.mesh, Path(job.output) / 'scores')
  scorer.check(settings)
  if job.gate:
    gate.check_possible(job.gate, settings)
  queries, why_none = results.query_store(job.examples, job.queries)
  if job.words and queries is None:
    raise UserError(f'words are counted in the texts, but {why_none}; set EvaluateJob.queries')
  leaks = (leakage.measured(scorer.documents, job.leakage,
                             ablations.read_neighbors(job.retro, job.evaluation))
           if job.leakage else None)

  tokens = {setting.name: scorer(setting) for setting in settings}
  scores = {name: of.score() for name, of in tokens.items()}
  facts = results.examples_facts(job.examples)
  body: dict[str, Any] = {
      'fingerprints': {**{key: facts[key] for key in ('queries', 'database', 'vocabulary')},
                       'models': {name: scorer.model(folder).fingerprint for name, folder in (
                           ('baseline', job.baseline), ('retro', job.retro)) if folder}},
      'seed': job.sweep.seed,
      'examples': facts,
      'protocol': scorer.protocol(),
      'bits_per_byte': {name: score.bits_per_byte for name, score in scores.items()},
      'gains': results.gains({s.name: scores[s.name] for s in settings
                              if s.sweep in ('', 'control')}),
      'rows': results.sweep_rows(settings, scores, job.examples)}
  if queries is None:
    left_out.append(f'by source, and evaluation documents in the database: {why_none}')
  else:
    body['by_source'] = results.by_source(scores, queries)
    body['rows'] += results.rows_by_source(settings, scores, queries)
    body['in_database'], why = results.in_database(job.examples, queries, scorer.documents)
    left_out += why
  if leaks is not None:
    body['leakage'] = leakage.curves(leaks, {s.name: tokens[s.name] for s in settings
                                             if not s.sweep})
    left_out += leaks.notes
  if job.words:
    body['words'] = words.perplexities(scores, queries, scorer.documents)
  body['left_out'] = left_out
  failed = gate.why_not_passed(job.gate, scores) if job.gate else None
  if job.gate:
    body['gate'] = {**dataclasses.asdict(job.gate), 'passed': failed is None, 'why': failed}
  if jax.process_index() == 0:
    path = results.write(job.output, job, body)
    for line in left_out:
      print(f'evaluate: left out: {line}')
    print(f'evaluate: wrote {path}')
  if failed:
    raise gate.GateFailed(failed)


def main() -> None:
  """The command line; `--gate` is short for a gate with its own settings."""
  flag = {'--gate': '--gin.EvaluateJob.gate=@GateConfig()'}
  configuration.main(EvaluateJob, evaluate, CONFIGURABLES,
                     [flag.get(argument, argument) for argument in sys.argv[1:]])


if __name__ == '__main__':
  main()
