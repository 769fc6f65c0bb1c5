"""How tests call the launchers; no tests here."""

import os
import shlex
import subprocess
from pathlib import Path

import retro_jax

ROOT = Path(retro_jax.__file__).parents[1]


def run(script, *arguments, root=ROOT, timeout=60, **variables):
  """The finished process of `launch/SCRIPT`."""
  return subprocess.run(
      [f'launch/{script}', *map(str, arguments)], cwd=root, text=True, capture_output=True,
      check=False, timeout=timeout, stdin=subprocess.DEVNULL,
      env={**os.environ, 'XLA_FLAGS': '', **variables})


def words(line):
  """The words a shell would read in `line`; fails on a line that is no command."""
  assert subprocess.run(['bash', '-n', '-c', line], check=False).returncode == 0, line
  return shlex.split(line)
