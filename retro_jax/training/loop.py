"""The training loop: processes, data, mesh, state, restore, then step after step.

The loop reads top-down in those stages, and notes each in the log so that a hung job
says where. What happens inside a step is in step.py; which examples a step sees, in
data/batches.py; what ends a run early, in faults.py and distributed.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from retro_jax import files, storage
from retro_jax.data import batches, records
from retro_jax.errors import Preempted, UserError
from retro_jax.evaluation import bits_per_byte
from retro_jax.models import flops
from retro_jax.models.config import RetroConfig
from retro_jax.topology import chips
from retro_jax.training import (
  checkpoints,
  distributed,
  faults,
  optimizer,
  partitioning,
  state,
  step,
)
from retro_jax.training.checkpoints import CheckpointConfig
from retro_jax.training.compiler import CompilerConfig
from retro_jax.training.distributed import DistributedConfig
from retro_jax.training.metrics import MetricWriter
from retro_jax.training.optimizer import OptimizerConfig
from retro_jax.training.partitioning import MeshConfig, ShardingRules
from retro_jax.training.telemetry import Telemetry

# Steps in a row that may be skipped for numbers that are no numbers before a run stops.
_SKIPPED_IN_A_ROW = 16


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which retrieval examples a run reads.

  Attributes:
    train: folders of training examples and the rate of each in the mixture; or one folder.
    valid: folder that is scored while training, or ''.
    valid_random: the same sequences with random neighbours, or ''.
    seed: of the order of the examples.
  """
  train: Mapping[str, float]
  valid: str = ''
  valid_random: str = ''
  seed: int = 0

  def __post_init__(self):
    if isinstance(self.train, str):
      object.__setattr__(self, 'train', {self.train: 1.0} if self.train else {})
    if not isinstance(self.train, Mapping):
      raise UserError(f'DataConfig.train = {self.train!r}, expected a folder of training examples '
                      'or {folder: rate, ...}')


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """How long, how it is computed, and how often something is told.

  Attributes:
    steps: in all; the learning-rate schedule ends there.
    batch_size: sequences in a global batch.
    microbatch_tokens: so many tokens of each device's share of a batch are computed at a time
      (gradient accumulation; at least a sequence), 0 for all: less memory, the same gradient.
    seed: of the initial parameters.
    skip_spikes: do not take steps whose loss is beyond mean + 6 deviations of the last 128.
    log_every: steps between rows of metrics.
    evaluate_every: steps between scores of the validation examples; 0 for never.
    evaluate_examples: how many sequences of them to score.
    peak_tflops: of one device at the compute dtype, for MFU; 0 takes the published bfloat16 peak
      of the device's kind, where that is known.
    profile_steps: (first, last) step to profile, for TensorBoard; () for none.
  """
  steps: int = 800_000
  batch_size: int = 256
  microbatch_tokens: int = 0
  seed: int = 0
  skip_spikes: bool = False
  log_every: int = 50
  evaluate_every: int = 0
  evaluate_examples: int = 256
  peak_tflops: float = 0.0
  profile_steps: Sequence[int] = ()


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
  distributed: DistributedConfig = DistributedConfig()
  compiler: CompilerConfig = CompilerConfig()


def train(job: TrainJob) -> dict[str, float]:
  """Trains until `job.training.steps`, continuing from the newest checkpoint of the run.

  Returns:
    The metrics of the last logged step.

  Raises:
    UserError: settings and data that do not fit each other, or another run's folder.
    ProcessMissing: not all processes of the job came.
    Preempted: SIGTERM came, and a checkpoint was saved.
    Diverged: NaN or infinity in loss, gradients, updates or parameters.
  """
  distributed.join(job.distributed)
  preemption = distributed.Preemption()
  try:
    return _train(job, preemption)
  finally:
    preemption.close()


