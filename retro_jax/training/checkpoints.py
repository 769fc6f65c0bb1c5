"""Checkpoints: the state under plain names and the position in the data, by Orbax.

A run continues from the newest checkpoint of its own folder; without one its parameters come
from the initial checkpoint that its settings name, and those that this leaves out, or all,
from the seed.

Also how a finished model leaves a run: `model.json` beside the checkpoints says what the
parameters mean, so that evaluation and sampling need the run's folder and nothing else.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from retro_jax import files, storage
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.errors import UserError, nearest
from retro_jax.models import layouts
from retro_jax.models.config import OF_THE_DECODER, RetroConfig
from retro_jax.models.retro import Parameters, init_parameters
from retro_jax.training.state import TrainState, from_plain, to_plain

CHECKPOINTS = 'checkpoints'
MODEL_JSON = 'model.json'
SAFETENSORS = 'model.safetensors'
VOCABULARY = 'vocabulary.model'


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When checkpoints are saved, which stay, and what a fresh run begins with.

  Attributes:
    every: steps between checkpoints that are kept; one more at the end of the run.
    keep: the newest so many of those stay; 0 keeps all.
    temporary_minutes: between checkpoints that only bridge an interruption: of these the newest
      stays, until a newer one of any kind is complete. 0 for none.
    initial: folder of a run or of an exported model whose parameters a fresh run begins with;
      '' draws them from the seed. Layers are found by their number, so a RETRO can begin with its
      baseline, or with a RETRO of another P.
    assignment: where a fresh run finds its parameters in `initial`: pairs of a regular expression
      that matches a parameter's whole name and the name to take, with \\1 for groups, or None
      to draw it from the seed; the first match counts, and without one the name is the same.
  """
  every: int = 1000
  keep: int = 2
  temporary_minutes: float = 15.0
  initial: str = ''
  assignment: Sequence[tuple[str, str | None]] = ()


@dataclasses.dataclass(frozen=True)
class _Kept:
  """Orbax's policy for what stays: the newest of all, and the newest `keep` of every so many."""
  every: int
  keep: int

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    regular = [step for step in steps if step % self.every == 0]
    kept = {*steps[-1:], *(regular[-self.keep:] if self.keep else regular)}
    return [step in kept for step in steps]


class Checkpoints:
  """The checkpoints of one run; saves in the background, one atomic folder a step.

  A folder gets its name when everything in it is written, so whatever a crash leaves behind
  is not taken for a checkpoint, and the last good one is deleted only after that.
  """

  def __init__(self, folder: str, config: CheckpointConfig):
    self._folder, self._config = folder, config
    self._saved_at = time.monotonic()
    self._manager = ocp.CheckpointManager(
        epath.Path(folder).absolute(), options=ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(config.every, config.keep), create=True))

  def is_due(self, step: int, force: bool = False) -> bool:
    """Whether the policy by step (or `force`) says so and this step is not there yet."""
    due = force or step % self._config.every == 0
    return due and step != self._manager.latest_step()

  @property
  def minutes_due(self) -> float:
    """Above 0 when the policy by time asks for one; by this process's clock."""
    limit = self._config.temporary_minutes
    return (time.monotonic() - self._saved_at) / 60 - limit if limit else -1.0

  def save(self, state: TrainState, step: int, data: dict[str, Any]) -> None:
    """Starts saving; waits for the save before, if that is still under way."""
    self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(to_plain(state)), data=ocp.args.JsonSave(data)), force=True)
    self._saved_at = time.monotonic()

  def restore(self, like: TrainState, data: dict[str, Any]
              ) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest state in the shardings of `like` and what was saved as its data, or None.

    Raises:
      UserError: the run was trained on other data or in another order than `data` says.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    saved = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore())).data
    for name, value in data.items():
      if saved.get(name) != value:
        raise UserError(f'{self._folder}: was trained with {name} = {saved.get(name)!r}, now '
                        f'{value!r}; use another run_dir or the old setting')
    restored = self._manager.restore(step, args=ocp.args.Composite(
        state=ocp.args.StandardRestore(to_plain(like))))
    return from_plain(restored.state, like), saved

  def wait(self) -> None:
    """Waits for saves under way."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for saves under way; saves no more."""
    self.wait()
    self._manager.close()


def assigned(names: Sequence[str], config: CheckpointConfig) -> dict[str, str]:
  """Which parameter of `config.initial` each parameter begins as; fresh ones are left out.

  Raises:
    UserError: an expression that is none, or that matches no parameter.
  """
  rules = []
  for pattern, source in config.assignment:
    try:
      rules.append((re.compile(pattern), source))
    except re.error as error:
      raise UserError(f'CheckpointConfig.assignment: {pattern!r} is no regular expression '
                      f'({error})') from None
    if not any(rules[-1][0].fullmatch(name) for name in names):
      raise UserError(f'CheckpointConfig.assignment: {pattern!r} matches no parameter of the model'
                      f'{nearest(pattern, names)}; model-info.txt lists them')
  sources = {}
  for name in names:
    match, source = next(((m, s) for p, s in rules if (m := p.fullmatch(name))), (None, name))
    if source is not None:
      sources[name] = match.expand(source) if match else name
  return sources


