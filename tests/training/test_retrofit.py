"""RETROfit: a frozen baseline learns to read; without neighbours it stays what it was."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from retro_jax import configuration
from retro_jax.data import batches
from retro_jax.errors import UserError
from retro_jax.models import retro
from retro_jax.train import CONFIGURABLES
from retro_jax.training import checkpoints, loop, optimizer, step
from retro_jax.training.checkpoints import CheckpointConfig
from retro_jax.training.optimizer import OptimizerConfig
from tests import reference, tiny_models
from tests.training.test_loop import folder, job_in  # noqa: F401 (a fixture)
from tests.training.test_step import CONFIG, batch_of

LAYERS, P = 5, (2, 4)
NEW = (r'.*\.cca\..*', r'encoder.*')
STEPS, EVERY = 6, 3


def model_with(job, **changes):
  return dataclasses.replace(job.model, num_layers=LAYERS, cca_layers=P, **changes)


@pytest.fixture(scope='module')
def baseline(folder):  # noqa: F811
  job = job_in(folder, 'baseline', steps=2)
  job = dataclasses.replace(job, model=model_with(job).baseline())
  loop.train(job)
  return job


@pytest.fixture(scope='module')
def retrofitted(baseline, folder):  # noqa: F811
  """The run, on 2 x 2 x 2 devices, with spikes watched, so that all wrappers are there."""
  job = job_in(folder, 'retrofit', steps=STEPS, skip_spikes=True)
  job = dataclasses.replace(
      job, model=model_with(job),
      optimizer=OptimizerConfig(peak_learning_rate=2e-2, warmup_steps=1, trainable=NEW),
      checkpoints=CheckpointConfig(every=EVERY, initial=baseline.run_dir,
                                   assignment=tuple((pattern, None) for pattern in NEW)))
  loop.train(job)
  return job


def layer_by_layer(parameters, pattern):
  """The decoder's layers without CCA, in their order, and all that is no layer."""
  layers = reference.decoder_layers(parameters, LAYERS, pattern)
  return [{name: np.asarray(value, np.float32) for name, value in layer.items()
           if not name.startswith('cca.')} for layer in layers]


