"""What a run tells of its own speed: step time, FLOPs used, waiting, and time that was lost.

Everything here is the host's clock around things the loop does anyway; nothing waits for a
device. Metrics of the model come from step.py, and where rows go is metrics.py's business.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from retro_jax import files, storage
from retro_jax.progress import duration

_COMPILED = '/jax/core/compile/backend_compile_duration'
FACTS = 'run.json'


@dataclasses.dataclass
class Clock:
  """Seconds by what they were spent on, since the run's first start where `carried` says so.

  Attributes:
    productive: steps that count, without those after the last checkpoint before a restart.
    input: waiting for a batch.
    compile: XLA, on this process.
    checkpoint: the loop standing still for checkpoints.
    evaluation: scores of the validation examples.
    compilations: number of programs compiled.
  """
  productive: float = 0.0
  input: float = 0.0
  compile: float = 0.0
  checkpoint: float = 0.0
  evaluation: float = 0.0
  compilations: int = 0


class Telemetry:
  """Counts time; tells it as metrics and as a line of the log.

  In a restarted run `goodput` is the share of all the time since the run's first start that
  went into steps which count: restarts, lost steps, compiling and waiting lower it.
  """

  def __init__(self, run_dir: str, last: int, flops_per_token: float, peak_flops: float,
               carried: Mapping[str, Any]):
    """
    Args:
      run_dir: `run.json` there remembers when the run began and how often.
      last: step at which the run ends.
      flops_per_token: of the model, forward and backward.
      peak_flops: FLOP/s of all devices together; 0 when not known.
      carried: `productive_seconds` as the checkpoint has it.
    """
    self._last = last
    self._flops, self._peak = flops_per_token, peak_flops
    self.clock = Clock(productive=float(carried.get('productive_seconds', 0.0)))
    self._begun, self.starts = _note_start(run_dir)
    # Step, time and `clock.input` since which speed is measured.
    self._window: tuple[int, float, float] | None = None
    self._outside = 0.0  # seconds of the window spent on other things than steps
    jax.monitoring.register_event_duration_secs_listener(self._compiled)

  def _compiled(self, event: str, seconds: float, **unused: Any) -> None:
    if event == _COMPILED:
      self.clock.compile += seconds
      self.clock.compilations += 1
      self._outside += seconds

  @contextlib.contextmanager
  def waiting_for(self, what: str) -> Iterator[None]:
    """Time inside belongs to 'input', 'checkpoint' or 'evaluation'."""
    begin, compiled = time.monotonic(), self.clock.compile
    try:
      yield
    finally:
      seconds = time.monotonic() - begin
      setattr(self.clock, what, getattr(self.clock, what) + seconds)
      if what != 'input':
        # Compiling inside of it has been counted already.
        self._outside += seconds - (self.clock.compile - compiled)

  def measure(self, step: int, tokens: float) -> dict[str, float]:
    """Speed since the last call, which was for an earlier step; call it when `step` has ended.

    Args:
      step: that has ended.
      tokens: with a target, of this step's batch.
    """
    now = time.monotonic()
    before, outside = self._window, self._outside
    self._window, self._outside = (step, now, self.clock.input), 0.0
    row = {'compilations': float(self.clock.compilations),
           'compile_seconds': self.clock.compile,
           'checkpoint_seconds': self.clock.checkpoint,
           'evaluation_seconds': self.clock.evaluation, 'starts': float(self.starts)}
    if before is not None and step > before[0]:
      steps, seconds = step - before[0], max(now - before[1] - outside, 1e-9)
      self.clock.productive += seconds
      row |= {'seconds_per_step': seconds / steps, 'tokens_per_second': tokens * steps / seconds,
              'input_stall': min((self.clock.input - before[2]) / seconds, 1.0),
              'model_flops_per_second': self._flops * tokens * steps / seconds}
      if self._peak:
        row['mfu'] = row['model_flops_per_second'] / self._peak
    row['goodput'] = min(self.clock.productive / max(time.time() - self._begun, 1e-9), 1.0)
    return row

  def carried(self) -> dict[str, float]:
    """What a checkpoint keeps for the next start."""
    return {'productive_seconds': self.clock.productive}

  def line(self, step: int, row: Mapping[str, float]) -> str:
    """A row of metrics for people."""
    text = (f'step {step:,}/{self._last:,} loss {row["loss"]:.3f} '
            f'bits/byte {row["bits_per_byte"]:.3f} gradient {row["gradient_norm"]:.2f}')
    if 'seconds_per_step' in row:
      left = (self._last - step) * row['seconds_per_step']
      text += f' {row["tokens_per_second"]:,.0f} tokens/s'
      if 'mfu' in row:
        text += f' MFU {row["mfu"]:.1%}'
      if row['input_stall'] > 0.05:
        text += f' input stall {row["input_stall"]:.0%}'
      text += f', {duration(left)} left'
    return text

  def close(self) -> None:
    """Listens no more."""
    jax.monitoring.unregister_event_duration_listener(self._compiled)


def _note_start(run_dir: str) -> tuple[float, int]:
  """When the run began first (seconds since 1970) and how often it was started, this included."""
  path = files.join(run_dir, FACTS)
  facts = json.loads(files.read_bytes(path)) if files.exists(path) else {
      'begun': time.time(), 'starts': 0}
  facts['starts'] += 1
  if jax.process_index() == 0:
    storage.write_json(path, facts)
  return facts['begun'], facts['starts']