def initial_parameters(like: Mapping[str, jax.ShapeDtypeStruct], config: CheckpointConfig,
                       model: RetroConfig, frozen: Collection[str] = (), vocabulary: str = ''
                       ) -> Parameters:
  """Parameters of `config.initial` under the names of `like`, in its shardings.

  Parameters that `assignment` leaves to the seed are not in the result. Every process reads
  what its own devices keep, as far as the layers of both models are stacked alike.

  Args:
    like: shapes, dtypes and shardings of the run's parameters.
    config: with `initial` set.
    model: of the run.
    frozen: names of parameters that will not be trained.
    vocabulary: fingerprint of the run's ids, '' where nobody knows.

  Raises:
    UserError: no model there, a parameter that is missing or of another shape, or one that is
      frozen in a decoder that computes something else with it or for other ids.
  """
  sources = assigned(list(like), config)
  folder = epath.Path(config.initial)
  there, facts = model, {}
  if (folder / MODEL_JSON).exists():
    there, facts = read_model_description(folder)
  if there.num_layers != model.num_layers:
    raise UserError(f'{folder}: has {there.num_layers} layers, but RetroConfig.num_layers = '
                    f'{model.num_layers}; make them equal')
  if set(frozen) & sources.keys():
    _check_same_decoder(folder, model, there)
    known = facts.get('fingerprint', '')
    if vocabulary and known and vocabulary != known:
      raise UserError(f'{folder}: was trained with vocabulary {known}, but the data is of '
                      f'{vocabulary}, and its tables are frozen; build the data with its own')
  exported = folder / SAFETENSORS
  stored = None if exported.exists() else _newest_state(folder)
  shapes = _exported_shapes(exported) if stored is None else _shapes(stored)
  origins = {name: layouts.origin(source, model, there) for name, source in sources.items()}
  for name, origin in origins.items():
    for part in origin.parts:
      if part.name not in shapes:
        raise UserError(f'{folder}: holds no parameter {part.name}{nearest(part.name, shapes)}, '
                        f'which {name} is to begin as; see CheckpointConfig.assignment')
    found = _shape(origin, shapes)
    if found != like[name].shape:
      raise UserError(f'{folder}: parameter {origin.parts[0].name} is {found}, but {name} is '
                      f'{like[name].shape}; see CheckpointConfig.assignment')
  if stored is None:
    return {name: _from_exported(exported, origin, like[name]) for name, origin in origins.items()}
  return _from_stored(stored, origins, like, shapes)


def _check_same_decoder(folder: epath.Path, model: RetroConfig, there: RetroConfig) -> None:
  """Refuses frozen parameters in a decoder that was trained to compute something else."""
  for field in OF_THE_DECODER:
    if (here := getattr(model, field)) != (trained := getattr(there, field)):
      raise UserError(f'{folder}: was trained with RetroConfig.{field} = {trained!r}, but the run, '
                      f'in which its parameters are frozen, has {here!r}; make them equal')


