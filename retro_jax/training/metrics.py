"""Where numbers of a run go: `metrics.jsonl` for tools, TensorBoard events for people."""

import json
import os
from collections.abc import Mapping

import jax

from retro_jax import files, storage

METRICS = 'metrics.jsonl'


class MetricWriter:
  """Writes rows on process 0; after a restart the rows that will come again are dropped."""

  def __init__(self, run_dir: str, first_step: int):
    """Args: `first_step`, the step the run continues from; later rows are forgotten."""
    self._path = files.join(run_dir, METRICS)
    self._events = None
    if jax.process_index() != 0:
      return
    from clu import metric_writers  # brings TensorFlow
    self._lines = [json.dumps(row) for row in read_metrics(run_dir) if row['step'] <= first_step]
    storage.write_text(self._path, ''.join(f'{line}\n' for line in self._lines))
    self._events = metric_writers.AsyncMultiWriter(
        [metric_writers.SummaryWriter(files.join(run_dir, 'tensorboard'))])

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds one row."""
    if self._events is None:
      return
    line = json.dumps({'step': step, **metrics})
    if files.is_remote(self._path):  # objects in a bucket cannot grow
      self._lines.append(line)
      storage.write_text(self._path, ''.join(f'{line}\n' for line in self._lines))
    else:
      with open(self._path, 'a', encoding='utf-8') as file:
        file.write(line + '\n')
    self._events.write_scalars(step, dict(metrics))

  def close(self) -> None:
    if self._events is not None:
      self._events.close()


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, float]]:
  """The rows of a run's `metrics.jsonl`; a line cut short by a crash is left out."""
  path = files.join(run_dir, METRICS)
  if not files.exists(path):
    return []
  rows = []
  for line in files.read_bytes(path).decode().splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return rows
