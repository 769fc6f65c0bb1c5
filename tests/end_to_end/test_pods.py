"""Real processes of one job: batches, losses and scores of one process, SIGTERM, and going on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.numpy

from benchmarks import any_mesh
from retro_jax.data.records import Examples
from retro_jax.errors import Preempted
from retro_jax.training import checkpoints
from retro_jax.training.metrics import read_metrics
from tests import tiny_models, worlds

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


def test_two_processes_score_as_one_does(data, tmp_path):
  """From different meshes; what was scored before is taken from the disk."""
  examples = Examples(data)
  model = tiny_models.tiny(vocab_size=384, chunk_length=examples.shape.chunk_length)
  checkpoints.write_model_description(tmp_path / 'model', model, examples.manifest['vocabulary'])
  safetensors.numpy.save_file(tiny_models.parameters(model),
                              tmp_path / 'model' / checkpoints.SAFETENSORS)
  found = []
  for folder, layout in (('one', ('1', '1')), ('two', ('2', '2')), ('one', ('2', '1'))):
    done = subprocess.run(
        ['launch/local_pod.sh', *layout, 'retro_jax.evaluate', '--gin_file=gin/runs/evaluate.gin',
         f'--gin.RETRO={tmp_path}/model', f'--gin.EXAMPLES={data}', '--gin.MeshConfig.data=1',
         f'--gin.OUTPUT={tmp_path}/{folder}', '--gin.BATCH_SIZE=4'],
        cwd=ROOT, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('evaluate: wrote') == 1
    results = json.loads((tmp_path / folder / 'results.json').read_text())
    found.append((results['bits_per_byte'], done.stdout))
  (one, _), (two, _), (again, printed) = found
  assert one.keys() == {'retro_on', 'retro_off'} and one['retro_on'] != one['retro_off']
  assert two == pytest.approx(one, rel=1e-6) and again == one
  assert 'in 0 s' in printed  # nothing was computed


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
