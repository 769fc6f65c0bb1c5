"""Real processes of one job: the batches and losses of one process, SIGTERM, and going on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import any_mesh
from retro_jax.errors import Preempted
from retro_jax.training.metrics import read_metrics
from tests import worlds

ROOT = Path(__file__).resolve().parents[2]
# Two layers: what takes the time is compiling.
SMALL = (*any_mesh.SMALL, '--gin.RetroConfig.num_layers=2', '--gin.RetroConfig.cca_layers=(2,)')
STEPS = 400
ENVIRONMENT = {**os.environ, 'XLA_FLAGS': '--xla_backend_optimization_level=0',
               'PYTHON': sys.executable}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp('pods')
  worlds.examples(path, worlds.documents(0, 20, longest=60))
  return path / 'examples'


def test_two_processes_see_and_learn_what_one_does(data, tmp_path, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
  assert any_mesh.compare(
      tmp_path / 'runs', str(data), SMALL, steps=4, batch_size=4, tolerance=1e-5,
      layouts=((1, 1, 1, 1, 1), (2, 2, 1, 2, 2)))


def test_sigterm_saves_and_the_same_command_goes_on_elsewhere(data, tmp_path):
  """Two processes are told to stop through one; what was saved goes on with one process."""
  command = ['retro_jax.train', *SMALL, '--gin_file=gin/runs/pretrain.gin',
             f'--gin.RUN_DIR={tmp_path}/run', f"--gin.TRAIN_DATA={{'{data}': 1.0}}",
             f'--gin.TRAIN_STEPS={STEPS}', '--gin.BATCH_SIZE=2', '--gin.TrainingConfig.log_every=1']
  with open(tmp_path / 'log', 'w') as log:
    pod = subprocess.Popen(['launch/local_pod.sh', '2', '1', *command], cwd=ROOT, stdout=log,
                           stderr=log, start_new_session=True,
                           env=ENVIRONMENT)
    deadline = time.monotonic() + 300
    while not read_metrics(tmp_path / 'run') and pod.poll() is None:
      assert time.monotonic() < deadline
      time.sleep(0.2)
    assert pod.poll() is None, (tmp_path / 'log').read_text()
    begin = time.monotonic()
    os.kill(pod.pid, signal.SIGTERM)
    assert pod.wait(120) == Preempted.exit_code, (tmp_path / 'log').read_text()
    assert time.monotonic() - begin < 60
  text = (tmp_path / 'log').read_text()
  (saved,) = [int(p.name) for p in (tmp_path / 'run/checkpoints').iterdir()]
  assert f'SIGTERM; saved step {saved:,} of {STEPS:,}' in text and saved < STEPS
  found = subprocess.run(['launch/local_pod.sh', '1', '2', *command], cwd=ROOT,
                         capture_output=True, text=True, check=False, env=ENVIRONMENT)
  assert found.returncode == 0, found.stderr
  assert f'continuing from the checkpoint of step {saved:,}' in found.stdout
  rows = read_metrics(tmp_path / 'run')
  assert [row['step'] for row in rows] == list(range(1, STEPS + 1))
  assert rows[-1]['starts'] == 2 and 0 < rows[-1]['goodput'] < 1
