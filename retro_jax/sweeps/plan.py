"""Runs of a sweep with their configuration resolved, and what lies in their folders.

Resolving happens for all runs before any is started, so that a misspelt setting of the last
one costs nothing. Running is local.py's, results are summary.py's.
"""

import dataclasses
import functools
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retro_jax import configuration, files, storage, train
from retro_jax.data import records
from retro_jax.errors import UserError
from retro_jax.models import flops
from retro_jax.sweeps import sizes
from retro_jax.sweeps.sweep_file import Run, Sweep
from retro_jax.training import checkpoints
from retro_jax.training.loop import TrainJob
from retro_jax.training.metrics import METRICS, read_metrics

# Beside the trainer's own files: what the run was made with.
DESCRIPTION = 'sweep-run.json'
_LAUNCHER = Path(__file__).resolve().parents[2] / 'launch' / 'local_cpu.sh'
_LONGEST_NAME = 63  # of a machine, in Google's clouds


@dataclasses.dataclass(frozen=True)
class Planned:
  """One run ready to start.

  Attributes:
    run: as expanded.
    folder: of the run.
    job: its resolved configuration.
  """
  run: Run
  folder: str
  job: TrainJob

  @property
  def name(self) -> str:
    return self.run.name

  @property
  def steps(self) -> int:
    return self.job.training.steps

  @property
  def kind(self) -> str:
    return 'retro' if self.job.model.has_retrieval else 'baseline'

  @functools.cached_property
  def parameters(self) -> dict[str, int]:
    return sizes.count_parameters(self.job.model)

  @functools.cached_property
  def sequence_length(self) -> int | None:
    """Of the training examples; None while they are not there."""
    folder = next(iter(self.job.data.train), '')
    if not folder or not files.exists(files.join(folder, storage.MANIFEST)):
      return None
    return int(storage.read_manifest(folder, records.KIND)['sequence_length'])

  @property
  def positions(self) -> int | None:
    """Tokens that the run computes, padding included."""
    n = self.sequence_length
    return None if n is None else self.steps * self.job.training.batch_size * n

  @functools.cached_property
  def flops(self) -> float | None:
    """Of all its training, by the count that MFU goes by."""
    if self.sequence_length is None:
      return None
    return self.steps * flops.training_flops(
        self.job.model, self.job.training.batch_size, self.sequence_length)

  @property
  def work(self) -> float:
    """What time is shared out by: floating-point operations, or nearly."""
    if self.flops is not None:
      return self.flops
    return float(self.steps * self.job.training.batch_size * sum(self.parameters.values()))

  def local_command(self, devices: int) -> list[str]:
    return [_shown_launcher(), '--devices', str(devices), 'retro_jax.train',
            *self.run.arguments(self.folder)]

  def pod_command(self, sweep: str, options: Mapping[str, str]) -> list[str]:
    """A line for launch/tpu_pod.sh; `options` are its --type, --zone, --project."""
    return [os.path.relpath(_LAUNCHER.with_name('tpu_pod.sh')), 'train',
            f'--name={_machine_name(sweep, self.name)}',
            *(f'--{name}={value}' for name, value in options.items()),
            '--', 'retro_jax.train', *self.run.arguments(self.folder)]

  # ------------------------------------------------------------------- what its folder holds

  def rows(self) -> list[dict[str, float]]:
    """The rows of metrics so far."""
    return read_metrics(self.folder)

  def is_finished(self, rows: Sequence[Mapping[str, float]] | None = None) -> bool:
    """Whether the last step was told and its checkpoint is complete."""
    rows = self.rows() if rows is None else rows
    # Orbax gives a checkpoint this name when it is whole.
    last = files.join(self.folder, checkpoints.CHECKPOINTS, str(self.steps))
    return bool(rows) and rows[-1]['step'] == self.steps and files.exists(last)

  def saved_step(self) -> int:
    """Of the newest complete checkpoint on the disk, from which the trainer continues; or 0."""
    folder = Path(self.folder) / checkpoints.CHECKPOINTS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)

  def describe(self) -> dict[str, Any]:
    """All that makes the run what it is: its configuration and its data."""
    configuration_ = dataclasses.asdict(self.job)
    del configuration_['run_dir']  # a folder may be moved
    data = {}
    for folder in (*self.job.data.train, self.job.data.valid, self.job.data.valid_random):
      if folder:
        data[folder] = storage.read_manifest(folder, records.KIND)['content']
    return storage.as_json({'settings': configuration_, 'examples': data})

  def check_folder(self) -> None:
    """Refuses a folder that holds another run than this one.

    Raises:
      UserError: says in what they differ.
    """
    path = Path(self.folder) / DESCRIPTION
    try:
      there = storage.read_json(path, None)
    except json.JSONDecodeError as error:
      raise UserError(f'{path}: not valid JSON ({error}); remove the folder or choose another '
                      '--folder') from None
    if there is None:
      if (Path(self.folder) / METRICS).exists() or (
          Path(self.folder) / checkpoints.CHECKPOINTS).exists():
        raise UserError(f'{self.folder}: holds a run that no sweep made (no {DESCRIPTION}); '
                        'choose another --folder or rename that one')
      return
    before, now = _flat(there.get('made_with', {})), _flat(self.describe())
    changed = [key for key in sorted(before.keys() | now.keys())
               if before.get(key, _ABSENT) != now.get(key, _ABSENT)]
    if changed:
      told = ', '.join(f'{key.removeprefix("settings.")} = {_shown(before, key)}, now '
                       f'{_shown(now, key)}'
                       for key in changed[:4])
      more = f' and {len(changed) - 4} more' if len(changed) > 4 else ''
      raise UserError(f'{self.folder}: was made with {told}{more}; choose another --folder, the '
                      'old setting, or remove that run')

  def check_model(self) -> None:
    """For runs made elsewhere: refuses one whose trainer described another model.

    Raises:
      UserError: it is another model.
    """
    path = files.join(self.folder, checkpoints.MODEL_JSON)
    if not files.exists(path):
      return
    try:
      there = json.loads(files.read_bytes(path))['model']
    except (ValueError, KeyError, TypeError):
      raise UserError(f'{path}: does not describe a model; was it damaged?') from None
    mine = storage.as_json(dataclasses.asdict(self.job.model))
    for key in sorted(there.keys() | mine.keys()):
      if there.get(key) != mine.get(key):
        raise UserError(f'{self.folder}: was trained with {key} = {there.get(key)!r}, the sweep '
                        f'now says {mine.get(key)!r}; collect it with the sweep that made it')

  def write_description(self) -> None:
    """Leaves in the folder what the run is made with; call `check_folder` before."""
    path = Path(self.folder) / DESCRIPTION
    if not path.exists():
      storage.write_json(path, {'made_with': self.describe(),
                                'arguments': shlex.join(self.run.arguments(self.folder))})


