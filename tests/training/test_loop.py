"""The real loop on real records: killed and resumed it ends where an undisturbed run ends."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from retro_jax.errors import UserError
from retro_jax.training import checkpoints, loop, metrics
from retro_jax.training.checkpoints import CheckpointConfig
from retro_jax.training.loop import DataConfig, TrainingConfig, TrainJob
from retro_jax.training.optimizer import OptimizerConfig
from retro_jax.training.partitioning import MeshConfig
from tests import tiny_models, worlds

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 8, 3


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Records of a small corpus: sequences of four chunks of 8, three neighbours each."""
  path = tmp_path_factory.mktemp('loop')
  worlds.examples(path / 'data', worlds.documents(0, 20, longest=60))
  return path


def job_in(folder, name, **training) -> TrainJob:
  examples = str(folder / 'data' / 'examples')
  return TrainJob(
      run_dir=str(folder / name),
      model=tiny_models.tiny(
          vocab_size=512, num_layers=1, cca_layers=(1,), chunk_length=8, encoder_d_model=8,
          encoder_heads=2, encoder_layers=1, encoder_d_ff=16),
      data=DataConfig(train={examples: 1.0}),
      training=TrainingConfig(**{'steps': STEPS, 'batch_size': 8, 'log_every': 1, **training}),
      optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=2),
      mesh=MeshConfig(data=2, fsdp=2, tensor=2), checkpoints=CheckpointConfig(every=EVERY, keep=2))


# Trains, but dies by SIGKILL when the loop asks for a batch after the first checkpoint is
# complete on disk: the step after it is not done, and its row of metrics not written.
KILLED_RUN = f'''
import os, pathlib, pickle, signal, sys, time
from tests import conftest
from retro_jax.training import loop

job = pickle.load(open(sys.argv[1], 'rb'))
first = pathlib.Path(job.run_dir) / 'checkpoints' / '{EVERY}'
real = loop.batches.batches

def batches(*args, **kwargs):
  for number, batch in enumerate(real(*args, **kwargs)):
    if number == {EVERY}:
      deadline = time.monotonic() + 60
      while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
      os.kill(os.getpid(), signal.SIGKILL)
    yield batch

loop.batches.batches = batches
loop.train(job)
'''


@pytest.fixture(scope='module')
def compiled_once(folder):
  """One cache of compiled programs for the three runs, which would take most of the time."""
  settings = {'jax_compilation_cache_dir': str(folder / 'compiled'),
              'jax_persistent_cache_min_compile_time_secs': 1.0}
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield {name.upper(): str(value) for name, value in settings.items()}
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def runs(folder, compiled_once):
  """An undisturbed run, and one killed after the first checkpoint and started again."""
  straight, broken = job_in(folder, 'straight'), job_in(folder, 'broken')
  last = loop.train(straight)
  with open(folder / 'job.pickle', 'wb') as f:
    pickle.dump(broken, f)
  child = subprocess.run([sys.executable, '-c', KILLED_RUN, str(folder / 'job.pickle')], cwd=ROOT,
                         capture_output=True, text=True, check=False,
                         env={**os.environ, **compiled_once})
  assert child.returncode == -signal.SIGKILL, child.stderr
  saved = [int(p.name) for p in (Path(broken.run_dir) / 'checkpoints').iterdir()]
  assert max(saved) == EVERY
  # What a crash in the middle of writing leaves behind.
  with open(Path(broken.run_dir) / 'metrics.jsonl', 'a', encoding='utf-8') as f:
    f.write('{"step": 5, "loss": 99.0}\n{"step": 6, "lo')
  resumed = loop.train(broken)
  return straight, broken, last, resumed


def test_resumed_run_ends_with_the_same_parameters_bit_for_bit(runs):
  straight, broken, last, resumed = runs
  model, expected, _ = checkpoints.load_model(straight.run_dir)
  _, got, _ = checkpoints.load_model(broken.run_dir)
  assert model == straight.model
  fresh = jax.jit(lambda: loop.state.retro.init_parameters(model, jax.random.key(0)))()
  assert set(got) == set(expected) == set(fresh)
  for name in expected:
    np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    assert (np.asarray(expected[name]) != np.asarray(fresh[name])).any(), name
  same = ('loss', 'bits_per_byte', 'gradient_norm', 'learning_rate', 'tokens')
  assert {k: last[k] for k in same} == {k: resumed[k] for k in same}


def test_metrics_have_each_step_once_and_the_same_values(runs):
  rows = {}
  for job in runs[:2]:
    lines = (Path(job.run_dir) / 'metrics.jsonl').read_text().splitlines()
    assert len(metrics.read_metrics(job.run_dir)) == len(lines)  # no broken line is left
    found = metrics.read_metrics(job.run_dir)
    assert [row['step'] for row in found] == list(range(1, STEPS + 1))
    rows[job.run_dir] = [(row['loss'], row['gradient_norm'], row['learning_rate'])
                         for row in found]
  straight, broken = rows.values()
  assert straight == broken
  assert straight[0][0] > straight[-1][0] and len(set(straight)) == STEPS


def test_checkpoints_kept_are_the_newest_regular_ones_and_the_last(runs):
  for job in runs[:2]:
    steps = sorted(int(p.name) for p in (Path(job.run_dir) / 'checkpoints').iterdir())
    assert steps == [3, 6, 8]


