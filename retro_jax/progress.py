"""Progress lines for work that takes a while: how far, how fast, how long still."""

import sys
import time


class Progress:
  """Prints `label: done/total unit, rate, time left` at most every `every` seconds."""

  def __init__(self, label: str, total: int | None, unit: str, every: float = 5.0):
    self.label, self.total, self.unit, self.every = label, total, unit, every
    self.done = 0
    self._start = self._last = time.monotonic()

  def update(self, amount: int = 1) -> None:
    self.done += amount
    now = time.monotonic()
    if now - self._last >= self.every:
      self._last = now
      self._print(now)

  def close(self) -> None:
    self._print(time.monotonic(), final=True)

  def _print(self, now: float, final: bool = False) -> None:
    elapsed = max(now - self._start, 1e-9)
    rate = self.done / elapsed
    of = f'/{self.total:,}' if self.total else ''
    if final:
      tail = f'in {duration(elapsed)}'
    elif self.total and rate:
      tail = f'{duration((self.total - self.done) / rate)} left'
    else:
      tail = f'{duration(elapsed)} so far'
    print(f'{self.label}: {self.done:,}{of} {self.unit}, {rate:,.1f}/s, {tail}', flush=True,
          file=sys.stderr)


def duration(seconds: float) -> str:
  """'42 s', '3 min 07 s', '2 h 05 min'."""
  seconds = int(round(seconds))
  if seconds < 60:
    return f'{seconds} s'
  if seconds < 3600:
    return f'{seconds // 60} min {seconds % 60:02d} s'
  return f'{seconds // 3600} h {seconds % 3600 // 60:02d} min'
