"""How tests call the launchers; no tests here."""

import os
import shlex
import signal
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


def hear_interrupts():
  """In a child before it starts: a test run in the background has SIGINT ignored, and so its
  children, whose shells then cannot trap it."""
  signal.signal(signal.SIGINT, signal.SIG_DFL)


def words(line):
  """The words a shell would read in `line`; fails on a line that is no command."""
  assert subprocess.run(['bash', '-n', '-c', line], check=False).returncode == 0, line
  return shlex.split(line)
