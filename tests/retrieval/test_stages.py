"""Who runs the tasks does not show in what they leave; failures are one line and lose nothing."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import retro_jax
from retro_jax import storage
from retro_jax.errors import UserError
from retro_jax.retrieval import stages
from tests.stage_functions import die, hold, killed_while_writing, refuse
from tests.stage_functions import squares_tasks as tasks

ROOT = Path(retro_jax.__file__).parents[1]
BEAM = stages.BeamRunner(('--runner=DirectRunner', '--direct_running_mode=multi_processing',
                          '--direct_num_workers=2'))


def content(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.parametrize('runner', [
    stages.LocalRunner(0), stages.LocalRunner(1), stages.LocalRunner(3), BEAM], ids=str)
def test_every_runner_leaves_the_same_bytes(tmp_path, runner):
  for task in tasks(tmp_path / 'expected'):
    task.run()
  assert runner.run('squares', tasks(tmp_path / 'made')) == 5
  assert content(tmp_path / 'made') == content(tmp_path / 'expected')
  assert runner.run('squares', tasks(tmp_path / 'made')) == 0
  assert tasks(tmp_path / 'made')[2].manifest()['largest'] == 16


def test_two_processes_share_the_work(tmp_path):
  program = (
      'import sys; from pathlib import Path; from retro_jax.retrieval import stages\n'
      'from tests.stage_functions import squares_tasks as tasks\n'
      'runner = stages.DistributedRunner(sys.argv[1], 2, int(sys.argv[2]))\n'
      'with stages.building_in(sys.argv[3], runner):\n'
      '  print("ran", runner.run("squares", tasks(Path(sys.argv[3]), 6)), runner.leads)\n')
  port = 20000 + os.getpid() % 20000
  started = [subprocess.Popen(
      [sys.executable, '-c', program, f'localhost:{port}', str(i), str(tmp_path / 'made')],
      cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo'})
             for i in range(2)]
  outputs = [process.communicate(timeout=120) for process in started]
  # Gloo says hello on standard output.
  said = [[line for line in out.splitlines() if line.startswith('ran')] for out, _ in outputs]
  assert said == [['ran 6 True'], ['ran 6 False']], outputs
  # Weights are 1 to 6: each did every other task.
  assert '[0 of 2]: 9/9' in outputs[0][1] and '[1 of 2]: 12/12' in outputs[1][1]
  for task in tasks(tmp_path / 'expected', 6):
    task.run()
  assert content(tmp_path / 'made') == content(tmp_path / 'expected')


@pytest.mark.parametrize('runner', [stages.LocalRunner(0), stages.LocalRunner(2), BEAM], ids=str)
def test_a_failure_is_one_line_and_finished_tasks_stay(tmp_path, runner):
  bad = stages.Task(str(tmp_path / 'bad'), 'squares', {}, refuse)
  with stages.building_in(tmp_path, runner), pytest.raises(
      UserError, match='^records.jsonl:7: no text; correct the line') as error:
    runner.run('squares', [*tasks(tmp_path, 2), bad])
  assert '\n' not in str(error.value)
  # Beam may leave its other worker in the middle of a task; the next builder tidies up.
  assert runner is BEAM or not any(p.name.startswith('.') for p in tmp_path.iterdir())
  with stages.building_in(tmp_path, runner):
    left = {p.name for p in tmp_path.iterdir()} - {storage.LOCK}
    assert left <= {'task-0', 'task-1'}
    ran, missing = runner.run('squares', tasks(tmp_path, 2)), 2 - len(left)
    assert ran == missing or (runner is BEAM and ran < missing)  # that worker may have ended one
  assert {p.name for p in tmp_path.iterdir()} == {'task-0', 'task-1'}
  assert not stages.pending(tasks(tmp_path, 2))


def test_a_worker_that_dies_is_named(tmp_path):
  killer = stages.Task(str(tmp_path / 'x'), 'squares', {}, die)
  with pytest.raises(UserError, match='a worker process died .* finished shards are kept'):
    stages.LocalRunner(1).run('squares', [killer])


def test_reasons_are_told(tmp_path):
  made = tasks(tmp_path)
  stages.HERE.run('squares', made[:3])
  changed = stages.Task(made[0].folder, 'squares', {'count': 99}, made[0].make)
  (tmp_path / 'task-1' / 'squares.npy').unlink()
  storage.set_aside(tmp_path / 'task-2')
  said = stages.describe('squares', [changed, *made[1:]], 'numbers')
  assert said.splitlines()[0] == 'squares: 0 of 5 shards done, 15 numbers to do'
  assert 'stale: count changed' in said and '2 missing' in said and 'set aside' in said
  assert 'squares.npy: missing or of another size' in said


def test_one_builder_at_a_time_and_a_killed_one_holds_nothing(tmp_path):
  context = multiprocessing.get_context('spawn')
  ready = context.Event()
  other = context.Process(target=hold, args=(str(tmp_path / 'db'), ready))
  other.start()
  assert ready.wait(60)
  left = tmp_path / 'db' / 'chunks' / '.a.building-x'
  left.mkdir(parents=True)
  file = tmp_path / 'db' / 'manifest.json'
  killed = context.Process(target=killed_while_writing, args=(str(file),))
  killed.start()
  killed.join()
  assert killed.exitcode == -signal.SIGKILL and not file.exists()
  assert len(list(file.parent.glob('.manifest.json*'))) == 1
  with pytest.raises(UserError, match=f'process {other.pid}, since .* is building here'):
    with storage.locked(tmp_path / 'db'):
      raise AssertionError('two builders')
  assert left.exists()
  other.kill()
  other.join()
  with storage.locked(tmp_path / 'db'):
    assert not left.exists() and not list(file.parent.glob('.manifest.json*'))
  assert not (tmp_path / 'db' / storage.LOCK).exists()


def test_workers_do_not_outlive_their_parent(tmp_path):
  program = (
      'import functools, sys; from retro_jax.retrieval import stages\n'
      'from tests.stage_functions import sleep\n'
      'stages.LocalRunner(1).run("sleep", [stages.Task('
      'sys.argv[1], "squares", {}, functools.partial(sleep, sys.argv[2]))])\n')
  parent = subprocess.Popen(
      [sys.executable, '-c', program, str(tmp_path / 'x'), str(tmp_path / 'pid')], cwd=ROOT)
  deadline = time.monotonic() + 60
  while not (tmp_path / 'pid').exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  worker = int((tmp_path / 'pid').read_text())
  parent.kill()
  parent.wait()
  while time.monotonic() < deadline:
    try:
      os.kill(worker, 0)
    except ProcessLookupError:
      return
    time.sleep(0.05)
  raise AssertionError('the worker is still there')
