"""Numbers that are no numbers stop a run one step late, with a dump; spikes are not taken."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retro_jax.errors import Diverged
from retro_jax.training import faults, loop
from retro_jax.training.spikes import skip_spikes
from tests.training.test_loop import folder, job_in  # noqa: F401 (a fixture)

NAMES = ['a', 'b', 'c']


def metrics(loss=1.0, stage=None, name=None, value=np.nan):
  sums = np.ones((3, 3), np.float32)
  if stage is not None:
    sums[faults.STAGES.index(stage):, NAMES.index(name)] = value
  return {'loss': jnp.float32(loss), 'sums': jnp.asarray(sums)}


@pytest.mark.parametrize('stage', faults.STAGES)
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_first_offender_is_named_one_step_late(tmp_path, stage, value):
  watch = faults.Watch(str(tmp_path), NAMES, lambda step: {'examples': [['task', 10 * step]]})
  watch.look()
  watch.expect(1, metrics())
  watch.look()
  watch.expect(2, metrics(stage=stage, name='b', value=value))  # nothing is said yet
  with pytest.raises(Diverged, match=f'step 2: {stage} of b is NaN or infinite') as error:
    watch.look()
  assert error.value.exit_code == 70 and '\n' not in str(error.value)
  dump = json.loads((tmp_path / 'nonfinite-step-2.json').read_text())
  assert dump['step'] == 2 and dump['first'] == f'{stage} of b'
  assert dump['batch'] == {'examples': [['task', 20]]}
  assert dump['parameters'][stage] == ['b'] and not dump['parameters'].get('nothing')
  watch.look()  # said once


def test_a_loss_that_is_no_number_stops_too(tmp_path):
  watch = faults.Watch(str(tmp_path), NAMES, lambda step: {})
  watch.expect(7, metrics(loss=np.inf))
  with pytest.raises(Diverged, match='step 7: the loss'):
    watch.look()


def test_skipped_steps_are_forgiven_until_they_come_in_a_row(tmp_path):
  watch = faults.Watch(str(tmp_path), NAMES, lambda step: {}, forgiven=2)
  bad = metrics(stage='gradient', name='c')
  bad['sums'] = bad['sums'].at[1:].set(1.0)  # skipped: nothing reached the parameters
  for step, found in enumerate([bad, bad, metrics(), bad, bad]):
    watch.expect(step, found)
    watch.look()
  watch.expect(5, bad)
  with pytest.raises(Diverged, match='gradient of c'):
    watch.look()


def test_parameters_that_are_no_numbers_are_never_forgiven(tmp_path):
  watch = faults.Watch(str(tmp_path), NAMES, lambda step: {}, forgiven=5)
  watch.expect(1, metrics(stage='parameter', name='a'))
  with pytest.raises(Diverged, match='parameter of a'):
    watch.look()


def test_a_run_whose_numbers_overflow_stops_and_keeps_its_last_good_checkpoint(folder):  # noqa: F811
  job = job_in(folder, 'overflow')
  job = dataclasses.replace(
      job, optimizer=dataclasses.replace(job.optimizer, peak_learning_rate=1e38, warmup_steps=4),
      checkpoints=dataclasses.replace(job.checkpoints, every=1, keep=0))
  with pytest.raises(Diverged) as error:
    loop.train(job)
  (dump,) = Path(job.run_dir).glob('nonfinite-step-*.json')
  facts = json.loads(dump.read_text())
  assert str(dump) in str(error.value) and len(facts['batch']['examples']) == 8
  saved = [int(p.name) for p in (Path(job.run_dir) / 'checkpoints').iterdir()]
  assert max(saved, default=0) < facts['step']


def reference_skips(losses, window, sigmas):
  """Which steps are taken, in plain Python."""
  kept, taken = [], []
  for loss in losses:
    last = kept[-window:]
    spike = not np.isfinite(loss) or (
        len(kept) >= window and loss > np.mean(last) + sigmas * np.std(last))
    taken.append(not spike)
    if not spike:
      kept.append(loss)
  return taken


def test_spikes_are_skipped_by_mean_and_deviations():
  rng = np.random.default_rng(0)
  losses = (5 + rng.normal(size=60)).astype(np.float32)
  losses[[3, 30, 45]] = 40, 40, np.nan  # the first comes before the window is full
  losses[50] = 5 + 2.5
  optimizer = skip_spikes(optax.adam(0.1), window=8, sigmas=4)
  parameters = {'w': jnp.ones((3,))}
  state = optimizer.init(parameters)
  step = jax.jit(lambda s, loss: optimizer.update({'w': jnp.ones((3,)) * loss}, s, parameters,
                                                  value=loss))
  taken = []
  for loss in losses:
    updates, after = step(state, loss)
    changed = bool((updates['w'] != 0).all())
    if not changed:
      assert (updates['w'] == 0).all()
      same = jax.tree.map(lambda a, b: bool((a == b).all()), after.inner, state.inner)
      assert all(jax.tree.leaves(same))
    taken.append(changed)
    state = after
  expected = reference_skips(losses, 8, 4)
  assert taken == expected and not taken[30] and not taken[45] and taken[3]
  assert int(state.skipped) == expected.count(False) and np.isfinite(state.losses).all()
