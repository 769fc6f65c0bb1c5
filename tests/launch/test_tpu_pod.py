"""launch/tpu_pod.sh against a stand-in gcloud whose workers are folders; see stub/."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from retro_jax.sweeps import plan, sweep_file
from tests.launch import scripts

STUB = scripts.ROOT / 'tests' / 'launch' / 'stub'
FLAGS = ('--name', 'r1', '--type', 'v5litepod-16', '--zone', 'us-west4-a', '--project', 'p')
TRAINING = ('--', 'retro_jax.train', "--gin.X=b c's", '--gin.RUN_DIR=gs://b/r1')


class Pod:
  """A checkout of the launchers, and a slice that does not exist yet."""

  def __init__(self, folder):
    self.folder, self.root = folder / 'stub', folder / 'checkout'
    self.folder.mkdir()
    shutil.copytree(scripts.ROOT / 'launch', self.root / 'launch')
    self.git('init', '-q')
    self.commit()
    # TPUs' images have a Python that is too old; here it must not be looked for in the network.
    (folder / 'bin').mkdir()
    for name, content in (('python3.11', 'exit 0'), ('python3', f'exec {sys.executable} -S "$@"')):
      (folder / 'bin' / name).write_text(f'#!/bin/sh\n{content}\n')
      (folder / 'bin' / name).chmod(0o755)
    self.variables = {
        'PATH': f'{STUB}:{folder / "bin"}:{os.environ["PATH"]}', 'STUB': str(self.folder),
        'STUB_BIN': str(STUB), 'TMPDIR': str(folder), 'RETRO_POLL_SECONDS': '0.1',
        'RETRO_SETTLE_SECONDS': '0', 'RETRO_UNREACHABLE': '3'}

  def git(self, *arguments):
    subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a', *arguments], cwd=self.root,
                   check=True, capture_output=True)

  def commit(self):
    self.git('add', '-A')
    self.git('commit', '-qm', 'a')

  def set(self, name, content=''):
    (self.folder / name).write_text(content)

  def call(self, command, *arguments, training=None, **variables):
    if training is None:
      training = TRAINING if command in ('train', 'run') else ()
    return scripts.run('tpu_pod.sh', command, *FLAGS, *arguments, *training, root=self.root,
                       **{**self.variables, **variables})

  def calls(self):
    """'queued-resources create', ... in order, without the questions."""
    file = self.folder / 'calls.jsonl'
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [' '.join(c[2:4] if c[0] == 'compute' else c[:2]) for c in lines
            if 'describe' not in c and 'ls' not in c and not any('worker.sh state' in w for w in c)]

  def attempts(self, worker=0):
    file = self.folder / f'attempts-{worker}'
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

  def clean_up(self):
    for file in self.folder.glob('worker-*/retro_runs/*/*'):
      if file.name in ('pid', 'child'):
        with contextlib.suppress(ProcessLookupError, ValueError):
          os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.fixture
def pod(tmp_path):
  made = Pod(tmp_path)
  yield made
  made.clean_up()


CREATE, DELETE = 'queued-resources create', 'queued-resources delete'
SCP, SSH = 'tpu-vm scp', 'tpu-vm ssh'
INSTALL_TO_START = [SCP, SSH, SSH, SSH]


def test_train_from_nothing_to_the_end(pod):
  pod.set('plan', '0 0')
  result = pod.call('train', '--spot', '--env', 'A=b c', '--env=D=e')
  assert result.returncode == 0, result.stderr
  assert pod.calls() == [CREATE, *INSTALL_TO_START]
  for worker in range(2):
    attempt, = pod.attempts(worker)
    assert attempt['argv'] == ['-u', '-m', 'retro_jax.train', "--gin.X=b c's",
                               '--gin.RUN_DIR=gs://b/r1']
    expected = {'RETRO_NUM_PROCESSES': 'auto', 'RETRO_START_TIMEOUT': '300', 'A': 'b c', 'D': 'e',
                'JAX_PLATFORMS': 'tpu,cpu'}
    assert expected.items() <= attempt['environment'].items()
  assert 'still there and costs money' in result.stderr
  assert 'attempt 0 on worker 1: 0' in pod.call('logs', '--worker', 'all').stdout
  status = pod.call('status', '--bucket', 'gs://b').stdout
  assert 'ACTIVE' in status and '2: 0 running, ended with 0 0' in status, status


@pytest.mark.parametrize('code, words', [(2, 'bad input'), (70, 'not finite')])
def test_some_exit_codes_are_not_tried_again(pod, code, words):
  pod.set('plan', f'69 {code}')  # the other worker's 69 only says that it lost this one
  result = pod.call('train', '--delete_at_end')
  assert result.returncode == code and words in result.stderr, result.stderr
  assert len(pod.attempts()) == 1 and pod.calls()[-1] == DELETE


def test_preemption_in_the_middle_makes_a_new_slice_and_goes_on(pod):
  pod.set('plan', 'preempt run\n0 0')
  result = pod.call('train')
  assert result.returncode == 0, result.stderr
  assert pod.calls() == [CREATE, *INSTALL_TO_START, DELETE, CREATE, *INSTALL_TO_START]
  assert 'taken away' in result.stderr and len(pod.attempts(1)) == 2


def test_preempted_by_sigterm_on_a_slice_that_stays(pod):
  pod.set('plan', '75 75\n0 0')
  result = pod.call('train')
  assert result.returncode == 0, result.stderr
  assert pod.calls() == [CREATE, *INSTALL_TO_START, *INSTALL_TO_START]


def test_other_failures_are_tried_a_few_times(pod):
  pod.set('plan', '1 69\n' * 9)
  result = pod.call('train', '--max_failures', '2')
  assert result.returncode == 1 and 'giving up' in result.stderr, result.stderr
  assert len(pod.attempts()) == 3


def test_a_new_checkpoint_forgives_failures(pod):
  pod.set('plan', '1 69\n1 69\n1 69\n0 0')
  pod.set('saves')
  result = pod.call('train', '--max_failures', '1')
  assert result.returncode == 0 and 'from checkpoint 300' in result.stderr, result.stderr


def test_one_worker_fails_while_the_others_hang(pod):
  pod.set('plan', 'deaf 137\n0 0')
  result = pod.call('train', RETRO_GRACE_SECONDS='4')
  assert result.returncode == 0, result.stderr
  assert 'exit code 137' in result.stderr and 'ending them' in result.stderr


def test_a_worker_that_was_killed_with_its_shell(pod):
  pod.set('plan', 'reboot 0\n0 0')
  result = pod.call('train')
  assert result.returncode == 0 and 'exit code 255' in result.stderr, result.stderr


def test_a_missing_host_at_the_start_gets_a_new_slice(pod):
  pod.set('plan', '0 0')
  pod.set('missing', '1')
  result = pod.call('train')
  assert result.returncode == 0, result.stderr
  assert 'could not be copied to all workers' in result.stderr and 'exit code 69' in result.stderr
  assert pod.calls() == [CREATE, SCP, SCP, DELETE, CREATE, *INSTALL_TO_START]


def test_a_host_that_goes_missing_during_the_run(pod):
  pod.set('plan', 'run run\n0 0')
  process = start_train(pod)
  pod.set('missing', '1')
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, out + err
  assert 'has not answered 3 times' in err and len(pod.attempts()) == 2


def start_train(pod, **variables):
  process = subprocess.Popen(
      ['launch/tpu_pod.sh', 'train', *FLAGS, *TRAINING], cwd=pod.root, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=scripts.hear_interrupts,
      env={**os.environ, **pod.variables, **variables})
  while not all(pod.attempts(worker) for worker in range(2)):
    assert process.poll() is None, process.communicate()
    time.sleep(0.05)
  return process


def test_stop_saves_and_ends_train_without_another_try(pod):
  pod.set('plan', 'run run\n0 0')
  process = start_train(pod)
  stopped = pod.call('stop')
  assert stopped.returncode == 0 and 'nothing runs' in stopped.stderr, stopped.stderr
  out, err = process.communicate(timeout=120)
  assert process.returncode == 75 and 'stopped as asked' in err, out + err
  assert len(pod.attempts()) == 1


def test_the_run_outlives_the_launcher_and_is_found_again(pod):
  pod.set('plan', 'run run\n0 0')
  first = start_train(pod)
  first.send_signal(signal.SIGINT)
  _, err = first.communicate(timeout=120)
  assert first.returncode == 130 and 'goes on on its workers' in err, err
  busy = pod.call('run')
  assert busy.returncode == 2 and 'runs already' in busy.stderr, busy.stderr
  second = start_train(pod)
  watching = next(line for line in second.stderr if 'runs already' in line)
  assert 'on 2 of 2 workers; watching it' in watching
  pod.call('stop')
  second.communicate(timeout=120)
  assert second.returncode == 75 and len(pod.attempts()) == 1


def test_a_gcloud_that_hangs_during_the_run_leaves_it_running(pod):
  pod.set('plan', 'run run\n0 0')
  process = start_train(pod, RETRO_REACH_SECONDS='2', RETRO_ASK_SECONDS='0.5',
                        RETRO_UNREACHABLE='2')
  time.sleep(0.5)  # past its start
  pod.set('hang-ssh')
  pod.set('hang-describe')
  _, err = process.communicate(timeout=120)
  assert process.returncode == 69 and 'call train again' in err, err
  for verb in ('ssh', 'describe'):
    (pod.folder / f'hang-{verb}').unlink()
  assert '2: 2 running' in pod.call('status').stdout


@pytest.mark.parametrize('code', [2, 69])
def test_preflight_decides_whether_it_starts(pod, code):
  pod.set('plan', '0 0')
  pod.set('preflight-1', str(code))
  result = pod.call('train', '--max_relaunches', '1')
  assert result.returncode == code and not pod.attempts(), result.stderr
  assert pod.calls().count(CREATE) == 1
  assert f'preflight failed, exit code {code}' in result.stderr
  assert '--run_dir=gs://b/r1' in result.stderr  # what the workers said


def test_an_install_that_fails_on_one_worker(pod):
  pod.set('fail-install', '1')
  result = pod.call('train', '--max_failures', '1')
  assert result.returncode == 1 and 'install failed, exit code 1' in result.stderr, result.stderr
  assert not pod.attempts()


@pytest.mark.parametrize('verb', ['describe', 'create'])
def test_a_gcloud_that_hangs_is_given_up(pod, verb):
  pod.set(f'hang-{verb}')
  result = pod.call('create', '--max_failures', '1', RETRO_ASK_SECONDS='0.5')
  assert result.returncode == 69 and 'no answer within 0.5 s' in result.stderr, result.stderr


def test_an_ssh_that_hangs_is_given_up(pod):
  pod.set('hang-ssh')
  result = pod.call('train', '--max_relaunches', '1', RETRO_REACH_SECONDS='1',
                    RETRO_INSTALL_SECONDS='1')
  assert result.returncode == 69 and 'no answer within 1 s' in result.stderr, result.stderr
  assert 'install: 0 of 2 workers answered' in result.stderr


def test_a_request_that_gcloud_refuses(pod):
  pod.set('refuse', '2')
  result = pod.call('create')
  assert result.returncode == 2 and pod.calls() == [CREATE], result.stderr
  pod.set('refuse', '1')
  result = pod.call('create', '--max_failures', '1')
  assert result.returncode == 69 and '2 requests came to nothing' in result.stderr, result.stderr


def test_a_slice_that_does_not_come(pod):
  pod.set('state', 'WAITING_FOR_RESOURCES ' * 500)
  result = pod.call('create', '--wait', '1')
  assert result.returncode == 69 and 'not usable within 1 s' in result.stderr, result.stderr
  assert pod.calls() == []


def test_a_request_that_fails_later_is_made_again_a_few_times(pod):
  pod.set('becomes', 'CREATING WAITING_FOR_RESOURCES FAILED')
  result = pod.call('create', '--max_failures', '1')
  assert result.returncode == 69 and '2 requests came to nothing' in result.stderr, result.stderr
  assert pod.calls() == [CREATE, DELETE, CREATE, DELETE]


def test_a_slice_that_is_there_is_used_and_a_suspended_one_replaced(pod):
  pod.set('state', 'ACTIVE')
  assert pod.call('create').returncode == 0 and pod.calls() == []
  pod.set('state', 'SUSPENDED')
  assert pod.call('create').returncode == 0 and pod.calls() == [DELETE, CREATE]


def test_changed_files_are_refused_or_taken_along(pod):
  pod.set('plan', '0 0')
  with open(pod.root / 'launch' / 'worker.sh', 'a', encoding='utf-8') as f:
    f.write('# changed\n')
  result = pod.call('train')
  assert result.returncode == 2 and 'commit them' in result.stderr and not pod.calls()
  result = pod.call('train', '--allow-dirty')
  assert result.returncode == 0, result.stderr
  installed = pod.folder / 'worker-1' / 'retro_jax' / 'launch' / 'worker.sh'
  assert installed.read_text().endswith('# changed\n')


@pytest.mark.parametrize('command, expected', [
    ('create', ['create']), ('install', ['archive', 'scp', 'install']),
    ('preflight', ['preflight']), ('run', ['start']), ('status', ['describe', 'state']),
    ('logs', ['logs']), ('stop', ['stop']), ('delete', ['delete']),
    ('train', ['archive', 'create', 'scp', 'install', 'preflight', 'start', 'state', 'delete'])])
def test_dry_run_prints_commands_and_runs_none(pod, command, expected):
  result = pod.call(command, '--dry_run', '--spot', '--bucket', 'gs://b', '--valid_until', '6h')
  assert result.returncode == 0, result.stderr
  assert not pod.calls() and not (pod.folder / 'calls.jsonl').exists()
  lines = [line for line in result.stdout.splitlines() if not line.startswith('#')]
  commands = [scripts.words(line) for line in lines]
  assert all(c[:2] == ['timeout', '--kill-after=10'] and c[3] in ('gcloud', 'git')
             for c in commands), result.stdout
  joined = iter(' '.join(c) for c in commands)
  assert all(any(word in line for line in joined) for word in expected), result.stdout
  if command == 'create':
    assert (
        'gcloud compute tpus queued-resources create r1 --node-id=r1 '
        '--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --zone=us-west4-a '
        '--project=p --quiet --async --spot --valid-until-duration=6h') in result.stdout


def test_a_dry_run_can_be_run(pod):
  """The lines as a shell runs them do what the launcher does."""
  pod.set('plan', '0 0')
  pod.set('state', 'ACTIVE')
  lines = ''.join(pod.call(c, '--dry_run').stdout for c in ('install', 'preflight', 'run'))
  subprocess.run(['bash', '-euo', 'pipefail', '-c', lines], check=True, cwd=pod.root,
                 capture_output=True, env={**os.environ, **pod.variables})
  deadline = time.monotonic() + 10
  while not pod.attempts(1) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert pod.attempts(1)[0]['argv'][3] == "--gin.X=b c's"


def test_the_lines_of_a_sweep_are_taken(pod):
  """What launch/sweep.py --emit=pod prints is a command of this launcher."""
  settings = {'TRAIN_DATA': "{'gs://b/examples': 1.0}"}
  sweep = sweep_file.read(str(scripts.ROOT / 'gin/sweeps/paper_sizes.toml'))
  planned = plan.resolve(sweep, 'gs://b/sweep', settings=settings)[0]
  line = planned.pod_command('paper', {'type': 'v5litepod-16', 'zone': 'z', 'project': 'p'})
  result = scripts.run('tpu_pod.sh', *line[1:2], '--dry_run', *line[2:], root=pod.root,
                       **pod.variables)
  assert result.returncode == 0, result.stderr
  start = next(words for words in map(scripts.words, result.stdout.splitlines())
               if 'retro_jax.train' in ' '.join(words))
  assert ' '.join(start).count('retro_jax.train') == 1 and '-m python' not in ' '.join(start)
  assert f"--gin.RUN_DIR={planned.folder}" in ' '.join(start)


@pytest.mark.parametrize('arguments, words', [
    ((), 'usage'), (('trian',), "unknown command 'trian'"), (('train', '--nmae', 'a'), '--nmae'),
    (('train', '--name'), '--name needs a value'),
    (('create', '--name', 'r'), '--zone is required'),
    (('create', *FLAGS, '--name', 'R_1'), 'lower-case'), (('train', *FLAGS), 'expected a module'),
    (('train', *FLAGS, '--', '--gin_file=a'), 'expected a module'),
    (('create', *FLAGS, '--wait', 'long'), 'whole number'),
    (('delete', *FLAGS, '--', 'retro_jax.train'), 'takes no training command'),
    (('run', *FLAGS, '--env', 'novalue', '--', 'retro_jax.train'), 'NAME=VALUE'),
    (('run', *FLAGS, '--env'), '--env needs a value'),
    (('create', *FLAGS, '--bucket', 'b'), 'gs://')])
def test_wrong_arguments_are_exit_code_2(pod, arguments, words):
  result = scripts.run('tpu_pod.sh', *arguments, root=pod.root, **pod.variables)
  assert result.returncode == 2 and words in result.stderr, result.stderr
  assert not pod.calls() and not result.stdout


def test_settings_may_come_from_variables(pod):
  result = scripts.run('tpu_pod.sh', 'create', '--dry_run', root=pod.root, **pod.variables,
                       RETRO_NAME='r2', RETRO_TYPE='v6e-8', RETRO_ZONE='z', RETRO_PROJECT='q')
  assert 'create r2 --node-id=r2 --accelerator-type=v6e-8' in result.stdout, result.stderr
  assert '--runtime-version=v2-alpha-tpuv6e --zone=z --project=q' in result.stdout
