"""Sweeps: expansion, refusals, laws, running with a stand-in for the trainer, one real sweep."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retro_jax
from retro_jax import files, storage
from retro_jax.errors import UserError
from retro_jax.models.config import RetroConfig
from retro_jax.models.flops import training_flops
from retro_jax.retrieval import pipeline
from retro_jax.sweeps import local, plan, scaling, summary, sweep_file
from tests import worlds

ROOT = Path(retro_jax.__file__).parents[1]


# ------------------------------------------------------------------------------ the format


def read(text: str) -> sweep_file.Sweep:
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / 'some.toml'
    path.write_text(text, encoding='utf-8')
    return sweep_file.read(str(path))


def axis(kind: str, name: str, count: int) -> str:
  values = ', '.join(f'{{ name = "{name}{i}", gin = {{ {name.upper()} = {i} }} }}'
                     for i in range(count))
  return f'[[{kind}]]\nname = "{name}"\nvalues = [{values}]\n'


@settings(max_examples=40)
@given(products=st.lists(st.integers(1, 4), max_size=3), zipped=st.integers(1, 4),
       zips=st.integers(0, 3))
def test_runs_are_the_product_in_order_and_zips_advance_together(products, zipped, zips):
  if not products and not zips:
    return
  names = [f'p{i}x' for i in range(len(products))] + [f'z{i}x' for i in range(zips)]
  counts = [*products, *[zipped] * zips]
  text = ''.join(axis('product' if name[0] == 'p' else 'zip', name, count)
                 for name, count in zip(names, counts))
  runs = read(text).runs(settings={'LAST': '1'})
  # By hand: an index for each product axis, one for all zips.
  indices = list(itertools.product(*map(range, products), *([range(zipped)] if zips else [])))
  expected = [index[:len(products)] + index[len(products):] * zips for index in indices]
  assert [[run.settings[name.upper()] for name in names] for run in runs] == [
      [str(i) for i in row] for row in expected]
  assert len({run.name for run in runs}) == len(runs) == len(expected)
  assert runs[0].name == '-'.join(f'{name}0' for name in names)
  assert all(run.labels == {n: f'{n}{i}' for n, i in zip(names, row)} and
             list(run.settings)[-1] == 'LAST' for run, row in zip(runs, expected))


def test_later_parts_override_earlier_ones():
  sweep = read('''
gin_files = ["a.gin"]
[gin]
SEED = 7
RetroConfig.d_model = 1
TRAIN_DATA = { "x/y" = 0.5 }
VALID_DATA = ""
FLAG = true
[[product]]
name = "size"
[[product.values]]
name = "s"
gin_files = ["b.gin"]
gin.RetroConfig = { d_model = 2, cca_layers = [1, 2] }
[[product]]
name = "lr"
setting = "PEAK_LEARNING_RATE"
values = [1e-4, 0.5, { name = "own", gin = { PEAK_LEARNING_RATE = "%O", RetroConfig.d_ff = 3 } }]
''')
  runs = sweep.runs(['c.gin'], {'SEED': '9'})
  assert [run.name for run in runs] == ['s-lr0.0001', 's-lr0.5', 's-own']
  assert runs[0].gin_files == ('a.gin', 'b.gin', 'c.gin')
  assert runs[0].settings == {
      'TRAIN_DATA': "{'x/y': 0.5}", 'VALID_DATA': '', 'FLAG': 'True', 'RetroConfig.d_model': '2',
      'RetroConfig.cca_layers': '[1, 2]', 'PEAK_LEARNING_RATE': '0.0001', 'SEED': '9'}
  assert runs[2].settings['RetroConfig.d_ff'] == '3'
  assert runs[2].settings['PEAK_LEARNING_RATE'] == '%O'
  assert runs[0].arguments('f/s')[-1] == '--gin.RUN_DIR=f/s'


ONE = '[[product]]\nname = "a"\nvalues = [{ name = "x" }]\n'


@pytest.mark.parametrize('text, words', [
    ('gin = {', 'not valid TOML'),
    ('', 'has no axis; add'),
    ('gim_files = ["x"]\n' + ONE, "has the key 'gim_files' (did you mean 'gin_files'?)"),
    ('product = 3', 'begin an axis with [[product]]'),
    ('[[product]]\nvalues = [1]', 'name is None'),
    ('[[product]]\nname = "a b"\nvalues = [1]', "name is 'a b', expected letters"),
    ('[[product]]\nname = "a"\nvalues = []', "axis 'a' has no values"),
    ('[[product]]\nname = "a"\nvalues = [1]', 'or say setting = "NAME"'),
    ('[[product]]\nname = "a"\nsetting = "S"\nvalues = ["x/y"]', "'x/y' gives no name"),
    ('[[product]]\nname = "a"\nvalues = [{ name = "x", gni = {} }]', "(did you mean 'gin'?)"),
    ('[[product]]\nname = "a"\nvalues = [{ name = "x" }, { name = "x" }]',
     "axis 'a' has two values called 'x'; rename one"),
    (ONE + ONE, "two axes are called 'a'; rename one"),
    (axis('zip', 'a', 2) + axis('zip', 'b', 3),
     "'a' has 2, 'b' has 3 values; make them equally many"),
    ('curves = ["sice"]\n' + axis('zip', 'size', 2), "(did you mean 'size'?)"),
    ('gin = { DAY = 2020-01-01 }\n' + ONE, 'DAY is a date, which no setting takes'),
])
def test_a_mistake_names_file_and_remedy(text, words):
  with pytest.raises(UserError) as error:
    read(text)
  assert 'some.toml: ' in str(error.value) and words in str(error.value)
  assert '\n' not in str(error.value)


def test_joined_names_that_collide_are_refused():
  text = ('[[product]]\nname = "a"\nvalues = [{ name = "x" }, { name = "x-y" }]\n'
          '[[product]]\nname = "b"\nvalues = [{ name = "y-z" }, { name = "z" }]\n')
  with pytest.raises(UserError, match="two runs are called 'x-y-z'; rename"):
    read(text).runs()
  for setting in ('RUN_DIR', 'TrainJob.run_dir'):
    with pytest.raises(UserError, match=f'{setting} is set, but it is --folder'):
      read(ONE).runs(settings={setting: 'x'})
  with pytest.raises(UserError, match='none.toml: no sweep file'):
    sweep_file.read('none.toml')


# ------------------------------------------------------------------------ shipped sweeps, sizes


DATA = {'TRAIN_DATA': "{'no/such': 1.0}"}


def test_paper_sizes_are_the_papers():
  planned = plan.resolve(sweep_file.read(str(ROOT / 'gin/sweeps/paper_sizes.toml')), 'gs://b/f',
                         settings=DATA)
  by_name = {run.name: run for run in planned}
  assert len(by_name) == 8
  counts = {'172m': (132, 172), '425m': (368, 425), '1_5b': (1309, 1451), '7_5b': (6982, 7532)}
  for size, pair in counts.items():
    for kind, millions in zip(('baseline', 'retro'), pair):
      run = by_name[f'{size}-{kind}']
      assert run.kind == kind and run.folder == f'gs://b/f/{size}-{kind}'
      assert run.parameters['non_embedding'] / 1e6 == pytest.approx(millions, rel=4e-3)
      training = run.job.training
      assert training.steps * training.batch_size * 2048 == 419_430_400_000
      assert run.job.optimizer.peak_learning_rate == (1e-4 if size == '7_5b' else 2e-4)
  line = by_name['1_5b-retro'].pod_command('paper_sizes', {'type': 'v5p-128', 'zone': 'z'})
  assert line[1:5] == ['train', '--name=paper-sizes-1-5b-retro', '--type=v5p-128', '--zone=z']
  assert line[5:7] == ['--', 'retro_jax.train']


def test_cpu_ladder_resolves_to_rising_sizes():
  planned = plan.resolve(sweep_file.read(str(ROOT / 'gin/sweeps/cpu_ladder.toml')), 'f',
                         settings={**DATA, 'VALID_DATA': 'v'})
  for kind in ('baseline', 'retro'):
    parameters = [run.parameters['non_embedding'] for run in planned if run.kind == kind]
    assert len(parameters) == 4 and parameters == sorted(set(parameters))
  assert plan.warnings(planned) == ['no training examples at no/such yet']


@pytest.mark.parametrize('setting, value, words', [
    ('TRAIN_STEP', '3', "run x: --gin.TRAIN_STEP: no file defines this macro (did you mean 'TRAIN"),
    ('RetroConfig.d_modl', '3', "has no parameter 'd_modl' (did you mean 'd_model'?)")])
def test_a_misspelt_override_is_found_in_resolving(setting, value, words):
  sweep = read('gin_files = ["gin/runs/pretrain.gin"]\n' + ONE)
  with pytest.raises(UserError) as error:
    plan.resolve(sweep, 'f', settings={**DATA, setting: value})
  assert 'some.toml: run x: ' in str(error.value) and words in str(error.value)


def test_two_runs_of_one_configuration_are_refused():
  text = 'gin_files = ["gin/runs/pretrain.gin"]\n' + ONE.replace('}', '}, { name = "y" }')
  with pytest.raises(UserError, match='runs x and y have the same configuration; remove one'):
    plan.resolve(read(text), 'f', settings=DATA)


def test_flops_count_every_layer_and_the_output():
  model = lambda layers, vocabulary=64: RetroConfig(
      vocab_size=vocabulary, d_model=16, num_layers=layers, num_heads=2, head_dim=8,
      chunk_length=8, cca_layers=())
  flops = lambda *args: training_flops(model(*args), 1, 32) / 32
  # A scanned layer counts as often as it runs.
  assert flops(6) - flops(4) == pytest.approx(flops(4) - flops(2))
  # READ: forward and two products backward, each of d multiplications and additions a piece.
  assert flops(2, 164) - flops(2) == pytest.approx(3 * 2 * 16 * 100)
  # The weights of a layer alone, without R, cost six operations each.
  assert flops(4) - flops(2) > 6 * 2 * (4 * 16 * 16 + 2 * 16 * 64)


# ------------------------------------------------------------------------------ scaling laws


SIZES = np.array([1e5, 2e5, 5e5, 1e6, 3e6, 1e7])


def test_a_planted_law_is_recovered():
  law = scaling.fit(SIZES, 0.7 + 0.4 * (SIZES / 1e6) ** -0.3)
  assert law.has_offset and law.determined
  assert (law.exponent, law.offset) == pytest.approx((0.3, 0.7), abs=1e-3)
  np.testing.assert_allclose(law(SIZES), 0.7 + 0.4 * (SIZES / 1e6) ** -0.3, atol=1e-5)
  plain = scaling.fit(SIZES[:3], 2 * SIZES[:3] ** -0.2)
  assert not plain.has_offset and plain.offset == 0 and plain.freedom == 1
  assert plain.exponent == pytest.approx(0.2)


def test_the_spread_covers_a_planted_exponent_about_as_often_as_it_says():
  rng = np.random.default_rng(3)
  x = np.repeat(SIZES, 3)
  covered = 0
  for _ in range(40):
    law = scaling.fit(x, 0.7 + 0.4 * (x / 1e6) ** -0.3 + rng.normal(size=len(x)) * 0.01)
    low, high = law.spread['exponent']
    covered += low <= 0.3 <= high
    assert law.deviation == pytest.approx(0.01, rel=0.6)
  assert covered >= 28  # 36 expected


def test_what_points_do_not_tell_is_said():
  assert scaling.fit(SIZES[:1], SIZES[:1]) is None
  two = scaling.fit(SIZES[:2], np.array([2.0, 1.0]))
  assert two.spread is None and 'nothing tells how sure' in summary.law_sentence(
      'baseline', two, 'non_embedding')
  rising = scaling.fit(SIZES, np.linspace(1, 2, 6))
  assert not rising.determined
  assert 'determine no power law' in summary.law_sentence('baseline', rising, 'non_embedding')
  four = scaling.fit(SIZES[:4], np.array([1.5, 1.32, 1.16, 1.09]))
  assert 'only 1 degree of freedom' in summary.law_sentence('x', four, 'non_embedding')


# --------------------------------------------------------------- running, with a stand-in


TINY = '''
gin_files = ["gin/machines/cpu.gin", "gin/runs/pretrain.gin"]
[gin]
TRAIN_STEPS = 6
BATCH_SIZE = 4
EVALUATE_EVERY = 6
CHECKPOINT_EVERY = 2
DATA = 1
FSDP = 1
PEAK_LEARNING_RATE = 1e-2
TrainingConfig = { evaluate_examples = 8, log_every = 1 }
OptimizerConfig.warmup_steps = 2

[gin.RetroConfig]
vocab_size = 512
chunk_length = 8
num_neighbors = 3
num_layers = 1
num_heads = 2
encoder_layers = 1
encoder_heads = 2
encoder_head_dim = 4
encoder_d_model = 8
encoder_d_ff = 16

[[product]]
name = "model"
values = [
  { name = "baseline", gin = { RetroConfig.cca_layers = [] } },
  { name = "retro", gin = { RetroConfig.cca_layers = [1] } },
]

[[zip]]
name = "width"
values = [
  { name = "d8", gin = { RetroConfig.d_model = 8 } },
  { name = "d16", gin = { RetroConfig.d_model = 16 } },
  { name = "d24", gin = { RetroConfig.d_model = 24 } },
]

[[zip]]
name = "head"
setting = "RetroConfig.head_dim"
values = [4, 8, 12]
'''


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """Training and validation examples, and the sweep over them: file, settings."""
  folder = tmp_path_factory.mktemp('sweep')
  store, _ = worlds.examples(folder / 'data', worlds.documents(0, 20, longest=60))
  valid = worlds.store(folder / 'data/valid_db', worlds.documents(1, 12, longest=60, prefix='v'))
  pipeline.build_examples(
      folder / 'data/valid', valid, store, folder / 'data/index',
      pipeline.ExamplesConfig(32, 3, margin=2, examples_per_shard=4))
  (folder / 'tiny.toml').write_text(TINY, encoding='utf-8')
  return folder, {'TRAIN_DATA': f"{{'{folder}/data/examples': 1.0}}",
                  'VALID_DATA': f'{folder}/data/valid'}


# In the place of the trainer: FOLDER and what to do there.
STAND_IN = '''
import json, os, pathlib, signal, sys, time
folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]
with open(folder / 'calls', 'a') as f:
  f.write(what + '\\n')
def finish(*unused):
  with open(folder / 'metrics.jsonl', 'a') as f:
    f.write(json.dumps({'step': 6, 'loss': 1.0, 'valid_off': 2.0, 'valid_on': 1.5}) + '\\n')
  (folder / 'checkpoints' / '6').mkdir(parents=True)
if what == 'fail':
  print('error: something is wrong')
  sys.exit(2)
if what == 'wait':
  def stop(*unused):
    (folder / 'told').touch()
    sys.exit(0)
  signal.signal(signal.SIGTERM, stop)
  (folder / 'ready').touch()
  time.sleep(60)
if what == 'slow':
  (folder / 'ready').touch()
  time.sleep(3)
finish()
'''


@pytest.fixture
def stand_in(world, monkeypatch, tmp_path):
  """Planned runs whose process does what `behaviour` says of its name; else it finishes."""
  behaviour: dict[str, str] = {}
  monkeypatch.setattr(plan.Planned, 'local_command', lambda run, devices: [
      sys.executable, '-c', STAND_IN, run.folder, behaviour.get(run.name, 'finish')])
  monkeypatch.setattr(local, '_POLL', 0.05)
  sweep = sweep_file.read(str(world[0] / 'tiny.toml'))
  return lambda **more: plan.resolve(sweep, str(tmp_path / 'runs'), settings={**world[1], **more}
                                     ), behaviour, sweep


def calls(run: plan.Planned) -> list[str]:
  path = Path(run.folder) / 'calls'
  return path.read_text().split() if path.exists() else []


def test_a_failure_is_passed_over_named_and_tried_again(stand_in, capsys):
  resolve, behaviour, sweep = stand_in
  planned = resolve()
  behaviour['baseline-d16-head8'] = 'fail'
  failures = local.run_all(planned, 1)
  assert [(f.name, f.reason) for f in failures] == [
      ('baseline-d16-head8', 'exit code 2: error: something is wrong')]
  assert 'something is wrong' in Path(failures[0].log).read_text()
  found = summary.collect(sweep, planned, {f.name: f.reason for f in failures})
  assert [run['state'] for run in found['runs']] == [
      'finished', 'failed at not started', *['finished'] * 4]
  behaviour.clear()
  capsys.readouterr()
  assert local.run_all(planned, 1) == []
  assert [calls(run) for run in planned] == [
      ['finish'], ['fail', 'finish'], *[['finish']] * 4]
  assert capsys.readouterr().out.count('finished, skipped') == 5
  assert 'finished' in summary.table(summary.collect(sweep, planned))


def test_an_end_without_the_last_checkpoint_is_a_failure(stand_in, monkeypatch):
  resolve = stand_in[0]
  monkeypatch.setattr(plan.Planned, 'local_command', lambda run, devices: ['true'])
  failures = local.run_all(resolve()[:1], 1)
  assert failures[0].reason == 'ended before step 6 was saved'


def test_another_configuration_is_refused_before_anything_runs(stand_in):
  resolve = stand_in[0]
  local.run_all(resolve()[2:3], 1)
  with pytest.raises(UserError, match=r'd24-head12: was made with optimizer.peak_learning_rate = '
                                      r'0.01, now 0.5; choose another --folder'):
    local.run_all(resolve(PEAK_LEARNING_RATE='0.5'), 1)
  assert [calls(run) for run in resolve()] == [[], [], ['finish'], [], [], []]
  foreign = Path(resolve()[0].folder)
  foreign.mkdir()
  (foreign / 'metrics.jsonl').write_text('{"step": 1}\n')
  with pytest.raises(UserError, match='holds a run that no sweep made'):
    local.run_all(resolve(), 1)
  # What was made elsewhere has no such description, but the trainer's own.
  storage.write_json(foreign / 'model.json', {'model': {'d_model': 9}})
  with pytest.raises(UserError, match=r'was trained with \w+ = None'):
    summary.collect(stand_in[2], resolve())


def test_rebuilt_examples_are_another_configuration(stand_in, world):
  resolve = stand_in[0]
  run = resolve()[0]
  local.run_all([run], 1)
  there = json.loads((Path(run.folder) / plan.DESCRIPTION).read_text())
  there['made_with']['examples'][f'{world[0]}/data/valid'] = 'other'
  storage.write_json(Path(run.folder) / plan.DESCRIPTION, there)
  with pytest.raises(UserError, match="data/valid = 'other', now '"):
    local.run_all([run], 1)


def test_a_signal_goes_on_to_the_child_and_ends_the_sweep(stand_in):
  resolve, behaviour, _ = stand_in
  planned = resolve()
  behaviour['baseline-d16-head8'] = 'wait'
  folder = Path(planned[1].folder)

  def interrupt():
    while not (folder / 'ready').exists():
      time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)

  before = signal.getsignal(signal.SIGTERM)
  threading.Thread(target=interrupt, daemon=True).start()
  with pytest.raises(local.Stopped, match='SIGTERM'):
    local.run_all(planned, 1)
  assert (folder / 'told').exists()
  assert [bool(calls(run)) for run in planned] == [True, True, False, False, False, False]
  assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_outlived_its_sweep_is_waited_for(stand_in, capsys):
  run = stand_in[0]()[0]
  folder = Path(run.folder)
  folder.mkdir(parents=True)
  with open(folder / '.running', 'a+') as lock:
    import fcntl
    fcntl.flock(lock, fcntl.LOCK_EX)
    orphan = subprocess.Popen([sys.executable, '-c', STAND_IN, run.folder, 'slow'],
                              pass_fds=[lock.fileno()])
    lock.write(str(orphan.pid))
  run.write_description()
  while not (folder / 'ready').exists():
    time.sleep(0.02)
  assert local.run_all([run], 1) == []
  orphan.wait()
  assert calls(run) == ['slow']
  assert f'process {orphan.pid} of a sweep that was killed' in capsys.readouterr().out


# ------------------------------------------------------------------------------- for real


def command(world, folder, *arguments):
  return [sys.executable, 'launch/sweep.py', str(world[0] / 'tiny.toml'), f'--folder={folder}',
          *(f'--gin.{name}={value}' for name, value in world[1].items()), *arguments]


def call(world, folder, *arguments, **more):
  return subprocess.run(command(world, folder, *arguments), cwd=ROOT, text=True, check=False,
                        capture_output=True, **more)


@pytest.mark.parametrize('arguments, words', [
    (['--dry_run', '--gin.TRAIN_STEP=3'], "(did you mean 'TRAIN_STEPS'?)"),
    (['--dry_run', '--divices=3'], "unknown argument '--divices=3'"),
    (['--emit=pod', '--type=v5p-8'], '--emit=pod needs --zone= --project=')])
def test_mistakes_on_the_command_line_are_one_line_and_exit_code_2(world, tmp_path, arguments,
                                                                   words):
  result = call(world, tmp_path / 'runs', *arguments)
  errors = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
  assert result.returncode == 2 and len(errors) == 1 and words in errors[0], result.stderr
  assert 'Traceback' not in result.stderr and not (tmp_path / 'runs').exists()


def test_pod_commands_are_all_that_stdout_holds(world):
  pod = ['--type=v5p-8', '--zone=europe-west4-b', '--project=p']
  result = call(world, 'gs://bucket/runs', '--emit=pod', *pod)
  lines = result.stdout.splitlines()
  assert result.returncode == 0 and len(lines) == 6, result.stderr
  assert lines[3].startswith('launch/tpu_pod.sh train --name=tiny-retro-d8-head4 '
                             f'{" ".join(pod)} -- retro_jax.train --gin_file=gin/')
  assert lines[3].endswith('--gin.RUN_DIR=gs://bucket/runs/retro-d8-head4')


def test_runs_in_a_bucket_are_collected(world):
  sweep = sweep_file.read(str(world[0] / 'tiny.toml'))
  planned = plan.resolve(sweep, 'ram://sweep-test', settings=world[1])
  rows = [{'step': 5, 'loss': 1.0}, {'step': 6, 'valid_off': 2.5, 'valid_on': 2.0}]
  text = ''.join(json.dumps(row) + '\n' for row in rows).encode()
  for run in planned[3:5]:
    files.write_bytes(files.join(run.folder, 'metrics.jsonl'), text)
  files.write_bytes(files.join(planned[3].folder, 'checkpoints/6/_CHECKPOINT_METADATA'), b'{}')
  runs = summary.collect(sweep, planned)['runs']
  assert [run['state'] for run in runs] == [
      *['not started'] * 3, 'finished', 'step 6', 'not started']
  assert runs[3]['bits_per_byte'] == {'retro_off': 2.5, 'retro_on': 2.0}


@pytest.fixture(scope='module')
def swept(world, tmp_path_factory):
  """A real sweep, killed with its child in the middle of the second run and started again."""
  folder = tmp_path_factory.mktemp('swept') / 'runs'
  environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(folder.parent / 'compiled'),
                 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3'}
  second = folder / 'baseline-d16-head8'
  first_call = subprocess.Popen(command(world, folder, '--run', '--devices=1'), cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
  # After step 2 was saved; the last step is followed by compiling the evaluation.
  while not (second / 'checkpoints' / '2').exists() and first_call.poll() is None:
    time.sleep(0.01)
  assert first_call.poll() is None, first_call.communicate()[0]
  first_call.kill()
  os.kill(int((second / '.running').read_text()), signal.SIGKILL)
  said = first_call.communicate()[0]
  killed = {path.parent.name: path.read_bytes() for path in folder.glob('*/log.txt')}
  rest = call(world, folder, '--run', '--devices=1', env=environment)
  return folder, said, killed, rest


def test_a_killed_sweep_goes_on(swept):
  folder, said, killed, rest = swept
  assert list(killed) and set(killed) == {'baseline-d8-head4', 'baseline-d16-head8'}, said
  assert rest.returncode == 0, rest.stdout + rest.stderr
  assert '1/6 baseline-d8-head4: finished, skipped' in rest.stdout
  assert (folder / 'baseline-d8-head4/log.txt').read_bytes() == killed['baseline-d8-head4']
  log = (folder / 'baseline-d16-head8/log.txt').read_text()
  assert log.count('retro_jax.train') == 2 and 'starting at step 0' not in log.split('---')[-1]
  assert rest.stdout.count(': finished\n') == 5


def test_its_results_are_a_table_and_a_picture(swept, world):
  folder, _, _, rest = swept
  found = json.loads((folder / 'sweep.json').read_text())
  assert [run['state'] for run in found['runs']] == ['finished'] * 6
  for run in found['runs']:
    expected = {'baseline'} if run['kind'] == 'baseline' else {'retro_off', 'retro_on'}
    assert set(run['bits_per_byte']) == expected
    assert all(0.5 < value < 8 for value in run['bits_per_byte'].values())
    rows = (folder / run['name'] / 'metrics.jsonl').read_text().splitlines()
    assert json.loads(rows[-2])['valid_off'] in run['bits_per_byte'].values()
    assert f'{next(iter(run["bits_per_byte"].values())):.4f}' in rest.stdout
    assert run['positions'] == 6 * 4 * 32 and run['training_flops'] > 0
  assert {(law['x'], law['series']) for law in found['laws']} == {
      (x, name) for x in ('non_embedding', 'training_flops')
      for name in ('baseline', 'RETRO[OFF]', 'RETRO[ON]')}
  assert (folder / 'sweep.png').read_bytes().startswith(b'\x89PNG')
  assert '| retro-d24-head12 ' in (folder / 'sweep.md').read_text()
  elsewhere = folder.parent / 'results'
  again = call(world, folder, '--collect', f'--results={elsewhere}')
  assert again.returncode == 0 and (elsewhere / 'sweep.md').exists(), again.stderr


def test_two_sweeps_on_one_folder_are_refused(world, tmp_path):
  with storage.locked(tmp_path / 'runs'):
    result = call(world, tmp_path / 'runs', '--run')
  assert result.returncode == 2 and 'is building here' in result.stderr