def test_the_decoder_is_the_baseline_bit_for_bit(baseline, retrofitted):
  _, before, _ = checkpoints.load_model(baseline.run_dir)
  _, after, _ = checkpoints.load_model(retrofitted.run_dir)
  for one, other in zip(layer_by_layer(before, ()), layer_by_layer(after, P), strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(other[name], one[name], err_msg=name)
  for name in ('embedding.table', 'decoder.norm.scale'):
    np.testing.assert_array_equal(after[name], before[name])
  fresh = jax.jit(lambda: retro.init_parameters(retrofitted.model, jax.random.key(0)))()
  new = [name for name in fresh if '.cca.' in name or name.startswith('encoder')]
  assert all((np.asarray(after[name]) != np.asarray(fresh[name])).any() for name in new)


def test_off_is_the_baseline_bit_for_bit(baseline, retrofitted):
  """Op by op; as XLA fuses them the two programs agree to rounding (docs/decisions.md)."""
  _, before, _ = checkpoints.load_model(baseline.run_dir)
  _, after, _ = checkpoints.load_model(retrofitted.run_dir)
  batch = tiny_models.batch(retrofitted.model, np.random.default_rng(0), size=1, chunks=2)
  run = lambda model, parameters: np.asarray(
      retro.apply(model, parameters, batch.tokens, batch.segments, None))
  with jax.disable_jit():
    expected = run(baseline.model, before)
    np.testing.assert_array_equal(run(retrofitted.model, after), expected)
  np.testing.assert_allclose(run(retrofitted.model, after), expected, rtol=1e-5, atol=1e-5)


def test_with_neighbours_the_loss_falls():
  """Of one batch, over and over: CCA and encoder alone can learn it, and nothing else moves."""
  rule = OptimizerConfig(peak_learning_rate=3e-2, warmup_steps=1, trainable=NEW, weight_decay=0.5)
  mesh = loop.partitioning.make_mesh(loop.partitioning.MeshConfig(1, 1, 1), jax.devices()[:1])
  update = optimizer.make_optimizer(rule, 20)
  abstract = loop.state.abstract_state(CONFIG, update, loop.partitioning.ShardingRules(), mesh)
  current = loop.state.init_state(CONFIG, update, 0, abstract)
  before = jax.device_get(current.parameters)
  names = sorted(before)
  trained = optimizer.trained(rule, names)
  run = step.make_train_step(
      CONFIG, update, optimizer.schedule(rule, 20), mesh, abstract, trained=trained)
  losses = []
  for _ in range(20):
    current, found = run(current, batches.to_global(batch_of(0), mesh))
    losses.append(float(found['loss']))
    gradient, updates, parameters = np.asarray(found['sums'])
    assert {n for n, value in zip(names, gradient) if value == 0} == set(names) - trained
    assert not updates[[n not in trained for n in names]].any() and np.isfinite(parameters).all()
    assert float(found['gradient_norm']) == pytest.approx(gradient.sum() ** 0.5)
  assert losses[-1] < losses[0] - 0.1
  for name, value in jax.device_get(current.parameters).items():
    assert np.array_equal(value, before[name]) == (name not in trained), name


def test_what_is_frozen_has_no_moments(retrofitted):
  state = Path(retrofitted.run_dir) / 'checkpoints' / str(STEPS) / 'state'
  stored = checkpoints.ocp.PyTreeCheckpointer().metadata(
      checkpoints.epath.Path(state)).item_metadata.tree
  moments = [name for name in stored['optimizer'] if '.mu' in name or '.nu' in name]
  trained = optimizer.trained(retrofitted.optimizer, stored['parameters'])
  assert len(moments) == 2 * len(trained) < 2 * len(stored['parameters'])
  assert all('cca' in name or 'encoder' in name for name in moments)


def test_a_resumed_run_ends_the_same(retrofitted):
  again = dataclasses.replace(retrofitted, run_dir=retrofitted.run_dir + '_again')
  shutil.copytree(retrofitted.run_dir, again.run_dir)
  shutil.rmtree(Path(again.run_dir) / 'checkpoints' / str(STEPS))
  # It needs its baseline no more.
  again = dataclasses.replace(again, checkpoints=dataclasses.replace(
      again.checkpoints, initial='nowhere'))
  loop.train(again)
  _, expected, _ = checkpoints.load_model(retrofitted.run_dir)
  _, found, _ = checkpoints.load_model(again.run_dir)
  for name in expected:
    np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def abstract_of(job):
  rule = optimizer.make_optimizer(job.optimizer, STEPS)
  return loop.state.abstract_state(
      job.model, rule, job.rules, loop.partitioning.make_mesh(job.mesh)).parameters


def begin(job, source, model=None, vocabulary=''):
  """The initial parameters of a RETROfit of `source`."""
  job = dataclasses.replace(job, model=model or job.model)
  like = abstract_of(job)
  frozen = set(like) - optimizer.trained(job.optimizer, like)
  return like, checkpoints.initial_parameters(
      like, dataclasses.replace(job.checkpoints, initial=str(source)), job.model, frozen,
      vocabulary)


def test_a_folder_to_hand_on_gives_the_same(baseline, retrofitted, tmp_path):
  model, parameters, vocabulary = checkpoints.load_model(baseline.run_dir)
  checkpoints.write_model_description(tmp_path, model, vocabulary)
  checkpoints.safetensors.numpy.save_file(
      {name: np.asarray(value) for name, value in parameters.items()},
      tmp_path / checkpoints.SAFETENSORS)
  like, exported = begin(retrofitted, tmp_path)
  _, stored = begin(retrofitted, baseline.run_dir)
  assert exported.keys() == stored.keys()
  assert not any('cca' in name or name.startswith('encoder') for name in stored)
  for name in exported:
    np.testing.assert_array_equal(exported[name], stored[name], err_msg=name)
    assert exported[name].sharding == stored[name].sharding == like[name].sharding


def test_what_would_not_stay_the_baseline_is_refused(baseline, retrofitted, folder):  # noqa: F811
  with pytest.raises(UserError, match='norm_epsilon = 1e-06, but the run, in which its'):
    begin(retrofitted, baseline.run_dir, model_with(retrofitted, norm_epsilon=1e-5))
  deeper = dataclasses.replace(retrofitted.model, num_layers=6)
  with pytest.raises(UserError, match='has 5 layers, but RetroConfig.num_layers = 6'):
    begin(retrofitted, baseline.run_dir, deeper)
  with pytest.raises(UserError, match='trained with vocabulary .* but the data is of 0123'):
    begin(retrofitted, baseline.run_dir, vocabulary='0123')
  with pytest.raises(UserError, match="'encodr' matches no parameter of the model"):
    optimizer.trained(OptimizerConfig(trainable=('encodr',)), ['encoder.norm.scale'])
  with pytest.raises(UserError, match='no regular expression'):
    optimizer.trained(OptimizerConfig(trainable=('(',)), ['a'])
  alone = dataclasses.replace(
      retrofitted, run_dir=str(folder / 'alone'), checkpoints=CheckpointConfig())
  with pytest.raises(UserError, match='name a trained model in CheckpointConfig.initial'):
    loop.train(alone)


def test_the_gin_file_says_the_same():
  settings = ['--gin_file=gin/models/retro_smoke.gin', '--gin_file=gin/runs/pretrain.gin',
              '--gin_file=gin/runs/retrofit.gin', '--gin.RUN_DIR=runs/x',
              "--gin.TRAIN_DATA={'examples': 1.0}", '--gin.BASELINE=runs/baseline']
  resolve = lambda *more: configuration.resolve(
      loop.TrainJob, CONFIGURABLES, configuration.parse_arguments([*settings, *more]))
  job = resolve()
  assert job.checkpoints.initial == 'runs/baseline' and job.training.steps == 23_438
  names = list(jax.eval_shape(lambda: retro.init_parameters(job.model, jax.random.key(0))))
  trained = optimizer.trained(job.optimizer, names)
  taken = checkpoints.assigned(names, job.checkpoints)
  assert trained == {n for n in names if '.cca.' in n or n.startswith('encoder')}
  assert set(taken) == set(names) - trained
  assert optimizer.trained(resolve('--gin.TRAINABLE=()').optimizer, names) == set(names)
  assert json.dumps(job.optimizer.trainable)
