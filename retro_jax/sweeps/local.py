"""Runs a sweep on this machine, one run after another, each as a process of its own.

The trainer continues by itself from its checkpoints; here lies who starts when, what is
skipped, and who is told to stop. A finished run is told by plan.py.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from retro_jax.progress import duration
from retro_jax.sweeps.plan import Planned

LOG = 'log.txt'
_RUNNING = '.running'
_ROOT = Path(__file__).resolve().parents[2]
_POLL = 0.5


@dataclasses.dataclass(frozen=True)
class Failure:
  """Attributes: the run's `name`, its `log`, and the `reason` in a line."""
  name: str
  log: str
  reason: str


class Stopped(Exception):
  """A signal ended the sweep. Attributes: `number` of the signal."""

  def __init__(self, number: int):
    super().__init__(signal.Signals(number).name)
    self.number = number


def run_all(planned: Sequence[Planned], devices: int, every: float = 5.0) -> list[Failure]:
  """Runs what is not finished.

  Args:
    planned: in the order to run.
    devices: fake CPU devices of each run.
    every: seconds between lines of progress.

  Returns:
    The runs that failed; the others are finished.

  Raises:
    UserError: a folder that holds another run; nothing was started then.
    Stopped: by SIGTERM, SIGINT or SIGHUP, which went on to the running child.
  """
  for run in planned:
    run.check_folder()
  failures = []
  progress = _Progress(planned, every)
  with _Signals() as signals:
    for number, run in enumerate(planned, start=1):
      signals.check()
      label = f'{number}/{len(planned)} {run.name}'
      if run.is_finished():
        note(f'{label}: finished, skipped')
        progress.skip(run)
        continue
      Path(run.folder).mkdir(parents=True, exist_ok=True)
      with _guard(run, signals) as guard:
        if run.is_finished():  # by the process that was waited for
          note(f'{label}: finished, skipped')
          progress.skip(run)
          continue
        run.write_description()
        failure = _run(run, label, devices, guard, signals, progress)
      if failure:
        failures.append(failure)
        note(f'{label}: failed, {failure.reason}; log in {failure.log}')
      progress.end(run)
  return failures


def note(message: str) -> None:
  print(f'sweep: {message}', flush=True)


def _run(run: Planned, label: str, devices: int, guard: Any, signals: '_Signals',
         progress: '_Progress') -> Failure | None:
  log = Path(run.folder) / LOG
  command = run.local_command(devices)
  saved = run.saved_step()
  note(f'{label}: continues from step {saved:,}' if saved else f'{label}: starts')
  with open(log, 'a', encoding='utf-8') as f:
    f.write(f'--- {time.strftime("%Y-%m-%d %H:%M:%S")} {shlex.join(command)}\n')
    f.flush()
    # A group of its own: Ctrl-C reaches it once, from here, and not from the terminal as well.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                             env=_environment(), process_group=0, pass_fds=[guard.fileno()])
    guard.truncate(0)
    guard.write(str(child.pid))
    guard.flush()
    signals.child = child
    progress.start(run)
    while True:
      signals.pass_on()
      signals.tell()
      with contextlib.suppress(subprocess.TimeoutExpired):
        code = child.wait(timeout=_POLL)
        break
      progress.show(run, label)
    signals.child = None
  signals.check()
  if code:
    ended = f'ended by {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'
    said = _last_error(log)
    return Failure(run.name, str(log), f'{ended}{": " + said if said else ""}')
  if not run.is_finished():
    return Failure(run.name, str(log), f'ended before step {run.steps:,} was saved')
  note(f'{label}: finished')
  return None


def _environment() -> dict[str, str]:
  """Of the child, which runs this interpreter and this checkout."""
  return {
      **os.environ, 'PYTHON': sys.executable,
      'PYTHONPATH': os.pathsep.join(filter(None, [str(_ROOT), os.environ.get('PYTHONPATH')]))}


def _last_error(log: Path) -> str:
  """The line that says what went wrong, if one does."""
  lines = [line.strip() for line in log.read_text(encoding='utf-8', errors='replace').splitlines()]
  for line in reversed(lines):
    if line.startswith('---'):
      return ''
    if line:
      return line[:300]
  return ''