def test_finished_run_has_nothing_to_do(runs):
  straight = runs[0]
  before = (Path(straight.run_dir) / 'metrics.jsonl').read_text()
  assert loop.train(straight) == {}
  assert (Path(straight.run_dir) / 'metrics.jsonl').read_text() == before


@pytest.mark.parametrize('change, message', [
    ('seed', 'was trained with seed = 0, now 1'),
    ('batch_size', 'was trained with batch_size = 8, now 16'),
    ('steps', f'was trained with steps = {STEPS}, now 9'),
    ('data', 'was trained with data')])
def test_another_order_of_the_data_is_refused(runs, folder, change, message):
  job = runs[0]
  if change == 'seed':
    job = dataclasses.replace(job, data=dataclasses.replace(job.data, seed=1))
  elif change == 'data':
    worlds.examples(folder / 'other', worlds.documents(1, 8, longest=40))
    other = {str(folder / 'other' / 'examples'): 1.0}
    job = dataclasses.replace(job, data=dataclasses.replace(job.data, train=other))
  else:
    value = {'batch_size': 16, 'steps': STEPS + 1}[change]
    job = dataclasses.replace(job, training=dataclasses.replace(job.training, **{change: value}))
  with pytest.raises(UserError, match=message) as error:
    loop.train(job)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('changes, message', [
    (dict(chunk_length=4, retrieved_length=16),
     'chunks of 8 tokens, but RetroConfig.chunk_length = 4'),
    (dict(retrieved_length=8), 'neighbours of 16 tokens, but RetroConfig.retrieved_length = 8'),
    (dict(vocab_size=64), 'RetroConfig.vocab_size = 64'),
    (dict(num_neighbors=4), '3 neighbo')])
def test_model_that_does_not_fit_the_data_is_refused(folder, changes, message):
  job = job_in(folder, 'misfit')
  job = dataclasses.replace(job, model=dataclasses.replace(job.model, **changes))
  with pytest.raises(UserError, match=message):
    loop.train(job)
  assert not (folder / 'misfit').exists()


def test_batch_that_does_not_divide_is_refused(folder):
  with pytest.raises(UserError, match='batch size 6 does not divide'):
    loop.train(job_in(folder, 'misfit', batch_size=6))


def test_batch_in_parts_of_a_sequence_gives_the_same_losses(runs, folder, monkeypatch):
  seen, real = [], loop.step.make_train_step

  def make_train_step(*args, **kwargs):
    seen.append(args[6])
    return real(*args, **kwargs)

  monkeypatch.setattr(loop.step, 'make_train_step', make_train_step)
  loop.train(job_in(folder, 'parts', microbatch_tokens=48))  # a sequence has 32, a device two
  assert seen == [2]
  whole, parts = (metrics.read_metrics(str(folder / name)) for name in ('straight', 'parts'))
  for name in ('loss', 'gradient_norm'):
    assert [row[name] for row in parts] == pytest.approx([row[name] for row in whole], rel=1e-4)
  assert [row['batch_hash'] for row in parts] == [row['batch_hash'] for row in whole]


def test_training_data_is_one_folder_or_folders_and_rates():
  assert DataConfig('runs/a') == DataConfig({'runs/a': 1.0})
  assert DataConfig('').train == {}
  with pytest.raises(UserError, match=r"DataConfig.train = \('runs/a',\), expected a folder"):
    DataConfig(('runs/a',))


def test_rows_tell_speed_and_where_time_went(runs):
  straight, broken = (metrics.read_metrics(job.run_dir) for job in runs[:2])
  last = straight[-1]
  assert last['seconds_per_step'] > 0 and 0 <= last['input_stall'] <= 1
  assert last['model_flops_per_second'] == pytest.approx(
      last['tokens_per_second'] * loop.flops.training_flops(runs[0].model, 8, 32) / (8 * 32))
  assert 'mfu' not in last  # nobody knows the peak of a CPU
  assert [row['starts'] for row in straight] == [1] * STEPS
  assert [row['starts'] for row in broken] == [1] * EVERY + [2] * (STEPS - EVERY)
  assert 0 < last['goodput'] <= 1 and broken[-1]['goodput'] < 1
  # Nothing is compiled after the first steps: the train step once, and what prints and saves.
  assert straight[-1]['compilations'] == straight[4]['compilations']


def test_each_batch_has_a_hash_of_its_own(runs):
  hashes = [[row['batch_hash'] for row in metrics.read_metrics(job.run_dir)] for job in runs[:2]]
  assert hashes[0] == hashes[1] and len(set(hashes[0])) == STEPS


def test_no_step_moves_anything_between_host_and_device_unseen(folder, compiled_once, monkeypatch):
  """The step and all that follows it until the next, under JAX's guard against transfers."""
  real = loop.step.make_train_step

  def guarded(*args, **kwargs):
    train_step = real(*args, **kwargs)

    def run(state, batch):
      with jax.transfer_guard('disallow'):
        return train_step(state, batch)
    return run

  monkeypatch.setattr(loop.step, 'make_train_step', guarded)
  loop.train(job_in(folder, 'guarded', steps=2))
  with jax.transfer_guard('disallow'), pytest.raises(Exception, match='Disallowed'):
    jax.jit(lambda x: x + 1)(np.ones(3))  # the guard is one
