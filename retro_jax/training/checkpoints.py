"""Checkpoints: the state under plain names and the position in the data, by Orbax.

Also how a finished model leaves a run: `model.json` beside the checkpoints says what the
parameters mean, so that evaluation and sampling need the run's folder and nothing else.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

from retro_jax import storage
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.errors import UserError
from retro_jax.models.config import RetroConfig
from retro_jax.models.retro import Parameters, init_parameters
from retro_jax.training.state import TrainState, from_plain, to_plain

CHECKPOINTS = 'checkpoints'
MODEL_JSON = 'model.json'
SAFETENSORS = 'model.safetensors'
VOCABULARY = 'vocabulary.model'


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Attributes: save `every` so many steps (and at the end), `keep` the newest so many."""
  every: int = 1000
  keep: int = 2


class Checkpoints:
  """The checkpoints of one run; saves in the background, one atomic folder a step."""

  def __init__(self, folder: Path, config: CheckpointConfig):
    self._folder, self._every = folder, config.every
    self._manager = ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=config.keep, create=True))

  def is_due(self, step: int, force: bool = False) -> bool:
    """Whether the policy (or `force`) says so and this step is not there yet."""
    due = force or step % self._every == 0
    return due and step not in self._manager.all_steps()

  def save(self, state: TrainState, step: int, data: dict[str, Any]) -> None:
    """Starts saving."""
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
        before = restored.data.get(name)
        raise UserError(f'{self._folder}: was trained with {name} = {before!r}, now {value!r}; '
                        'use another run_dir or the old setting')
    return from_plain(restored.state, like)

  def close(self) -> None:
    """Waits for saves under way."""
    self._manager.wait_until_finished()
    self._manager.close()


def write_model_description(folder: str | Path, model: RetroConfig,
                            vocabulary: Mapping[str, Any]) -> None:
  """Leaves `model.json`: the model's config and which vocabulary its ids belong to."""
  storage.write_json(Path(folder) / MODEL_JSON,
                     {'model': dataclasses.asdict(model), 'vocabulary': dict(vocabulary)})


def read_model_description(folder: str | Path) -> tuple[RetroConfig, dict[str, Any]]:
  """What `model.json` says, without reading parameters: the config, the vocabulary's facts.

  Raises:
    UserError: no model there.
  """
  path = Path(folder) / MODEL_JSON
  try:
    described = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError(f'{folder}: no trained model there (no {MODEL_JSON}); '
                    'train one first') from None
  except json.JSONDecodeError as error:
    raise UserError(f'{path}: not valid JSON ({error}); export or train the model again') from None
  return RetroConfig(**described['model']), described['vocabulary']


def load_model(folder: str | Path) -> tuple[RetroConfig, Parameters, dict[str, Any]]:
  """A finished model: config, float32 parameters on the default device, its vocabulary's facts.

  Args:
    folder: of a run (its newest checkpoint is taken) or of an exported model.

  Raises:
    UserError: no model there, none finished, or parameters that do not fit `model.json`.
  """
  model, vocabulary = read_model_description(folder)
  expected = jax.eval_shape(lambda: init_parameters(model, jax.random.key(0)))
  exported = Path(folder) / SAFETENSORS
  found = _read_exported(exported) if exported.exists() else _read_newest(Path(folder))
  for name, leaf in expected.items():
    if name not in found or found[name].shape != leaf.shape:
      shape = found[name].shape if name in found else 'nothing'
      raise UserError(f'{folder}: parameter {name} is {shape}, {MODEL_JSON} asks for {leaf.shape}; '
                      'the two do not belong together')
  parameters = {name: jnp.asarray(found[name], jnp.float32) for name in expected}
  return model, parameters, vocabulary


def export_model(run_dir: str | Path, vocabulary_path: str | Path, folder: str | Path,
                 facts: Mapping[str, Any], dtype: str = 'float32') -> None:
  """Writes the newest parameters of a run as one safetensors file, with all it takes to use them.

  Args:
    run_dir: of the training run.
    vocabulary_path: the SentencePiece model it was trained with.
    folder: to write, replaced as a whole.
    facts: about the training, kept in the manifest.
    dtype: of the stored values, 'float32' or 'float16'.

  Raises:
    UserError: no finished model, or another vocabulary than that of its training.
  """
  model, parameters, vocabulary = load_model(run_dir)
  given = Vocabulary.load(vocabulary_path).fingerprint
  if given != vocabulary['fingerprint']:
    raise UserError(f'{vocabulary_path} is vocabulary {given}, but {run_dir} was trained with '
                    f'{vocabulary["fingerprint"]}; give the one of the training')
  with storage.building(folder, {'kind': 'exported-model', **facts}) as temporary:
    write_model_description(temporary, model, vocabulary)
    safetensors.numpy.save_file(
        {name: np.asarray(value, dtype) for name, value in parameters.items()},
        temporary / SAFETENSORS)
    shutil.copyfile(vocabulary_path, temporary / VOCABULARY)


def _read_exported(path: Path) -> dict[str, np.ndarray]:
  try:
    return safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as error:
    raise UserError(f'{path}: damaged ({error}); export the model again') from None


def _read_newest(run_dir: Path) -> dict[str, jax.Array]:
  """The parameters alone, on one device, whatever mesh and number of devices saved them."""
  folder = run_dir / CHECKPOINTS
  manager = ocp.CheckpointManager(folder.absolute()) if folder.exists() else None
  step = manager.latest_step() if manager else None
  if step is None:
    raise UserError(f'{run_dir}: holds no finished checkpoint; train first')
  manager.close()
  handler = ocp.PyTreeCheckpointer()
  path = folder.absolute() / str(step) / 'state'
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  stored = handler.metadata(path).item_metadata.tree['parameters']
  wanted = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
            for name, leaf in stored.items()}
  restored = handler.restore(path, args=ocp.args.PyTreeRestore(
      item={'parameters': wanted}, partial_restore=True,
      restore_args={'parameters': ocp.checkpoint_utils.construct_restore_args(wanted)}))
  return restored['parameters']