def _train(job: TrainJob, preemption: distributed.Preemption) -> dict[str, float]:
  config, model, run_dir = job.training, job.model, job.run_dir

  # ------------------------------------------------------------------------------ data
  data = _register(job)
  _check(job, data)
  mesh = partitioning.make_mesh(job.mesh)
  microbatches = batches.microbatches(mesh, config.batch_size, data.shape.sequence_length,
                                      config.microbatch_tokens)
  rows = batches.rows_of_process(mesh, config.batch_size)

  # ----------------------------------------------------------------------------- state
  note(f'mesh {dict(mesh.shape)}; {len(jax.devices())} {jax.devices()[0].platform} devices in '
       f'{jax.process_count()} processes')
  update_rule = optimizer.make_optimizer(job.optimizer, config.steps, config.skip_spikes)
  abstract = state.abstract_state(model, update_rule, job.rules, mesh)
  partitioning.check_sharded(abstract.parameters, mesh, job.mesh.unsharded_share)
  if jax.process_index() == 0:
    checkpoints.write_model_description(run_dir, model, data.vocabulary)
    storage.write_text(files.join(run_dir, 'model-info.txt'),
                       state.sharding_table(model, abstract) + '\n')
  saved = checkpoints.Checkpoints(files.join(run_dir, checkpoints.CHECKPOINTS), job.checkpoints)
  position = {'data': data.fingerprint, 'seed': job.data.seed, 'batch_size': config.batch_size,
              'steps': config.steps}
  if job.optimizer.trainable:
    position['trainable'] = list(job.optimizer.trainable)
  current, carried = _begin(job, update_rule, abstract, saved, position,
                            data.vocabulary['fingerprint'])
  first = int(current.step)
  note(f'starting at step {first:,} of {config.steps:,}')

  # ------------------------------------------------------------------------------ loop
  train_step = step.make_train_step(
      model, update_rule, optimizer.schedule(job.optimizer, config.steps), mesh, abstract,
      job.rules, microbatches, job.compiler,
      optimizer.trained(job.optimizer, abstract.parameters))
  evaluate = _Validation(job, mesh, state.shardings(abstract).parameters)
  writer = MetricWriter(run_dir, first)
  tokens = config.batch_size * data.shape.sequence_length
  telemetry = Telemetry(
      run_dir, config.steps,
      flops.training_flops(model, config.batch_size, data.shape.sequence_length) / tokens,
      mesh.size * (config.peak_tflops * 1e12 or chips.peak_flops(jax.devices()[0].device_kind)),
      carried)
  watch = faults.Watch(
      run_dir, sorted(abstract.parameters), lambda number: {'examples': batches.examples_of_step(
          'train', config.batch_size, number - 1, job.data.seed)},
      _SKIPPED_IN_A_ROW if config.skip_spikes else 0)
  profile = _Profile(config.profile_steps, files.join(run_dir, 'tensorboard'))
  inputs = step.batch_inputs(model)
  stream = batches.batches('train', config.batch_size, seed=job.data.seed, start_step=first,
                           num_steps=max(config.steps - first, 0), rows=rows)
  last: dict[str, float] = {}
  pending: tuple[int, dict[str, jax.Array]] | None = None

  def report() -> None:
    nonlocal last, pending
    watch.look()
    if pending is not None:
      number, metrics = pending
      last = _fetch(metrics)
      last |= telemetry.measure(number, last['tokens'])
      writer.write(number, last)
      note(telemetry.line(number, last))
      pending = None

  try:
    for number in range(first + 1, config.steps + 1):
      profile.before(number)
      with telemetry.waiting_for('input'):
        batch = next(stream)
      batch = batches.to_global({name: batch[name] for name in inputs}, mesh)
      current, metrics = train_step(current, batch)
      report()  # the step before has ended by now, or nearly: reading it does not stall this one
      watch.expect(number, metrics)
      logged = number % config.log_every == 0 or number == config.steps
      if logged:
        pending = number, metrics
      if evaluate.is_due(number):
        with telemetry.waiting_for('evaluation'):
          scores = evaluate(current.parameters)
        writer.write(number, scores)
        note(f'step {number:,}: ' + ', '.join(f'{k} {v:.4f}' for k, v in scores.items()))
      stopping = preemption.after(number) and number < config.steps
      # Clocks differ between processes, so that of process 0 counts; asked only now and then.
      timely = logged and job.checkpoints.temporary_minutes and distributed.agreed(
          saved.minutes_due) > 0
      if saved.is_due(number, force=bool(stopping or timely or number == config.steps)):
        report()  # a run that continues from here will not come by this row again
        with telemetry.waiting_for('checkpoint'):
          saved.save(current, number, position | {'step': number} | telemetry.carried())
      if stopping:
        saved.wait()
        raise Preempted(f'SIGTERM; saved step {number:,} of {config.steps:,} in {run_dir}; '
                        'start the same command again to go on')
  finally:
    profile.close()
    saved.close()
    writer.close()
    telemetry.close()
  return last


def _begin(job: TrainJob, update_rule: Any, abstract: state.TrainState,
           saved: checkpoints.Checkpoints, position: Mapping[str, Any], vocabulary: str = ''
           ) -> tuple[state.TrainState, Mapping[str, Any]]:
  """The newest checkpoint of the run, else the initial one, else the seed; and what it carries."""
  found = saved.restore(abstract, dict(position))
  if found is not None:
    note(f'continuing from the checkpoint of step {int(found[0].step):,}')
    return found
  fresh = state.init_state(job.model, update_rule, job.training.seed, abstract)
  if not job.checkpoints.initial:
    note(f'fresh parameters from seed {job.training.seed}')
    return fresh, {}
  chosen = optimizer.trained(job.optimizer, abstract.parameters)
  taken = checkpoints.initial_parameters(
      abstract.parameters, job.checkpoints, job.model, set(abstract.parameters) - chosen,
      vocabulary)
  note(f'{len(taken)} of {len(abstract.parameters)} parameters from {job.checkpoints.initial}, the '
       f'others fresh from seed {job.training.seed}')
  return dataclasses.replace(fresh, parameters={**fresh.parameters, **taken}), {}


class _Profile:
  """A trace of some steps, for TensorBoard's profiler."""

  def __init__(self, steps: Sequence[int], folder: str):
    self._steps, self._folder, self._running = tuple(steps), folder, False

  def before(self, number: int) -> None:
    """Starts or ends the trace ahead of step `number`."""
    if self._steps and number == self._steps[0]:
      jax.profiler.start_trace(self._folder)
      self._running = True
    elif self._running and number > self._steps[-1]:
      self.close()

  def close(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      note(f'profile of steps {self._steps[0]:,} to {self._steps[-1]:,} in {self._folder}')


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
  """Refuses a model that does not fit its data, and steps that cannot be profiled."""
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
  if job.optimizer.trainable and not job.checkpoints.initial:
    raise UserError('OptimizerConfig.trainable freezes parameters, which nothing has trained; name '
                    'a trained model in CheckpointConfig.initial')
  steps = tuple(job.training.profile_steps)
  if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
    raise UserError(f'TrainingConfig.profile_steps = {steps}, expected (first, last) or ()')


def _fetch(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
  return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()
          if name != 'sums'}


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
