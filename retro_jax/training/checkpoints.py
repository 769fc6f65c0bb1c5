"""Checkpoints: the state under plain names and the position in the data, by Orbax.

Also how a finished model leaves a run: `model.json` beside the checkpoints says what the
parameters mean, so that evaluation and sampling need the run's folder and nothing else.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from retro_jax.errors import UserError
from retro_jax.models.config import RetroConfig
from retro_jax.training.state import TrainState, from_plain, to_plain


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Attributes: save `every` so many steps (and at the end), `keep` the newest so many."""
  every: int = 1000
  keep: int = 2


class Checkpoints:
  """The checkpoints of one run; saves in the background, one atomic folder a step."""

  def __init__(self, folder: Path, config: CheckpointConfig):
    self._folder = folder
    self._manager = ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, save_interval_steps=config.every, create=True))

  def save(self, state: TrainState, step: int, data: dict[str, Any], force: bool = False) -> None:
    """Starts saving, if the policy (or `force`) says so and this step is not there yet."""
    if step in self._manager.all_steps() or not (force or self._manager.should_save(step)):
      return
    self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(to_plain(state)), data=ocp.args.JsonSave(data)), force=True)

  def restore(self, like: TrainState, data: dict[str, Any]) -> TrainState | None:
    """The newest state in the shardings of `like`, or None in a fresh run.

    Raises:
      UserError: the run was trained on other data or in another order than `data` says.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    restored = self._manager.restore(step, args=ocp.args.Composite(
        state=ocp.args.StandardRestore(to_plain(like)), data=ocp.args.JsonRestore()))
    for name, value in data.items():
      if name != 'step' and restored.data.get(name) != value:
        raise UserError(f'{self._folder}: was trained with {name} = {restored.data.get(name)!r}, now '
                        f'{value!r}; use another run_dir or the old setting')
    return from_plain(restored.state, like)

  def close(self) -> None:
    """Waits for saves under way."""
    self._manager.wait_until_finished()
    self._manager.close()


def write_model_description(folder: Path, model: RetroConfig, vocabulary: dict[str, Any]) -> None:
  """Leaves `model.json`: the model's config and which vocabulary its ids belong to."""
  from retro_jax import storage
  storage.write_json(folder / 'model.json',
                     {'model': dataclasses.asdict(model), 'vocabulary': vocabulary})


def read_model_description(folder: str | Path) -> tuple[RetroConfig, dict[str, Any]]:
  """The inverse of `write_model_description`."""
  path = Path(folder) / 'model.json'
  try:
    described = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError(f'{folder}: no trained model there (no model.json); train one first') from None
  return RetroConfig(**described['model']), described['vocabulary']


def load_parameters(folder: str | Path) -> dict[str, jax.Array]:
  """The newest parameters of a run folder, on this host's default device."""
  manager = ocp.CheckpointManager(Path(folder).absolute() / 'checkpoints')
  step = manager.latest_step()
  if step is None:
    raise UserError(f'{folder}: holds no finished checkpoint; train first')
  metadata = manager.item_metadata(step)
  del metadata
  restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
  manager.close()
  return restored.state['parameters']
