"""Compiling a deep model against a shallow one of the same pattern: scanned layers cost once.

  python benchmarks/compile_time.py [--topology=v5e:2x2]

Compiles the training step of 30 and of 9 layers with RETRO layers 6, 9, 12, ... at the width of
the smallest paper model; for this CPU, or with --topology for a TPU slice that is not there.
Prints CPU seconds of XLA and their ratio.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import dataclasses, sys, time
from retro_jax.models.config import RetroConfig
from retro_jax.topology import chips, compile as compiling
from retro_jax.training import partitioning
layers, topology = int(sys.argv[1]), sys.argv[2]
model = RetroConfig(num_layers=layers, cca_layers=tuple(range(6, layers + 1, 3)), vocab_size=8192,
                    dtype='bfloat16' if topology else 'float32', remat='full')
config = compiling.StepConfig(model, batch_size=8, sequence_length=512)
devices = chips.devices(chips.parse(topology)) if topology else None
lowered = compiling.lower(config, partitioning.make_mesh(config.mesh, devices))
begin = time.process_time()
lowered.compile()
print(time.process_time() - begin)
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--topology', default='', help="'' for this CPU")
  parser.add_argument('--rounds', type=int, default=3)
  arguments = parser.parse_args()
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1',
                 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  ratios = []
  for _ in range(arguments.rounds):
    seconds = [float(subprocess.run(
        [sys.executable, '-c', CODE, str(layers), arguments.topology], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, check=True, env=environment).stdout.split()[-1])
               for layers in (9, 30)]
    ratios.append(seconds[1] / seconds[0])
    print(f'9 layers {seconds[0]:.1f} CPU s, 30 layers {seconds[1]:.1f} CPU s: {ratios[-1]:.2f}',
          flush=True)
  print(f'ratio {sorted(ratios)[len(ratios) // 2]:.2f} (at most 1.5 wanted)')


if __name__ == '__main__':
  main()