def _shape(origin: layouts.Origin, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
  """The shape that the parts of a parameter make together."""
  first = origin.parts[0]
  one = tuple(shapes[first.name])[0 if first.index is None else 1:]
  return (len(origin.parts), *one) if origin.stacked else one


def _from_exported(path: epath.Path, origin: layouts.Origin, like: jax.ShapeDtypeStruct
                   ) -> jax.Array:
  """A parameter out of a safetensors file, of which only what this process keeps is read."""
  try:
    with safetensors.safe_open(path, framework='numpy') as file:

      def read(part: layouts.Part, index: tuple[slice, ...]) -> np.ndarray:
        if part.index is None:
          return file.get_slice(part.name)[index]
        return file.get_slice(part.name)[(slice(part.index, part.index + 1), *index)][0]

      def shard(index: tuple[slice, ...]) -> np.ndarray:
        if not origin.stacked:
          return np.asarray(read(origin.parts[0], index), like.dtype)
        return np.stack([read(part, index[1:]) for part in origin.parts[index[0]]]
                        ).astype(like.dtype)

      return jax.make_array_from_callback(like.shape, like.sharding, shard)
  except safetensors.SafetensorError as error:
    raise UserError(f'{path}: damaged ({error}); export the model again') from None


def _from_stored(
    state: epath.Path, origins: Mapping[str, layouts.Origin],
    like: Mapping[str, jax.ShapeDtypeStruct], shapes: Mapping[str, Sequence[int]]) -> Parameters:
  """Parameters out of a checkpoint: restored as they lie there, cut over the run's own mesh."""
  wanted = {}
  for name, origin in origins.items():
    leaf = like[name]
    # The placement of one layer is the same in every stack.
    one = tuple(leaf.sharding.spec)[1 if origin.stacked else 0:]
    for part in origin.parts:
      spec = one if part.index is None else (None, *one)
      wanted[part.name] = jax.ShapeDtypeStruct(
          tuple(shapes[part.name]), leaf.dtype,
          sharding=NamedSharding(leaf.sharding.mesh, PartitionSpec(*spec)))
  found = _restore(state, wanted)

  def take(part: layouts.Part, arrays: Parameters) -> jax.Array:
    return arrays[part.name] if part.index is None else arrays[part.name][part.index]

  @functools.partial(jax.jit, out_shardings={name: like[name].sharding for name in origins})
  def build(arrays: Parameters) -> Parameters:
    return {name: jnp.stack([take(part, arrays) for part in origin.parts]) if origin.stacked
            else take(origin.parts[0], arrays) for name, origin in origins.items()}

  return build(found)


def write_model_description(folder: str | os.PathLike, model: RetroConfig,
                            vocabulary: Mapping[str, Any]) -> None:
  """Leaves `model.json`: the model's config and which vocabulary its ids belong to."""
  storage.write_json(files.join(folder, MODEL_JSON),
                     {'model': dataclasses.asdict(model), 'vocabulary': dict(vocabulary)})


def read_model_description(folder: str | os.PathLike) -> tuple[RetroConfig, dict[str, Any]]:
  """What `model.json` says, without reading parameters: the config, the vocabulary's facts.

  Raises:
    UserError: no model there.
  """
  path = epath.Path(folder) / MODEL_JSON
  try:
    described = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError(f'{folder}: no trained model there (no {MODEL_JSON}); '
                    'train one first') from None
  except json.JSONDecodeError as error:
    raise UserError(f'{path}: not valid JSON ({error}); export or train the model again') from None
  return RetroConfig(**described['model']), described['vocabulary']


def load_model(folder: str | os.PathLike) -> tuple[RetroConfig, Parameters, dict[str, Any]]:
  """A finished model: config, float32 parameters on the default device, its vocabulary's facts.

  Args:
    folder: of a run (its newest checkpoint is taken) or of an exported model.

  Raises:
    UserError: no model there, none finished, or parameters that do not fit `model.json`.
  """
  model, vocabulary = read_model_description(folder)
  expected = jax.eval_shape(lambda: init_parameters(model, jax.random.key(0)))
  folder = epath.Path(folder)
  exported = folder / SAFETENSORS
  found = _read_exported(exported) if exported.exists() else _read_newest(folder)
  for name, leaf in expected.items():
    if name not in found or found[name].shape != leaf.shape:
      shape = found[name].shape if name in found else 'nothing'
      raise UserError(f'{folder}: parameter {name} is {shape}, {MODEL_JSON} asks for {leaf.shape}; '
                      'the two do not belong together')
  parameters = {name: jnp.asarray(found[name], jnp.float32) for name in expected}
  return model, parameters, vocabulary


def export_model(run_dir: str | os.PathLike, vocabulary_path: str | os.PathLike,
                 folder: str | os.PathLike, facts: Mapping[str, Any], dtype: str = 'float32'
                 ) -> None:
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


def _read_exported(path: epath.Path) -> dict[str, np.ndarray]:
  try:
    return safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as error:
    raise UserError(f'{path}: damaged ({error}); export the model again') from None


def _exported_shapes(path: epath.Path) -> dict[str, Sequence[int]]:
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      return {name: file.get_slice(name).get_shape() for name in file.keys()}
  except safetensors.SafetensorError as error:
    raise UserError(f'{path}: damaged ({error}); export the model again') from None


def _newest_state(run_dir: epath.Path) -> epath.Path:
  """The state's folder in a run's newest checkpoint."""
  folder = (run_dir / CHECKPOINTS).absolute()
  manager = ocp.CheckpointManager(folder) if folder.exists() else None
  step = manager.latest_step() if manager else None
  if manager:
    manager.close()
  if step is None:
    raise UserError(f'{run_dir}: holds no finished checkpoint; train first')
  return folder / str(step) / 'state'


def _stored(state: epath.Path) -> dict[str, Any]:
  """Shape and dtype of each parameter in a checkpoint."""
  return ocp.PyTreeCheckpointer().metadata(state).item_metadata.tree['parameters']


def _shapes(state: epath.Path) -> dict[str, Sequence[int]]:
  return {name: leaf.shape for name, leaf in _stored(state).items()}


def _restore(state: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]
             ) -> dict[str, jax.Array]:
  """Some parameters of a checkpoint, whatever mesh and processes saved them."""
  wanted = dict(wanted)
  restored = ocp.PyTreeCheckpointer().restore(state, args=ocp.args.PyTreeRestore(
      item={'parameters': wanted}, partial_restore=True,
      restore_args={'parameters': ocp.checkpoint_utils.construct_restore_args(wanted)}))
  return restored['parameters']


def _read_newest(run_dir: epath.Path) -> dict[str, jax.Array]:
  """All parameters of the newest checkpoint, on one device."""
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  state = _newest_state(run_dir)
  return _restore(state, {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
                          for name, leaf in _stored(state).items()})
