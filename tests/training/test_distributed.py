"""Joining a job: what the environment may say, who is missing, and SIGTERM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retro_jax.errors import UserError
from retro_jax.training import distributed
from retro_jax.training.distributed import DistributedConfig

ROOT = Path(__file__).resolve().parents[2]


def test_alone_nothing_is_joined(monkeypatch):
  monkeypatch.delenv('RETRO_NUM_PROCESSES', raising=False)
  distributed.join()
  assert distributed.agreed(2.5) == 2.5


@pytest.mark.parametrize('config, environment, message', [
    (DistributedConfig(num_processes=2), {}, 'address of process 0'),
    (DistributedConfig(), {'RETRO_NUM_PROCESSES': 'two', 'RETRO_COORDINATOR': 'x:1'},
     "RETRO_NUM_PROCESSES = 'two'"),
    (DistributedConfig('x:1', 2), {}, 'process -1 of 2'),
    (DistributedConfig('x:1', 2, 2), {}, 'process 2 of 2; .* to 0..1')])
def test_settings_that_do_not_fit_are_refused(monkeypatch, config, environment, message):
  for name in ('RETRO_NUM_PROCESSES', 'RETRO_COORDINATOR', 'RETRO_PROCESS_ID'):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=message) as error:
    distributed.join(config)
  assert '\n' not in str(error.value)


def test_a_missing_process_is_a_message_and_not_a_hang():
  """Process 0 of 2, whose other never comes; through an entry point, for the exit code."""
  script = '''
from retro_jax import configuration
from retro_jax.training import distributed
configuration.main(distributed.DistributedConfig, distributed.join)
'''
  begin = time.monotonic()
  found = subprocess.run(
      [sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=False,
      timeout=120, env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'RETRO_NUM_PROCESSES': '2',
                        'RETRO_PROCESS_ID': '1', 'RETRO_COORDINATOR': 'localhost:1',
                        'RETRO_START_TIMEOUT': '3'})
  assert found.returncode == 69, found.stderr
  (line,) = [x for x in found.stderr.splitlines() if x.startswith('stopped: ')]
  assert 'process 1 of 2: not all processes met at localhost:1' in line
  assert time.monotonic() - begin < 100


def test_sigterm_is_noted_once_and_handed_back():
  before = signal.getsignal(signal.SIGTERM)
  preemption = distributed.Preemption()
  try:
    assert not preemption.after(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.after(2)
  finally:
    preemption.close()
  assert signal.getsignal(signal.SIGTERM) == before