def resolve(sweep: Sweep, folder: str, gin_files: Sequence[str] = (),
            settings: Mapping[str, str] | None = None) -> list[Planned]:
  """All runs of a sweep, each with its configuration.

  Args:
    sweep: as read.
    folder: each run gets one of its name below it.
    gin_files, settings: from the command line; they override the sweep's.

  Raises:
    UserError: a run whose settings do not resolve (names it), or two that are the same.
  """
  planned: list[Planned] = []
  seen: dict[str, str] = {}
  for run in sweep.runs(gin_files, settings):
    run_dir = files.join(folder, run.name)
    try:
      line = configuration.parse_arguments(run.arguments(run_dir))
      job = configuration.resolve(TrainJob, train.CONFIGURABLES, line)
    except UserError as error:
      raise UserError(f'{sweep.path}: run {run.name}: {error}') from None
    key = storage.fingerprint({**dataclasses.asdict(job), 'run_dir': ''})
    if key in seen:
      raise UserError(f'{sweep.path}: runs {seen[key]} and {run.name} have the same '
                      'configuration; remove one, or give them different SEEDs')
    seen[key] = run.name
    planned.append(Planned(run, run_dir, job))
  return planned


def warnings(planned: Sequence[Planned]) -> list[str]:
  """What a person would want to know before the first run."""
  told = []
  silent = [p.name for p in planned if not (p.job.data.valid and p.job.training.evaluate_every)]
  if silent:
    told.append(f'no bits-per-byte of validation examples from {_some(silent)}: set VALID_DATA, '
                'and EVALUATE_EVERY above 0')
  rests = {p.name: p.job.data.train for p in planned}
  missing = sorted({folder for train_data in rests.values() for folder in train_data
                    if not files.is_remote(folder) and not files.exists(folder)})
  if missing:
    told.append(f'no training examples at {_some(missing)} yet')
  return told


def _some(names: Sequence[str]) -> str:
  return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


_ABSENT = object()


def _shown(values: Mapping[str, Any], key: str) -> str:
  return repr(values[key]) if key in values else 'nothing'


def _flat(value: Any, prefix: str = '') -> dict[str, Any]:
  """Nested dicts as one; keys are joined by '.'."""
  if not isinstance(value, dict) or not value:
    return {prefix: value}
  result = {}
  for key, item in value.items():
    result.update(_flat(item, f'{prefix}.{key}' if prefix else key))
  return result


def _shown_launcher() -> str:
  """Relative when that is shorter: the printed commands are meant to be copied."""
  relative = os.path.relpath(_LAUNCHER)
  return relative if not relative.startswith('..') else str(_LAUNCHER)


def _machine_name(sweep: str, run: str) -> str:
  name = ''.join(c if c.isalnum() else '-' for c in f'{sweep}-{run}'.lower()).strip('-')
  if len(name) > _LONGEST_NAME or not name[0].isalpha():
    raise UserError(f'{name}: no name for a machine (at most {_LONGEST_NAME} characters, a letter '
                    'first); rename the sweep file or its values')
  return name
