"""tools/compile_for_topology.py and programs for TPUs as tests call them; no tests here."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import retro_jax

ROOT = Path(retro_jax.__file__).parents[1]


def call(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
  """The tool with these arguments."""
  return subprocess.run(
      [sys.executable, 'tools/compile_for_topology.py', *map(str, arguments)], cwd=ROOT, text=True,
      capture_output=True, check=False,
      env={**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': '', **environment})


def model_file(path: Path, settings: Mapping[str, Any]) -> Path:
  """A gin file of a model's settings."""
  path.write_text(''.join(f'RetroConfig.{name} = {value!r}\n' for name, value in settings.items()))
  return path


_BEFORE = """
import os
os.environ.update(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from retro_jax.topology import chips, program, replay

def on_a_chip(topology):
  return NamedSharding(Mesh(np.array(chips.devices(topology)[:1]), ('x',)), PartitionSpec())

def mxu_flops(compiled, topology):
  run = replay.Replay(program.parse(compiled.as_text()), topology, [(0, 0, 0)])
  assert not run.unknown_kernels and not run.unmodelled, (run.unknown_kernels, run.unmodelled)
  return run.mxu_flops
"""


def printed(code: str) -> list[str]:
  """The words that `code`, which knows the two functions above, prints in a process of its own."""
  result = subprocess.run(
      [sys.executable, '-c', _BEFORE + code], cwd=ROOT, text=True, capture_output=True,
      check=False, env={**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''})
  assert result.returncode == 0, result.stderr[-3000:]
  return result.stdout.split()
