"""The input pipeline alone: examples a second at the paper's shape, and what seeking costs.

  python benchmarks/input_pipeline.py [--examples=2048] [--steps=100]

Writes random records of n = 2,048 tokens with 2 neighbours of 128 tokens a chunk of 64, then
takes batches from data/batches.py as the trainer does: examples a second and a CPU second, and
the time to the first batch from step 10 and from step 1,000,000 (median ratio of the rounds).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import numpy as np

from retro_jax import storage
from retro_jax.data import batches, records, tasks

SHAPE = records.ExampleShape(sequence_length=2048, chunk_length=64, num_neighbors=2,
                             token_dtype='<u4')
PER_SHARD = 256


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--examples', type=int, default=2048, help='how many to write')
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--steps', type=int, default=100, help='batches to take')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--output', default='', help='JSON file for the numbers')
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    write(Path(folder) / 'examples', arguments.examples)
    tasks.register_task('input', f'{folder}/examples', SHAPE.num_neighbors)
    result = measure(arguments.batch_size, arguments.steps, arguments.rounds)
  print(json.dumps(result, indent=2))
  if arguments.output:
    storage.write_json(arguments.output, result)


def write(folder: Path, count: int) -> None:
  """Random records."""
  rng = np.random.default_rng(0)
  for shard, first in enumerate(range(0, count, PER_SHARD)):
    where = records.shard_folder(folder, shard)
    where.mkdir(parents=True)
    writer = records.RecordWriter(where, SHAPE)
    for _ in range(first, min(first + PER_SHARD, count)):
      writer.write(*({name: rng.integers(0, 100_000, spec.shape).astype(spec.dtype)
                      for name, spec in layout.specs.items()}
                     for layout in SHAPE.layouts().values()))
    writer.close()
  storage.write_manifest(folder, {
      'kind': records.KIND, 'format_version': records.FORMAT_VERSION, 'num_examples': count,
      'examples_per_shard': PER_SHARD, 'content': 'random',
      'vocabulary': {'size': 128_000, 'fingerprint': 'random'},
      'sequence_length': SHAPE.sequence_length, 'chunk_length': SHAPE.chunk_length,
      'num_neighbors': SHAPE.num_neighbors, 'token_dtype': SHAPE.token_dtype})


def measure(batch_size: int, steps: int, rounds: int) -> dict[str, float]:
  """Rates of one long pass, seeking times of several short ones."""
  take(0, batch_size, 3)
  seconds, cpu_seconds = take(0, batch_size, steps)
  seeks: dict[int, list[float]] = {10: [], 1_000_000: []}
  for _ in range(rounds):
    for step, times in seeks.items():
      times.append(take(step, batch_size, 1)[0])
  near, far = seeks.values()
  return {
      'batch_size': batch_size, 'examples': steps * batch_size, 'cores': os.cpu_count(),
      'examples_per_second': steps * batch_size / seconds,
      'examples_per_cpu_second': steps * batch_size / cpu_seconds,
      'first batch from step 10, s': statistics.median(near),
      'first batch from step 1,000,000, s': statistics.median(far),
      'ratio of seeking': statistics.median(b / a for a, b in zip(near, far))}


def take(first: int, batch_size: int, steps: int) -> tuple[float, float]:
  """Seconds and CPU seconds to take so many batches from a step on."""
  begin, cpu = time.monotonic(), time.process_time()
  taken = 0
  for batch in batches.batches('input', batch_size, start_step=first, num_steps=steps):
    taken += len(batch['tokens'])
  assert taken == steps * batch_size
  return time.monotonic() - begin, time.process_time() - cpu


if __name__ == '__main__':
  main()
