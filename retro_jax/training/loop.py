"""The training loop: mesh, data, state, restore, then step after step.

The loop reads top-down in those stages, and notes each in the log so that a hung job
says where. What happens inside a step is in step.py; which examples a step sees, in
data/batches.py.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from retro_jax import storage
from retro_jax.data import batches, records
from retro_jax.errors import UserError
from retro_jax.evaluation import bits_per_byte
from retro_jax.models.config import RetroConfig
from retro_jax.progress import duration
from retro_jax.training import checkpoints, optimizer, partitioning, state, step
from retro_jax.training.checkpoints import CheckpointConfig
from retro_jax.training.metrics import MetricWriter
from retro_jax.training.optimizer import OptimizerConfig
from retro_jax.training.partitioning import MeshConfig, ShardingRules


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which retrieval examples a run reads.

  Attributes:
    train: folders of training examples and the rate of each in the mixture.
    valid: folder that is scored while training, or ''.
    valid_random: the same sequences with random neighbours, or ''.
    seed: of the order of the examples.
  """
  train: Mapping[str, float]
  valid: str = ''
  valid_random: str = ''
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """How long, and how often something is told.

  Attributes:
    steps: in all; the learning-rate schedule ends there.
    batch_size: sequences in a global batch.
    seed: of the initial parameters.
    log_every: steps between rows of metrics.
    evaluate_every: steps between scores of the validation examples; 0 for never.
    evaluate_examples: how many sequences of them to score.
  """
  steps: int = 800_000
  batch_size: int = 256
  seed: int = 0
  log_every: int = 50
  evaluate_every: int = 0
  evaluate_examples: int = 256


@dataclasses.dataclass(frozen=True)
class TrainJob:
  """Everything `train` needs; `run_dir` receives checkpoints, metrics and descriptions."""
  run_dir: str
  model: RetroConfig
  data: DataConfig
  training: TrainingConfig = TrainingConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  rules: ShardingRules = ShardingRules()
  checkpoints: CheckpointConfig = CheckpointConfig()


def train(job: TrainJob) -> dict[str, float]:
  """Trains until `job.training.steps`, continuing from the newest checkpoint of the run.

  Returns:
    The metrics of the last logged step.

  Raises:
    UserError: settings and data that do not fit each other, or another run's folder.
  """
  config, model, run_dir = job.training, job.model, Path(job.run_dir)

  # ------------------------------------------------------------------------------ data
  data = _register(job)
  _check(job, data)
  mesh = partitioning.make_mesh(job.mesh)
  rows = batches.rows_of_process(mesh, config.batch_size)

  # ----------------------------------------------------------------------------- state
  note(f'mesh {dict(mesh.shape)}; {len(jax.devices())} {jax.devices()[0].platform} devices')
  update_rule = optimizer.make_optimizer(job.optimizer, config.steps)
  abstract = state.abstract_state(model, update_rule, job.rules, mesh)
  run_dir.mkdir(parents=True, exist_ok=True)
  checkpoints.write_model_description(run_dir, model, data.vocabulary)
  with storage.atomic_file(run_dir / 'model-info.txt') as f:
    f.write(state.sharding_table(model, abstract) + '\n')
  saved = checkpoints.Checkpoints(run_dir / checkpoints.CHECKPOINTS, job.checkpoints)
  position = {'data': data.fingerprint, 'seed': job.data.seed, 'batch_size': config.batch_size,
              'steps': config.steps}
  current = saved.restore(abstract, position)
  if current is None:
    note(f'fresh parameters from seed {config.seed}')
    current = state.init_state(model, update_rule, config.seed, abstract)
  first = int(current.step)
  note(f'starting at step {first:,} of {config.steps:,}')

  # ------------------------------------------------------------------------------ loop
  placed = state.shardings(abstract)
  train_step = step.make_train_step(
      model, update_rule, optimizer.schedule(job.optimizer, config.steps), mesh, abstract)
  evaluate = _Validation(job, mesh, placed.parameters)
  writer = MetricWriter(run_dir, first)
  inputs = step.batch_inputs(model)
  stream = batches.batches('train', config.batch_size, seed=job.data.seed, start_step=first,
                           num_steps=max(config.steps - first, 0), rows=rows)
  last: dict[str, float] = {}
  pending: tuple[int, dict[str, jax.Array]] | None = None
  speed = _Speed(first, config.steps)

  def report() -> None:
    nonlocal last, pending
    if pending is not None:
      last = _fetch(pending[1]) | speed.measure(pending[0], pending[1]['tokens'])
      writer.write(pending[0], last)
      note(speed.line(pending[0], last))
      pending = None

  for number, batch in enumerate(stream, start=first + 1):
    batch = batches.to_global({name: batch[name] for name in inputs}, mesh)
    current, metrics = train_step(current, batch)
    report()  # the step before has ended by now, or nearly: reading it does not stall this one
    if number % config.log_every == 0 or number == config.steps:
      pending = (number, metrics)
    if evaluate.is_due(number):
      with speed.paused():
        scores = evaluate(current.parameters)
      writer.write(number, scores)
      note(f'step {number:,}: ' + ', '.join(f'{k} {v:.4f}' for k, v in scores.items()))
    if saved.is_due(number, force=number == config.steps):
      report()  # a run that continues from this checkpoint will not come by this row again
      saved.save(current, number, position | {'step': number})
  saved.close()
  writer.close()
  return last


