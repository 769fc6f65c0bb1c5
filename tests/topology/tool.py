"""tools/compile_for_topology.py as tests of it call it; no tests here."""

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
