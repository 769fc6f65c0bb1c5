"""Where arrays live: the device mesh and the one table from logical axes to mesh axes.

Parameters name their dimensions (models/layers.py); this file decides what those names
mean on a mesh of `data` x `fsdp` x `tensor`. A name the table lacks, or two dimensions of
one array on the same mesh axis, is an error, never silent replication.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from retro_jax.data.batches import BATCH_SPEC
from retro_jax.errors import UserError, nearest
from retro_jax.models.placement import Placement

MESH_AXES = ('data', 'fsdp', 'tensor')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; one of them may be -1, 'all that are left'.

  Attributes:
    data: replicas of the parameters, each with its own examples.
    fsdp: examples and parameters both sharded (ZeRO-3).
    tensor: heads, feed-forward columns and vocabulary rows sharded.
    unsharded_share: of the parameters, that may lie whole on every device of fsdp x tensor
      before a run refuses to start: more means that a rule is missing.
  """
  data: int = 1
  fsdp: int = -1
  tensor: int = 1
  unsharded_share: float = 0.05


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh over all devices (or those given), with Auto axes.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = [config.data, config.fsdp, config.tensor]
  fixed = math.prod(s for s in sizes if s != -1)
  if sizes.count(-1) == 1 and len(devices) % fixed == 0:
    sizes[sizes.index(-1)] = len(devices) // fixed
  if -1 in sizes or math.prod(sizes) != len(devices):
    raise UserError(f'mesh data x fsdp x tensor = {config.data} x {config.fsdp} x {config.tensor} '
                    f'does not use the {len(devices)} devices; set MeshConfig (one size may be -1)')
  return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """The mesh axis of each logical axis, or None for 'not sharded'."""
  embed: str | None = 'fsdp'
  mlp: str | None = 'tensor'
  heads: str | None = 'tensor'
  kv_heads: str | None = 'tensor'
  head_dim: str | None = None
  vocab: str | None = 'tensor'
  norm: str | None = None
  position: str | None = None
  layers: str | None = None

  def activations(self, mesh: Mesh) -> Placement:
    """Where the model's activations lie: examples and, of each, heads and columns.

    'parameters' is the mesh axis over which gradients are cut (the rule for `embed`).
    """
    return Placement(mesh, {'batch': BATCH_SPEC[0], 'heads': self.heads,
                            'kv_heads': self.kv_heads, 'mlp': self.mlp, 'vocab': self.vocab,
                            'parameters': self.embed},
                     {name.name: getattr(self, name.name) for name in dataclasses.fields(self)})

  def spec(self, name: str, axes: Sequence[str], shape: Sequence[int],
           mesh: Mesh) -> PartitionSpec:
    """The placement of one parameter.

    Raises:
      UserError: an unknown logical or mesh axis, two dimensions on one mesh axis, or a
        dimension that its mesh axis does not divide.
    """
    known = [f.name for f in dataclasses.fields(self)]
    entries: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
      if axis not in known:
        raise UserError(f'{name}: no sharding rule for logical axis {axis!r}{nearest(axis, known)}')
      target = getattr(self, axis)
      if target is not None and target not in mesh.shape:
        raise UserError(f'ShardingRules.{axis} = {target!r}, expected one of {MESH_AXES}'
                        f'{nearest(target, MESH_AXES)}')
      if target is not None and target in entries:
        raise UserError(f'{name}: two dimensions of {tuple(axes)} on mesh axis {target!r}; '
                        'change ShardingRules')
      if target is not None and size % mesh.shape[target]:
        raise UserError(f'{name}: dimension {axis!r} of size {size} does not divide over '
                        f'{mesh.shape[target]} devices of mesh axis {target!r}; change MeshConfig, '
                        f'or leave it whole with ShardingRules.{axis} = None')
      entries.append(target)
    return PartitionSpec(*entries)


def parameter_shardings(
    axes: Mapping[str, Sequence[str]], shapes: Mapping[str, jax.ShapeDtypeStruct],
    rules: ShardingRules, mesh: Mesh) -> dict[str, NamedSharding]:
  """One `NamedSharding` a parameter, by name."""
  return {name: NamedSharding(mesh, rules.spec(name, axes[name], shapes[name].shape, mesh))
          for name in shapes}


def check_sharded(parameters: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh,
                  allowed: float) -> None:
  """Refuses a placement that leaves more than `allowed` of the parameters whole everywhere.

  Raises:
    UserError: it does; names the largest of them.
  """
  if mesh.shape['fsdp'] * mesh.shape['tensor'] == 1:
    return  # nothing to shard over
  whole = {name: leaf.size for name, leaf in parameters.items()
           if leaf.sharding.is_fully_replicated}
  share = sum(whole.values()) / sum(leaf.size for leaf in parameters.values())
  if share > allowed:
    largest = max(whole, key=whole.get)
    raise UserError(
        f'{share:.1%} of the parameters lie whole on every device ({largest} is the largest), '
        f'MeshConfig.unsharded_share allows {allowed:.1%}; give their axes a mesh axis in '
        'ShardingRules, or allow more')


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, BATCH_SPEC)