def note(message: str) -> None:
  """A line in the log of process 0."""
  if jax.process_index() == 0:
    print(f'train: {message}', flush=True)


@dataclasses.dataclass(frozen=True)
class _Data:
  fingerprint: str
  vocabulary: dict[str, Any]
  shape: records.ExampleShape


def _register(job: TrainJob) -> _Data:
  """Registers the run's seqio tasks: 'train' (a task or a mixture), 'valid', 'valid_random'."""
  from retro_jax.data import tasks  # brings TensorFlow, which importing this file should not
  neighbors = job.model.num_neighbors
  if not job.data.train:
    raise UserError('DataConfig.train is empty; name a folder of training examples')
  parts = {f'train_{i}': folder for i, folder in enumerate(job.data.train)}
  registered = [tasks.register_task(name, folder, neighbors) for name, folder in parts.items()]
  tasks.register_mixture('train', dict(zip(parts, job.data.train.values())))
  for name in ('valid', 'valid_random'):
    if folder := getattr(job.data, name):
      tasks.register_task(name, folder, neighbors)
  examples = [task.source.examples['train'] for task in registered]
  manifest = examples[0].manifest
  return _Data(
      fingerprint=storage.fingerprint([[e.fingerprint, rate] for e, rate in
                                       zip(examples, job.data.train.values())]),
      vocabulary=manifest['vocabulary'], shape=examples[0].shape)


def _check(job: TrainJob, data: _Data) -> None:
  """Refuses a model that does not fit its data."""
  folder = next(iter(job.data.train))
  if data.shape.chunk_length != job.model.chunk_length:
    raise UserError(f'{folder}: chunks of {data.shape.chunk_length} tokens, but '
                    f'RetroConfig.chunk_length = {job.model.chunk_length}; make them equal')
  if data.shape.retrieved_length != job.model.retrieved_length:
    raise UserError(f'{folder}: neighbours of {data.shape.retrieved_length} tokens, but '
                    f'RetroConfig.retrieved_length = {job.model.retrieved_length}; make them equal')
  if data.vocabulary['size'] > job.model.vocab_size:
    raise UserError(f'{folder}: a vocabulary of {data.vocabulary["size"]}, but '
                    f'RetroConfig.vocab_size = {job.model.vocab_size}; raise it')


def _fetch(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
  return {name: float(value) for name, value in jax.device_get(metrics).items()}


class _Validation:
  """Scores the validation examples in each retrieval setting the model has."""

  def __init__(self, job: TrainJob, mesh: jax.sharding.Mesh, shardings: Any):
    self._config, self._mesh = job.training, mesh
    self._tasks = []  # (name of the score, task, retrieval)
    if job.data.valid:
      self._tasks.append(('valid_off', 'valid', False))
      if job.model.has_retrieval:
        self._tasks.append(('valid_on', 'valid', True))
    if job.data.valid_random and job.model.has_retrieval:
      self._tasks.append(('valid_random', 'valid_random', True))
    self._steps = {retrieval: step.make_evaluation_step(job.model, mesh, shardings, retrieval)
                   for retrieval in {task[2] for task in self._tasks}}
    self._inputs = step.batch_inputs(job.model)

  def is_due(self, number: int) -> bool:
    every = self._config.evaluate_every
    return bool(self._tasks and every and (number % every == 0 or number == self._config.steps))

  def __call__(self, parameters: Any) -> dict[str, float]:
    scores = {}
    for name, task, retrieval in self._tasks:
      examples = batches.evaluation_batches(
          task, self._config.batch_size, max_examples=self._config.evaluate_examples,
          rows=batches.rows_of_process(self._mesh, self._config.batch_size))
      score = bits_per_byte.score(self._steps[retrieval], parameters, examples, self._inputs,
                                  self._mesh)
      scores[name] = score.bits_per_byte
    return scores


class _Speed:
  """Tokens a second and time left, leaving out compilation and validation."""

  def __init__(self, first: int, last: int):
    self._last_step = last
    self._mark = first + 1  # the first step compiles
    self._time: float | None = None

  def paused(self) -> '_Speed':
    return self

  def __enter__(self) -> None:
    self._pause = time.monotonic()

  def __exit__(self, *unused: Any) -> None:
    if self._time is not None:
      self._time += time.monotonic() - self._pause

  def measure(self, number: int, tokens: jax.Array) -> dict[str, float]:
    """`tokens_per_second` and `seconds_per_step` since the last call."""
    now = time.monotonic()
    before, self._time = self._time, now
    steps, self._mark = number - self._mark, number
    if before is None or steps < 1:
      return {}
    seconds = (now - before) / steps
    return {'seconds_per_step': seconds, 'tokens_per_second': float(tokens) / seconds}

  def line(self, number: int, metrics: Mapping[str, float]) -> str:
    line = (f'step {number:,}/{self._last_step:,} loss {metrics["loss"]:.3f} '
            f'bits/byte {metrics["bits_per_byte"]:.3f} gradient {metrics["gradient_norm"]:.2f}')
    if 'tokens_per_second' in metrics:
      left = (self._last_step - number) * metrics['seconds_per_step']
      line += f' {np.round(metrics["tokens_per_second"]):,.0f} tokens/s, {duration(left)} left'
    return line
