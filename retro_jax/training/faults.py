"""Numbers that are no numbers: noticed one step late, described, and the run stopped.

The step leaves sums over every parameter's gradient (of squares), update and new value
(step.py); here the host looks at them when the step after it is under way, so that nothing
waits. Skipping steps whose loss jumps out of line is a part of the optimizer (spikes.py).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from retro_jax import files, storage
from retro_jax.errors import Diverged

# Rows of `sums`, in the order in which a fault spreads.
STAGES = ('gradient', 'update', 'parameter')


class Watch:
  """Looks at each step's numbers one step late, and keeps what a dump needs until then."""

  def __init__(self, run_dir: str, names: list[str],
               describe: Callable[[int], Mapping[str, Any]], forgiven: int = 0):
    """
    Args:
      run_dir: of the run; a dump goes there.
      names: of the parameters, as `sums` has them (sorted).
      describe: what stood in the batch of a step, for the dump: JSON.
      forgiven: such steps in a row that do not stop the run, where the optimizer skips them.
    """
    self._forgiven, self._in_a_row = forgiven, 0
    self._run_dir, self._names, self._describe = run_dir, names, describe
    self._pending: tuple[int, jax.Array, jax.Array] | None = None

  def look(self) -> None:
    """Checks the step that `expect` was called for last, if it was not checked before.

    Raises:
      Diverged: it holds NaN or infinity. The dump is written by process 0.
    """
    if self._pending is None:
      return
    step, loss, sums = self._pending
    self._pending = None
    loss, sums = jax.device_get((loss, sums))
    if np.isfinite(loss) and np.isfinite(sums).all():
      self._in_a_row = 0
      return
    self._in_a_row += 1
    # What was skipped has left the parameters alone.
    if self._in_a_row <= self._forgiven and np.isfinite(sums[-1]).all():
      return
    raise Diverged(self._dump(step, float(loss), np.asarray(sums)))

  def expect(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Remembers the metrics of a step that was started; nothing is waited for."""
    self._pending = step, metrics['loss'], metrics['sums']

  def _dump(self, step: int, loss: float, sums: np.ndarray) -> str:
    bad = {stage: [name for name, value in zip(self._names, row) if not math.isfinite(value)]
           for stage, row in zip(STAGES, sums)}
    stage = next((stage for stage in STAGES if bad[stage]), None)
    where = f'{stage} of {bad[stage][0]}' if stage else 'the loss'
    path = files.join(self._run_dir, f'nonfinite-step-{step}.json')
    if jax.process_index() == 0:
      storage.write_json(path, {
          'step': step, 'loss': str(loss), 'first': where,
          'parameters': bad, 'batch': dict(self._describe(step)),
          'sums': {stage: {name: str(value) for name, value in zip(self._names, row)}
                   for stage, row in zip(STAGES, sums)}})
    return (f'step {step}: {where} is NaN or infinite (loss {loss:g}); the step, its examples and '
            f'every parameter are in {path}; lower the learning rate, look at the examples, or '
            'go on from an earlier checkpoint with TrainingConfig.skip_spikes = True')
