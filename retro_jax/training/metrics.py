"""Where numbers of a run go: `metrics.jsonl` for tools, TensorBoard events for people."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax

from retro_jax import storage


class MetricWriter:
  """Writes rows on process 0; after a restart the rows that will come again are dropped."""

  def __init__(self, run_dir: Path, first_step: int):
    """Args: `first_step`, the step the run continues from; later rows are forgotten."""
    self._file = self._events = None
    if jax.process_index() != 0:
      return
    from clu import metric_writers  # brings TensorFlow
    path = run_dir / 'metrics.jsonl'
    kept = [row for row in read_metrics(run_dir) if row['step'] <= first_step]
    with storage.atomic_file(path) as f:
      f.writelines(json.dumps(row) + '\n' for row in kept)
    self._file = open(path, 'a', encoding='utf-8')
    self._events = metric_writers.SummaryWriter(str(run_dir / 'tensorboard'))

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds one row."""
    if self._file is None:
      return
    self._file.write(json.dumps({'step': step, **metrics}) + '\n')
    self._file.flush()
    self._events.write_scalars(step, dict(metrics))

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._events.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
  """The rows of a run's `metrics.jsonl`; a line cut short by a crash is left out."""
  rows = []
  path = Path(run_dir) / 'metrics.jsonl'
  if not path.exists():
    return rows
  for line in path.read_text(encoding='utf-8').splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return rows
