"""The whole path on this machine's own text: python -m retro_jax.quickstart --gin_file=... .

Corpus, vocabulary, database, index, neighbours, a baseline and a RETRO trained on the same
tokens, bits-per-byte in every retrieval setting, a sample, a picture and a page. Each stage
is the one the other entry points use, is skipped when current and continues when killed;
this file only lines them up.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from retro_jax import configuration
from retro_jax.data.python_corpus import PythonLibrary
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.evaluation import ablations, report, results, showcase
from retro_jax.evaluation.ablations import EvaluationConfig
from retro_jax.generation import views
from retro_jax.models.config import RetroConfig
from retro_jax.progress import duration
from retro_jax.retrieval import pipeline, planning, stages
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
from retro_jax.retrieval.stages import LocalRunner
from retro_jax.training import checkpoints, loop
from retro_jax.training.checkpoints import CheckpointConfig
from retro_jax.training.metrics import read_metrics
from retro_jax.training.optimizer import OptimizerConfig
from retro_jax.training.partitioning import MeshConfig, ShardingRules

CONFIGURABLES = (PythonLibrary, DatabaseConfig, BertEmbedder, LexicalEmbedder, RandomEmbedder,
                 IndexConfig, ExamplesConfig, PolicyConfig, RetroConfig, loop.TrainingConfig,
                 OptimizerConfig, MeshConfig, ShardingRules, CheckpointConfig, EvaluationConfig,
                 LocalRunner)
SPLITS = ('train', 'valid', 'test')


@dataclasses.dataclass(frozen=True)
class QuickstartJob:
  """What to run and where.

  Attributes:
    run_dir: folder for everything made.
    corpus: documents; its `split` is set to each of train, valid and test in turn.
    vocabulary: path of a SentencePiece model to load, or '' to train one of
      `model.vocab_size` pieces on the train split.
    database, embedder, index, examples: the offline stages; runner: who runs them.
    model: the RETRO; the baseline is the same without CCA layers.
    training, optimizer, mesh, rules, checkpoints: the same for both models.
    evaluation: how held-out text is scored.
    pretrained: folder of an exported RETRO over the same vocabulary to evaluate and
      sample from as well, or ''.
    sample_tokens: length of the sample.
  """
  run_dir: str
  corpus: PythonLibrary
  embedder: Any
  model: RetroConfig
  vocabulary: str = ''
  database: DatabaseConfig = DatabaseConfig()
  index: IndexConfig = IndexConfig()
  examples: ExamplesConfig = ExamplesConfig()
  training: loop.TrainingConfig = loop.TrainingConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  rules: ShardingRules = ShardingRules()
  checkpoints: CheckpointConfig = CheckpointConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  pretrained: str = ''
  sample_tokens: int = 64
  runner: Any = stages.HERE


def quickstart(job: QuickstartJob) -> None:
  """Runs every stage; ends with a table, `results.json`, a PNG and an HTML page."""
  folder = Path(job.run_dir)
  clock = _Clock()
  clock.start('vocabulary and database')
  vocabulary = _vocabulary(job, folder)
  embedder = planning.for_runner(job.embedder, job.runner, on_local_devices)
  stores = {split: pipeline.build_database(
      folder / 'stores' / split, dataclasses.replace(job.corpus, split=split), vocabulary,
      embedder, job.database, job.runner) for split in SPLITS}
  clock.start('index and neighbours')
  pipeline.build_index(folder / 'index', stores['train'], job.index, job.runner)
  nearest = {split: _examples(job, folder, stores, split, 'nearest') for split in SPLITS}
  random = {split: _examples(job, folder, stores, split, 'random') for split in ('valid', 'test')}

  body: dict[str, Any] = {'bits_per_byte': {}, 'rows': [], 'gains': {}}
  if job.pretrained:
    clock.start('the pretrained RETRO')
    scores = ablations.compare(job.pretrained, '', nearest['test'], random['test'],
                               job.evaluation, job.mesh)
    _add(body, scores, 'pretrained', job, stores['test'])
  clock.start('training')
  runs = {}
  for name, model in (('baseline', job.model.baseline()), ('retro', job.model)):
    runs[name] = str(folder / name)
    print(f'train: {name}', flush=True)
    loop.train(loop.TrainJob(
        run_dir=runs[name], model=model, training=job.training, optimizer=job.optimizer,
        mesh=job.mesh, rules=job.rules, checkpoints=job.checkpoints,
        data=loop.DataConfig(train={nearest['train']: 1.0}, valid=nearest['valid'],
                             valid_random=random['valid'])))
  clock.start('evaluation')
  scores = ablations.compare(runs['retro'], runs['baseline'], nearest['test'], random['test'],
                             job.evaluation, job.mesh)
  _add(body, scores, '', job, stores['test'])

  clock.start('sample, picture and page')
  best = job.pretrained or runs['retro']
  metrics = {name: read_metrics(run) for name, run in runs.items()}
  facts = results.examples_facts(nearest['test'])
  body |= {
      'fingerprints': {key: facts[key] for key in ('queries', 'database', 'vocabulary')},
      'seed': job.training.seed,
      'corpus': {split: store.manifest['counts'] for split, store in stores.items()},
      'examples': facts,
      'trained_on': {name: {'steps': job.training.steps, 'batch_size': job.training.batch_size,
                            'sequence_length': job.examples.sequence_length} for name in runs},
  }
  showcase.neighbors_page(folder / 'neighbors.html', best, nearest['test'], stores['test'],
                          stores['train'], vocabulary, body)
  written = showcase.sample(best, stores['test'], stores['train'], folder / 'index', job.embedder,
                            vocabulary, job.sample_tokens, job.examples.sequence_length)
  body['sample'] = views.as_json(written)
  print(views.terminal(written, vocabulary, color=False))
  report.loss_picture(folder / 'results.png', metrics, body)
  body['seconds'] = clock.seconds()
  path = results.write(folder, job, body)
  print('\n' + report.results_table(body))
  print(f'\nTook {duration(sum(clock.seconds().values()))}. Look at {folder}/results.png and '
        f'{folder}/neighbors.html; numbers in {path}')


def _vocabulary(job: QuickstartJob, folder: Path) -> Vocabulary:
  path, size = folder / checkpoints.VOCABULARY, job.model.vocab_size
  if job.vocabulary:
    path, size = job.vocabulary, 0
  return pipeline.build_vocabulary(path, dataclasses.replace(job.corpus, split='train'), size)


def _examples(job: QuickstartJob, folder: Path, stores: dict[str, ChunkDatabase], split: str,
              kind: str) -> str:
  name = split if kind == 'nearest' else f'{split}_{kind}'
  out = folder / 'examples' / name
  pipeline.build_examples(out, stores[split], stores['train'], folder / 'index',
                          dataclasses.replace(job.examples, kind=kind), job.runner)
  return str(out)


def _add(body: dict[str, Any], scores: dict[str, Any], prefix: str, job: QuickstartJob,
         store: ChunkDatabase) -> None:
  """Adds one model's scores to the results under `bits_per_byte` or `bits_per_byte_<prefix>`."""
  suffix = f'_{prefix}' if prefix else ''
  body[f'bits_per_byte{suffix}'] = {name: score.bits_per_byte for name, score in scores.items()}
  body[f'gains{suffix}'] = results.gains(scores)
  body[f'by_source{suffix}'] = results.by_source(scores, store)
  neighbors = job.evaluation.num_neighbors or job.model.num_neighbors
  body['rows'] += [{**row, 'model': prefix or 'trained here'}
                   for row in results.rows(scores, 'test', neighbors)]


class _Clock:
  """Announces stages and keeps how long each took."""

  def __init__(self):
    self._stages: list[tuple[str, float]] = []

  def start(self, stage: str) -> None:
    self._stages.append((stage, time.monotonic()))
    print(f'\n== {stage}', flush=True)

  def seconds(self) -> dict[str, float]:
    ends = [start for _, start in self._stages[1:]] + [time.monotonic()]
    return {name: round(end - start, 1) for (name, start), end in zip(self._stages, ends)}


if __name__ == '__main__':
  configuration.main(QuickstartJob, quickstart, CONFIGURABLES)
