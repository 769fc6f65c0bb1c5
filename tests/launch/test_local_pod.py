"""launch/local_pod.sh with real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launch import scripts


def start(*arguments, **variables):
  return subprocess.Popen(
      ['launch/local_pod.sh', *arguments], cwd=scripts.ROOT, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, preexec_fn=scripts.hear_interrupts,
      env={**os.environ, 'PYTHONPATH': str(scripts.ROOT), 'XLA_FLAGS': '',
           'PYTHON': sys.executable, **variables})


def test_two_processes_of_two_devices_are_one_machine():
  process = start('2', '2', 'tests.launch.local_worker', 'psum')
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, out + err
  assert {'[0] 0 of 2: 2 devices here, sum 4', '[1] 1 of 2: 2 devices here, sum 4'} <= set(
      out.splitlines()), out


def test_one_that_fails_ends_the_others_with_its_exit_code():
  begin = time.monotonic()
  process = start('3', '1', 'tests.launch.local_worker', 'fail', '70')
  _, err = process.communicate(timeout=120)
  assert process.returncode == 70 and 'process 1 ended with exit code 70' in err, err
  assert len(err.splitlines()) == 1 and time.monotonic() - begin < 20, err


def test_one_that_will_not_end_is_killed(tmp_path):
  process = start('2', '1', 'tests.launch.local_worker', 'stubborn', str(tmp_path),
                  RETRO_GRACE_SECONDS='1')
  _, err = process.communicate(timeout=120)
  assert process.returncode == 2
  assert [line.split(':')[0] for line in err.splitlines()] == ['local_pod'], err
  with pytest.raises(ProcessLookupError):
    os.kill(int((tmp_path / '0').read_text()), 0)


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_signals_reach_all(tmp_path, name):
  process = start('3', '1', 'tests.launch.local_worker', 'wait', str(tmp_path))
  while len(list(tmp_path.iterdir())) < 3:
    assert process.poll() is None
    time.sleep(0.05)
  process.send_signal(signal.Signals[name])
  out, err = process.communicate(timeout=120)
  assert process.returncode == 75, err
  assert [f'[{i}] stopped by {name}' for i in range(3)] == sorted(out.splitlines()), out


def test_dry_run_prints_each_process_with_its_variables():
  result = scripts.run('local_pod.sh', '--dry_run', '2', '4', 'retro_jax.train', '--gin.A=b c',
                       RETRO_START_TIMEOUT='7', PYTHON=sys.executable)
  lines = result.stdout.splitlines()
  assert result.returncode == 0 and len(lines) == 3 and lines[-1] == 'wait', result.stderr
  for i, line in enumerate(lines[:2]):
    words = scripts.words(line)
    assert words[0] == 'env' and words[-1] == '&'
    assert words[-5:-1] == ['-u', '-m', 'retro_jax.train', '--gin.A=b c']
    assert f'RETRO_PROCESS_ID={i}' in words and 'RETRO_START_TIMEOUT=7' in words
    assert 'RETRO_NUM_PROCESSES=2' in words and 'JAX_PLATFORMS=cpu' in words
    assert any(w.startswith('XLA_FLAGS=') and
               w.endswith('--xla_force_host_platform_device_count=4') for w in words)


def test_the_real_trainer_refuses_bad_settings_with_exit_code_2():
  process = start('2', '1', 'retro_jax.train', '--gin_fil=x')
  out, err = process.communicate(timeout=120)
  assert process.returncode == 2 and "did you mean '--gin_file'" in out, out + err


@pytest.mark.parametrize('arguments', [
    (), ('2',), ('2', '4'), ('0', '4', 'retro_jax.train'), ('2', 'x', 'retro_jax.train'),
    ('2', '4', '--gin_file=a'), ('--what', '2', '4', 'retro_jax.train')])
def test_wrong_arguments_are_exit_code_2(arguments):
  result = scripts.run('local_pod.sh', *arguments, PYTHON=sys.executable)
  assert result.returncode == 2 and result.stderr and not result.stdout
