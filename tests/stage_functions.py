"""Stages for the tests of runners; a module of its own, so that other processes can import it."""

import functools
import os
import signal
import time

import numpy as np

from retro_jax import storage
from retro_jax.errors import UserError
from retro_jax.retrieval import stages


def squares(count, folder, manifest):
  """A stage: the first squares."""
  np.save(folder / 'squares.npy', np.arange(count)**2)
  manifest['largest'] = (count - 1)**2


def refuse(folder, manifest):
  (folder / 'half').write_text('half')
  raise UserError(f'records.jsonl:7: no text; correct the line ({bool(manifest)})')


def die(folder, manifest):
  del folder, manifest
  os.kill(os.getpid(), signal.SIGKILL)


def squares_tasks(folder, count=5):
  return [stages.Task(str(folder / f'task-{i}'), 'squares', {'count': 3 + i},
                      functools.partial(squares, 3 + i), weight=i + 1) for i in range(count)]


def hold(folder, ready):
  with storage.locked(folder):
    ready.set()
    time.sleep(60)


def killed_while_writing(path):
  with storage.atomic_file(path) as file:
    file.write('half')
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(pid_file, folder, manifest):
  del folder, manifest
  storage.write_json(pid_file, os.getpid())
  time.sleep(120)
