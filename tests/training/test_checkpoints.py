"""What stays of checkpoints, and what a fresh run begins with."""

import dataclasses

import jax
import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.training import checkpoints, loop
from retro_jax.training.checkpoints import CheckpointConfig, assigned, load_model
from tests.training.test_loop import folder, job_in  # noqa: F401 (a fixture)

NAMES = ['decoder.entry.a', 'decoder.tail.a', 'encoder.layers.0.b', 'encoder_embedding.table',
         'embedding.table']


def test_without_rules_every_name_is_its_own_source():
  assert assigned(NAMES, CheckpointConfig()) == {name: name for name in NAMES}


def test_the_first_rule_that_matches_counts():
  found = assigned(NAMES, CheckpointConfig(assignment=(
      (r'encoder_embedding\.(.*)', r'embedding.\1'), (r'encoder.*', None),
      (r'decoder\.(entry|tail)\.a', r'old.\1'))))
  assert found == {'decoder.entry.a': 'old.entry', 'decoder.tail.a': 'old.tail',
                   'encoder_embedding.table': 'embedding.table',
                   'embedding.table': 'embedding.table'}


@pytest.mark.parametrize('rules, message', [
    ((('(', 'x'),), 'no regular expression'),
    ((('encoder', None),), "'encoder' matches no parameter"),  # the whole name has to match
    ((('embeding.table', None),), "did you mean 'embedding.table'")])
def test_rules_that_cannot_be_meant_are_refused(rules, message):
  with pytest.raises(UserError, match=message) as error:
    assigned(NAMES, CheckpointConfig(assignment=rules))
  assert '\n' not in str(error.value)


@pytest.fixture(scope='module')
def trained(folder):  # noqa: F811
  """A short run to begin from, and the job of another one."""
  job = job_in(folder, 'first', steps=2)
  loop.train(job)
  return job


def begin(trained, name, config):
  """The parameters a run begins with: those of a run of no steps."""
  run = trained.run_dir.replace('first', name)
  job = dataclasses.replace(
      trained, run_dir=run, checkpoints=config,
      training=dataclasses.replace(trained.training, seed=1))
  update_rule = loop.optimizer.make_optimizer(job.optimizer, 2)
  mesh = loop.partitioning.make_mesh(job.mesh)
  abstract = loop.state.abstract_state(job.model, update_rule, job.rules, mesh)
  saved = checkpoints.Checkpoints(f'{run}/checkpoints', config)
  current, carried = loop._begin(job, update_rule, abstract, saved, {})
  saved.close()
  assert carried == {} and int(current.step) == 0
  for name, leaf in current.parameters.items():
    assert leaf.sharding == abstract.parameters[name].sharding
  return jax.device_get(current.parameters)


@pytest.mark.parametrize('kind', ['run', 'exported'])
def test_a_fresh_run_begins_with_another_model(trained, tmp_path, kind):
  _, expected, _ = load_model(trained.run_dir)
  source = trained.run_dir
  if kind == 'exported':
    source = str(tmp_path / 'exported')
    (tmp_path / 'exported').mkdir()
    checkpoints.safetensors.numpy.save_file(
        {name: np.asarray(value) for name, value in expected.items()},
        f'{source}/{checkpoints.SAFETENSORS}')
  found = begin(trained, f'second_{kind}', CheckpointConfig(
      initial=source, assignment=((r'encoder\..*', None),
                                  (r'encoder_embedding\.table', 'encoder_embedding.table'))))
  for name, value in expected.items():
    same = np.array_equal(found[name], value)
    if not name.startswith('encoder.'):
      assert same, name
    elif not name.endswith(('.scale', '_bias')):  # those begin as ones and zeros in any run
      assert not same, name


def test_what_the_initial_model_lacks_is_named(trained):
  with pytest.raises(UserError, match=r"holds no parameter decoder.nrm.scale \(did you mean "
                     r"'decoder.norm.scale'\?\), which decoder.norm.scale"):
    begin(trained, 'lacks', CheckpointConfig(
        initial=trained.run_dir, assignment=((r'decoder\.norm\.scale', 'decoder.nrm.scale'),)))
  with pytest.raises(UserError, match=r'parameter embedding.table is \(512, 8\), but '
                     r'decoder.norm.scale is \(8,\)'):
    begin(trained, 'misshapen', CheckpointConfig(
        initial=trained.run_dir, assignment=((r'decoder\.norm\.scale', 'embedding.table'),)))
  with pytest.raises(UserError, match='holds no finished checkpoint'):
    begin(trained, 'nowhere', CheckpointConfig(initial=trained.run_dir + '_of_nobody'))


def test_a_run_goes_on_from_its_own_checkpoint_and_not_from_the_initial_one(trained, capsys):
  job = dataclasses.replace(trained, checkpoints=CheckpointConfig(initial='nowhere'))
  assert loop.train(job) == {}
  assert 'continuing from the checkpoint of step 2' in capsys.readouterr().out