@contextlib.contextmanager
def _guard(run: Planned, signals: '_Signals') -> Iterator[Any]:
  """Holds the run's lock, which its process inherits; waits for one that outlived its sweep."""
  import fcntl  # not on every system
  told = False
  with open(Path(run.folder) / _RUNNING, 'a+', encoding='utf-8') as lock:
    while True:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        signals.check()
        if not told:
          lock.seek(0)
          note(f'{run.name}: process {lock.read() or "?"} of a sweep that was killed still trains '
               'it; waiting for it to end')
          told = True
        time.sleep(_POLL)
    yield lock


class _Signals:
  """Notes a signal that asks to stop, and passes it on to the running child as SIGTERM."""

  _NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

  def __init__(self) -> None:
    self.child: subprocess.Popen | None = None
    self._number: int | None = None
    self._passed_on: subprocess.Popen | None = None
    self._told = False
    self._before: dict[int, Any] = {}

  def __enter__(self) -> '_Signals':
    self._before = {number: signal.signal(number, self._handle) for number in self._NUMBERS}
    return self

  def __exit__(self, *unused: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    self._number = number
    self.pass_on()  # nothing is printed here: the signal may have come in the middle of a print

  def pass_on(self) -> None:
    """Tells the child once; also called after it was started, as a signal may come before."""
    child = self.child
    if self._number is not None and child is not None and self._passed_on is not child:
      self._passed_on = child
      child.send_signal(signal.SIGTERM)

  def tell(self) -> None:
    """Says so, once."""
    if self._passed_on is not None and not self._told:
      self._told = True
      note(f'{signal.Signals(self._number).name}: passed on to process {self._passed_on.pid}, '
           'waiting for it to end')

  def check(self) -> None:
    if self._number is not None:
      raise Stopped(self._number)


class _Progress:
  """How far, how fast, how long still.

  A run takes a while to start (imports, compilation), which is about the same for all, and then
  as long as its work; both are learnt from what has run so far.
  """

  def __init__(self, planned: Sequence[Planned], every: float):
    self._every = every
    self._waiting = {run.name: self._left(run) for run in planned}
    self._stale: int | None = None
    self._starts: list[float] = []  # seconds before the first step
    self._work = self._seconds = 0.0  # done between steps that were seen, in this call

  def skip(self, run: Planned) -> None:
    self._waiting.pop(run.name, None)

  def start(self, run: Planned) -> None:
    self._waiting.pop(run.name, None)
    self._first = run.saved_step()
    # Until the trainer drops them, rows after its checkpoint are those of the run before.
    self._stale = self._step(run)
    self._began = self._last = time.monotonic()
    self._seen: tuple[int, float] | None = None  # the first new step, and when

  def end(self, run: Planned) -> None:
    now = time.monotonic()
    work, seconds = self._measured(run, self._step(run), now)
    self._work, self._seconds = self._work + work, self._seconds + seconds
    self._starts.append(self._seen[1] - self._began if self._seen else now - self._began)

  def show(self, run: Planned, label: str) -> None:
    """A line, if it is time for one."""
    now = time.monotonic()
    if now - self._last < self._every:
      return
    self._last = now
    step = self._step(run)
    if step == self._stale:
      step = self._first
    else:
      self._stale = None
    if self._seen is None and step > self._first:
      self._seen = step, now
    work, seconds = self._measured(run, step, now)
    speed = f'{(step - self._seen[0]) / seconds:.2f} steps/s' if work else 'starting'
    left = self._time_left(run, work, seconds, now)
    note(f'{label}: step {step:,}/{run.steps:,}, {speed}'
         + (f', about {duration(left)} left in all' if left is not None else ''))

  def _time_left(self, run: Planned, work: float, seconds: float, now: float) -> float | None:
    if not self._work + work:
      return None
    per_work = (self._seconds + seconds) / (self._work + work)
    starts = self._starts + ([self._seen[1] - self._began] if self._seen else [])
    start = sum(starts) / len(starts)
    this = 0.0 if self._seen else max(start - (now - self._began), 0)
    return (this + start * len(self._waiting)
            + per_work * (self._left(run) + sum(self._waiting.values())))

  def _measured(self, run: Planned, step: int, now: float) -> tuple[float, float]:
    """Work and seconds of this run since the step that was seen first."""
    if self._seen is None or step <= self._seen[0]:
      return 0.0, 0.0
    return run.work * (step - self._seen[0]) / run.steps, now - self._seen[1]

  def _left(self, run: Planned) -> float:
    return run.work * max(run.steps - self._step(run), 0) / run.steps

  @staticmethod
  def _step(run: Planned) -> int:
    rows = run.rows()
    return int(rows[-1]['step']) if rows else 0
