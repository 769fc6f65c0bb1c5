"""Joining a job of several processes, and what its processes have to agree on.

Launchers say by environment variables which process of how many this is; on TPU pods JAX
finds that out. What the processes compute together is in step.py.
"""

import dataclasses
import os
import signal
import sys
import threading
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from retro_jax.errors import ProcessMissing, UserError


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  """Which process of how many this is.

  Attributes:
    coordinator: 'host:port' of process 0; '' takes RETRO_COORDINATOR from the environment.
    num_processes: of the job; 0 takes RETRO_NUM_PROCESSES, which may be 'auto' (JAX finds out,
      on TPU pods) and without which this process is alone.
    process_id: from 0; -1 takes RETRO_PROCESS_ID.
    timeout_seconds: to wait for the others at the start; 0 takes RETRO_START_TIMEOUT, or 300.
  """
  coordinator: str = ''
  num_processes: int = 0
  process_id: int = -1
  timeout_seconds: int = 0


def join(config: DistributedConfig = DistributedConfig()) -> None:
  """Waits for the other processes of the job; does nothing for a process alone.

  Raises:
    UserError: settings that do not fit together.
    ProcessMissing: JAX could not join; when it only waits too long for the others, the process
      ends with the same message and exit code.
  """
  count = config.num_processes or os.environ.get('RETRO_NUM_PROCESSES', 0)
  if not count or jax.distributed.is_initialized():
    return
  coordinator = config.coordinator or os.environ.get('RETRO_COORDINATOR')
  timeout = config.timeout_seconds or _number('RETRO_START_TIMEOUT', 300)
  if count == 'auto':
    count = process = None
  else:
    count = _number('RETRO_NUM_PROCESSES', 0) if isinstance(count, str) else count
    process = (config.process_id if config.process_id >= 0
               else _number('RETRO_PROCESS_ID', -1))
    if not coordinator:
      raise UserError('a job of several processes needs the address of process 0; set '
                      'DistributedConfig.coordinator or RETRO_COORDINATOR to host:port')
    if not 0 <= process < count:
      raise UserError(f'process {process} of {count}; set DistributedConfig.process_id or '
                      f'RETRO_PROCESS_ID to 0..{count - 1}')
  who = 'this process' if process is None else f'process {process} of {count}'
  missing = ProcessMissing(
      f'{who}: not all processes met at {coordinator or "the coordinator JAX found"} within '
      f'{timeout} s; see which host has not started, and whether it can reach that address')
  # JAX aborts the process when its own time is up; ours is up before, with a message.
  watchdog = threading.Timer(timeout, _give_up, [missing])
  watchdog.daemon = True
  watchdog.start()
  try:
    jax.distributed.initialize(coordinator, count, process, initialization_timeout=2 * timeout + 60)
  except (RuntimeError, ValueError) as error:
    raise ProcessMissing(f'{missing} ({str(error).strip().splitlines()[0][:200]})') from None
  finally:
    watchdog.cancel()


def _give_up(missing: ProcessMissing) -> None:
  """Ends the process from the thread that watches; the main one is inside of JAX."""
  print(f'stopped: {missing}', file=sys.stderr, flush=True)
  os._exit(missing.exit_code)


def _number(variable: str, default: int) -> int:
  value = os.environ.get(variable)
  if value is None:
    return default
  try:
    return int(value)
  except ValueError:
    raise UserError(f'{variable} = {value!r} in the environment, expected a number') from None


def agreed(value: float) -> float:
  """The value of process 0, on every process; all have to call it at the same step."""
  if jax.process_count() == 1:
    return value
  return float(multihost_utils.broadcast_one_to_all(np.float64(value)))


class Preemption:
  """SIGTERM, noted instead of ending the process, so that it can save first.

  In a job of several processes the notice to any of them reaches all, and all are told to
  stop after the same step (JAX's preemption service).
  """

  def __init__(self):
    self._noticed = False
    self._before = None
    in_main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    if in_main and not jax.distributed.is_initialized():
      self._before = signal.signal(signal.SIGTERM, self._note)

  def _note(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self._noticed = True

  def after(self, step: int) -> bool:
    """Whether to save and stop after this step; every process gets the same answer."""
    return self._noticed or multihost_utils.reached_preemption_sync_point(step)

  def close(self) -> None:
    """Lets SIGTERM end the process again."""
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)
