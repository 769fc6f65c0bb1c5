"""The one table from logical to mesh axes: where parameters lie, and what it refuses."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from retro_jax.errors import UserError
from retro_jax.training import optimizer, partitioning, state
from retro_jax.training.partitioning import MeshConfig, ShardingRules
from tests import tiny_models

# Sizes that eight devices divide in every way.
CONFIG = tiny_models.tiny(num_layers=5, cca_layers=(2, 4), num_heads=4, encoder_d_model=8,
                          encoder_heads=4, encoder_d_ff=16)


def mesh(data=1, fsdp=1, tensor=1):
  return partitioning.make_mesh(MeshConfig(data, fsdp, tensor),
                                jax.devices()[:data * fsdp * tensor])


def test_mesh_fills_in_the_rest():
  assert dict(partitioning.make_mesh(MeshConfig(2, -1, 2)).shape) == {
      'data': 2, 'fsdp': 2, 'tensor': 2}
  assert dict(partitioning.make_mesh(MeshConfig()).shape) == {'data': 1, 'fsdp': 8, 'tensor': 1}


@pytest.mark.parametrize('sizes', [(3, -1, 1), (-1, -1, 1), (2, 2, 1), (16, 1, 1), (1, -1, 16)])
def test_mesh_that_does_not_use_the_devices_is_refused(sizes):
  with pytest.raises(UserError, match='does not use the 8 devices'):
    partitioning.make_mesh(MeshConfig(*sizes))


def test_unknown_logical_axis_is_refused():
  with pytest.raises(UserError, match=r"w: no sharding rule for logical axis 'embd' "
                                      r"\(did you mean 'embed'\?\)"):
    ShardingRules().spec('w', ('embd', 'mlp'), (8, 8), mesh(fsdp=8))


def test_unknown_mesh_axis_is_refused():
  with pytest.raises(UserError, match=r"ShardingRules.mlp = 'tensr'.*did you mean 'tensor'"):
    ShardingRules(mlp='tensr').spec('w', ('embed', 'mlp'), (8, 8), mesh(fsdp=8))


def test_two_dimensions_on_one_mesh_axis_are_refused():
  with pytest.raises(UserError, match="two dimensions of .* on mesh axis 'fsdp'"):
    ShardingRules(mlp='fsdp').spec('w', ('embed', 'mlp'), (8, 8), mesh(fsdp=8))


def test_size_that_does_not_divide_is_refused():
  with pytest.raises(UserError, match="dimension 'heads' of size 6 does not divide over 4 devices"):
    ShardingRules().spec('w', ('embed', 'heads', 'head_dim'), (8, 6, 2), mesh(fsdp=2, tensor=4))
  with pytest.raises(UserError, match='does not divide'):
    state.abstract_state(tiny_models.tiny(d_model=6), optimizer.make_optimizer(
        optimizer.OptimizerConfig(), 10), ShardingRules(), mesh(fsdp=8))


def abstract():
  rule = optimizer.make_optimizer(optimizer.OptimizerConfig(), 10)
  return state.abstract_state(CONFIG, rule, ShardingRules(), mesh(2, 2, 2))


@pytest.mark.parametrize('name, spec', [
    ('embedding.table', P('tensor', 'fsdp')),
    ('encoder_embedding.table', P('tensor', 'fsdp')),
    ('decoder.entry.attention.attention.query', P('fsdp', 'tensor', None)),
    ('decoder.entry.cca.attention.key', P('fsdp', 'tensor', None)),
    ('decoder.entry.cca.attention.relative', P('fsdp', 'tensor', None)),
    ('decoder.entry.attention.attention.output', P('tensor', None, 'fsdp')),
    ('decoder.entry.attention.attention.content_bias', P('tensor', None)),
    ('decoder.entry.feed_forward.wi', P('fsdp', 'tensor')),
    ('decoder.entry.feed_forward.wo', P('tensor', 'fsdp')),
    ('decoder.norm.scale', P(None)),
    ('decoder.prefix.feed_forward.wi', P(None, 'fsdp', 'tensor')),
    ('decoder.periods.0.retro.cca.attention.value', P(None, 'fsdp', 'tensor', None)),
    ('encoder.layers.0.cross_attention.key', P('fsdp', 'tensor', None)),
])
def test_placement(name, spec):
  assert abstract().parameters[name].sharding.spec == spec


def test_moments_lie_where_their_parameters_lie():
  placed = abstract()
  found = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(placed.optimizer):
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    if names:
      found += 1
      parameter = placed.parameters[names[-1]]
      assert (leaf.shape, leaf.sharding) == (parameter.shape, parameter.sharding)
    else:
      assert leaf.sharding.is_fully_replicated
  assert found == 2 * len(placed.parameters)
  assert placed.step.sharding.is_fully_replicated


def test_table_names_every_parameter():
  lines = state.sharding_table(CONFIG, abstract()).splitlines()
  total = sum(value.size for value in tiny_models.parameters(CONFIG).values())
  assert lines[-1] == f'total {total:,} parameters'
  assert [line.split()[0] for line in lines[:-1]] == list(abstract().parameters)


def test_batches_are_spread_over_data_and_fsdp():
  sharding = partitioning.batch_sharding(mesh(2, 2, 2))
  assert sharding.shard_shape((8, 3)) == (2, 3)
