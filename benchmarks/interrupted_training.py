r"""A run killed again and again ends with bit for bit the weights of one left alone.

  python benchmarks/interrupted_training.py --data=runs/quickstart/examples/train --kills=20 \
      --gin_file=gin/models/retro_smoke.gin \
      --gin.RetroConfig.chunk_length=32 --gin.RetroConfig.vocab_size=2048

Trains a small RETRO undisturbed; then once more with SIGKILL at random moments, every other
one as soon as a checkpoint is being written, started again each time. Then SIGTERM: how long
the run takes to save and which code it leaves with; and a run that is stopped half-way and
goes on with another number of processes: the batches it sees. Exit code 1 when anything
differs. Further settings go to the trainer; without any, retro_smoke as it is, for chunks of 8.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retro_jax.errors import Preempted
from retro_jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
SMALL = ('--gin_file=gin/models/retro_smoke.gin',)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', required=True, help='folder of training examples')
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--checkpoint_every', type=int, default=10)
  parser.add_argument('--seed', type=int, default=0, help='of the moments')
  parser.add_argument('--folder', default='runs/interrupted_training', help='for the runs')
  arguments, settings = parser.parse_known_args()
  folder = Path(arguments.folder).absolute()
  shutil.rmtree(folder, ignore_errors=True)
  runs = Runs(folder, [
      *(settings or SMALL), '--gin_file=gin/runs/pretrain.gin',
      f"--gin.TRAIN_DATA={{'{os.path.abspath(arguments.data)}': 1.0}}",
      f'--gin.TRAIN_STEPS={arguments.steps}', '--gin.BATCH_SIZE=8',
      f'--gin.CHECKPOINT_EVERY={arguments.checkpoint_every}',
      '--gin.TrainingConfig.log_every=1'])
  same = runs.killed(arguments.kills, random.Random(arguments.seed))
  same &= runs.terminated()
  same &= runs.moved()
  print('all as it should be' if same else 'DIFFERENT')
  sys.exit(0 if same else 1)


class Runs:
  """Runs of one configuration, each in a folder of its own."""

  def __init__(self, folder: Path, settings: Sequence[str]):
    self._folder, self._settings = folder, list(settings)
    folder.mkdir(parents=True)
    begin = time.monotonic()
    process = self._start('undisturbed')
    self._wait_for_step('undisturbed', 1, process)
    self._starting = time.monotonic() - begin
    if code := process.wait():
      raise RuntimeError(f'undisturbed: the run ended with {code}; see {folder}/log.txt')
    self._training = time.monotonic() - begin - self._starting

  def killed(self, kills: int, rng: random.Random) -> bool:
    """SIGKILL; whether the weights are the undisturbed run's."""
    print(f'undisturbed: {self._starting:.0f} s to the first step, then {self._training:.0f} s')
    while_saving, done = 0, 0
    while done < kills:
      process = self._start('killed')
      if done % 2:
        try:
          process.wait(rng.uniform(0, self._starting + self._training / 4))
        except subprocess.TimeoutExpired:
          pass
      else:
        # Half of the kills fall into the writing of a checkpoint, some saves after the start.
        for _ in range(rng.randrange(1, 4)):
          while process.poll() is None and not self._being_saved('killed'):
            time.sleep(0.002)
          time.sleep(rng.uniform(0, 0.05))
      if process.poll() is not None:
        if process.returncode:
          raise RuntimeError(f'the run ended by itself with {process.returncode}; see log.txt')
        print('  came to its end; begun anew')
        shutil.rmtree(self._folder / 'killed')
        continue
      saving = self._being_saved('killed')
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
      done += 1
      while_saving += bool(saving)
      at = [row['step'] for row in read_metrics(self._folder / 'killed')]
      print(f'  kill {done}: step {max(at, default=0):.0f}{", while saving" if saving else ""}',
            flush=True)
    self._finish('killed')
    same = self._same_weights('killed')
    print(f'killed {kills} times, {while_saving} of them while saving: '
          f'{"the same weights, bit for bit" if same else "OTHER weights"}')
    return same

  def terminated(self) -> bool:
    """SIGTERM; whether the run saves, leaves with the code for it, and ends the same."""
    process = self._start('terminated')
    self._wait_for_step('terminated', 3, process)
    begin = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    code = process.wait()
    took = time.monotonic() - begin
    saved = sorted(int(p.name) for p in (self._folder / 'terminated/checkpoints').iterdir())
    self._finish('terminated')
    same = self._same_weights('terminated')
    print(f'SIGTERM: saved step {saved[-1]} and left with code {code} in {took:.1f} s; resumed: '
          f'{"the same weights" if same else "OTHER weights"}')
    return code == Preempted.exit_code and took <= 30 and same

  def moved(self) -> bool:
    """Stopped on one process with 8 devices, resumed on two with 4: whether batches are equal."""
    process = self._start('moved', (1, 8))
    self._wait_for_step('moved', 3, process)
    os.kill(process.pid, signal.SIGTERM)
    process.wait()
    at = max(row['step'] for row in read_metrics(self._folder / 'moved'))
    self._finish('moved', (2, 4))
    rows = {name: {row['step']: row for row in read_metrics(self._folder / name)}
            for name in ('undisturbed', 'moved')}
    hashes = {name: [row['batch_hash'] for _, row in sorted(found.items())]
              for name, found in rows.items()}
    same = hashes['moved'] == hashes['undisturbed']
    losses = max(abs(rows['moved'][s]['loss'] / row['loss'] - 1)
                 for s, row in rows['undisturbed'].items())
    print(f'stopped at step {at:.0f} on 1 x 8, resumed on 2 x 4: '
          f'{"the same batches" if same else "OTHER batches"}, losses within {losses:.1e}')
    return same

  def _start(self, name: str, pod: tuple[int, int] | None = None) -> subprocess.Popen:
    run = [f'--gin.RUN_DIR={self._folder / name}', *self._settings]
    command = ['launch/local_cpu.sh', '--devices', '1', 'retro_jax.train', *run]
    if pod:
      command = ['launch/local_pod.sh', *map(str, pod), 'retro_jax.train', *run]
    environment = {**os.environ, 'PYTHON': sys.executable,
                   'JAX_COMPILATION_CACHE_DIR': str(self._folder / 'compiled')}
    with open(self._folder / 'log.txt', 'ab') as log:
      return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment,
                              start_new_session=True)

  def _finish(self, name: str, pod: tuple[int, int] | None = None) -> None:
    if code := self._start(name, pod).wait():
      raise RuntimeError(f'{name}: the run ended with {code}; see {self._folder}/log.txt')

  def _being_saved(self, name: str) -> list[Path]:
    folder = self._folder / name / 'checkpoints'
    try:
      return [p for p in folder.iterdir() if not p.name.isdigit()]
    except FileNotFoundError:
      return []

  def _wait_for_step(self, name: str, step: int, process: subprocess.Popen) -> None:
    while process.poll() is None:
      if any(row['step'] >= step for row in read_metrics(self._folder / name)):
        return
      time.sleep(0.05)
    raise RuntimeError(f'{name}: the run ended with {process.returncode} before step {step}')

  def _same_weights(self, name: str) -> bool:
    from retro_jax.training.checkpoints import load_model
    _, expected, _ = load_model(self._folder / 'undisturbed')
    _, found, _ = load_model(self._folder / name)
    return set(expected) == set(found) and all(
        np.array_equal(expected[key], found[key]) for key in expected)


if __name__ == '__main__':
  main()
