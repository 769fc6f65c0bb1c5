r"""The same run on other processes, devices and meshes: the same batches, the same losses.

  python benchmarks/any_mesh.py --data=runs/quickstart/examples/train \
      --gin_file=gin/models/retro_smoke.gin \
      --gin.RetroConfig.chunk_length=32 --gin.RetroConfig.vocab_size=2048

Trains a few steps by launch/local_pod.sh on one process with one device, then on several
processes and meshes, and compares each step's batch hash (exactly) and loss (relative). Prints
a table; exit code 1 when a hash differs or a loss by more than --tolerance. Further settings
(--gin_file=..., --gin.X=...) go to the trainer; without any, retro_smoke as it is, for chunks of 8.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# (processes, devices of each, data, fsdp, tensor)
LAYOUTS = ((1, 1, 1, 1, 1), (2, 4, 1, 8, 1), (4, 2, 1, 8, 1), (1, 8, 1, 8, 1), (1, 8, 8, 1, 1),
           (2, 4, 1, 4, 2), (4, 2, 2, 2, 2))
SMALL = ('--gin_file=gin/models/retro_smoke.gin',)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', required=True, help='folder of training examples')
  parser.add_argument('--steps', type=int, default=20)
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--tolerance', type=float, default=1e-5)
  parser.add_argument('--folder', default='runs/any_mesh', help='for the runs')
  arguments, settings = parser.parse_known_args()
  same = compare(Path(arguments.folder), arguments.data, settings or SMALL, arguments.steps,
                 arguments.batch_size, arguments.tolerance)
  print('the same everywhere' if same else 'DIFFERENT')
  sys.exit(0 if same else 1)


def compare(folder: Path, data: str, settings: Sequence[str], steps: int, batch_size: int,
            tolerance: float, layouts: Sequence[tuple[int, ...]] = LAYOUTS) -> bool:
  """Runs every layout; whether all see the batches and losses of the first."""
  shutil.rmtree(folder, ignore_errors=True)
  print('processes x devices   data fsdp tensor   batches   largest relative difference of a loss')
  first, same = None, True
  for processes, devices, *mesh in layouts:
    name = 'x'.join(map(str, (processes, devices, *mesh)))
    rows = run(folder / name, data, settings, steps, batch_size, (processes, devices), mesh)
    first = first or rows
    equal = [row['batch_hash'] for row in rows] == [row['batch_hash'] for row in first]
    largest = max(abs(a['loss'] - b['loss']) / abs(b['loss']) for a, b in zip(rows, first))
    same &= equal and len(rows) == len(first) == steps and largest <= tolerance
    print(f'{processes:>9} x {devices:<9}   {mesh[0]:>4} {mesh[1]:>4} {mesh[2]:>6}   '
          f'{"same" if equal else "OTHER":>7}   {largest:.1e}', flush=True)
  return same


def run(folder: Path, data: str, settings: Sequence[str], steps: int, batch_size: int,
        pod: tuple[int, int], mesh: Sequence[int]) -> list[dict[str, float]]:
  """The metrics of every step of one run."""
  from retro_jax.training.metrics import read_metrics
  sizes = [f'--gin.{name}={size}' for name, size in zip(('DATA', 'FSDP', 'TENSOR'), mesh)]
  command = ['launch/local_pod.sh', *map(str, pod), 'retro_jax.train', *settings,
             '--gin_file=gin/runs/pretrain.gin', f'--gin.RUN_DIR={folder.absolute()}',
             f"--gin.TRAIN_DATA={{'{os.path.abspath(data)}': 1.0}}", f'--gin.TRAIN_STEPS={steps}',
             f'--gin.BATCH_SIZE={batch_size}', '--gin.TrainingConfig.log_every=1', *sizes]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False,
                        env={**os.environ, 'PYTHON': sys.executable})
  if done.returncode:
    raise RuntimeError(f'{" ".join(command)} ended with {done.returncode}:\n'
                       f'{done.stdout[-1000:]}{done.stderr[-3000:]}')
  return [row for row in read_metrics(folder) if 'loss' in row]


if __name__ == '__main__':
  main()
