"""What a step changes: the step counter, the parameters, the optimizer's moments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from retro_jax.models import retro
from retro_jax.models.config import RetroConfig
from retro_jax.training import partitioning


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Attributes: `step` int32 [], `parameters` float32 by dotted name, `optimizer` as in optax."""
  step: jax.Array
  parameters: retro.Parameters
  optimizer: Any


def abstract_state(model: RetroConfig, optimizer: optax.GradientTransformation,
                   rules: partitioning.ShardingRules, mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of the state; nothing is allocated."""
  shapes = jax.eval_shape(lambda: _fresh(model, optimizer, jax.random.key(0)))
  by_name = partitioning.parameter_shardings(
      retro.parameter_axes(model), shapes.parameters, rules, mesh)
  everywhere = partitioning.replicated(mesh)

  def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # Moments sit in dicts under the names of their parameters, and lie where those lie.
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    sharding = by_name[names[-1]] if names else everywhere
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(place, shapes)


def shardings(state: TrainState) -> TrainState:
  """The shardings of an abstract state, in its structure."""
  return jax.tree.map(lambda leaf: leaf.sharding, state)


def init_state(model: RetroConfig, optimizer: optax.GradientTransformation, seed: int,
               abstract: TrainState) -> TrainState:
  """A fresh state, each shard made on the device that keeps it."""
  make = jax.jit(lambda key: _fresh(model, optimizer, key), out_shardings=shardings(abstract))
  return make(jax.random.key(seed))


def _fresh(model: RetroConfig, optimizer: optax.GradientTransformation, key: jax.Array
           ) -> TrainState:
  parameters = retro.init_parameters(model, key)
  return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters))


def to_plain(state: TrainState) -> dict[str, Any]:
  """The state as dicts of arrays under stable names: what a checkpoint holds."""
  flat, _ = jax.tree_util.tree_flatten_with_path(state.optimizer)
  return {'step': state.step, 'parameters': dict(state.parameters),
          'optimizer': {jax.tree_util.keystr(path): leaf for path, leaf in flat}}


def from_plain(plain: dict[str, Any], like: TrainState) -> TrainState:
  """The inverse of `to_plain`, in the structure of `like`."""
  flat, structure = jax.tree_util.tree_flatten_with_path(like.optimizer)
  leaves = [plain['optimizer'][jax.tree_util.keystr(path)] for path, _ in flat]
  return TrainState(plain['step'], {name: plain['parameters'][name] for name in like.parameters},
                    jax.tree_util.tree_unflatten(structure, leaves))


def sharding_table(model: RetroConfig, abstract: TrainState) -> str:
  """One line a parameter: shape, logical axes, mesh axes; then the total."""
  axes = retro.parameter_axes(model)
  rows, total = [], 0
  for name, leaf in abstract.parameters.items():
    sharding: NamedSharding = leaf.sharding
    rows.append(f'{name:64s} {str(leaf.shape):24s} {", ".join(axes[name]):32s} {sharding.spec}')
    total += leaf.size
  return '\n'.join([*rows, f'total {total:,} parameters'])
