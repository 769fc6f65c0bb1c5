"""What decoders of other families have otherwise, against the slow reference and by properties."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from retro_jax.models import flops, retro
from retro_jax.models.config import RetroConfig
from retro_jax.models.positions import scaled_frequencies
from retro_jax.sweeps.sizes import count_parameters
from retro_jax.training import optimizer, partitioning, state, step
from tests import reference, tiny_models
from tests.tiny_models import tiny

# Each switch is in one of these; the first two are what GPT-2 and Llama 3 have.
SWITCHES = {
    'gpt2': dict(positions='learned', max_positions=16, norm='layer', norm_epsilon=1e-2,
                 qkv_bias=True, output_bias=True, ffw_bias=True, scaled_embeddings=False),
    'llama': dict(positions='rotary', rotary_base=50.0, rotary_scaling=(8.0, 1.0, 4.0, 40),
                  num_heads=4, num_kv_heads=2, gated=True, activation='silu', norm_epsilon=0.1,
                  tied_read=False, scaled_embeddings=False, padding_row=False),
    'relative': dict(num_heads=4, num_kv_heads=1, qkv_bias=True, activation='gelu_exact'),
    'mixed': dict(positions='learned', max_positions=20, retrieval_positions='rotary', gated=True,
                  ffw_bias=True, padding_row=False),
    'rotary': dict(positions='rotary', retrieval_positions='relative', qkv_bias=True),
}


def logits_of(config, values, batch):
  run = jax.jit(functools.partial(retro.apply, config))
  return np.asarray(run(values, batch.tokens, batch.segments, batch.retrieval))


def frequency_of(config):
  """Rotary frequencies plane by plane, Llama 3's rule written in wavelengths."""
  def frequency(i, planes):
    plain = config.rotary_base ** (-i / planes)
    if not config.rotary_scaling:
      return plain
    factor, low, high, context = config.rotary_scaling
    wavelength = 2 * math.pi / plain
    if wavelength < context / high:
      return plain
    if wavelength > context / low:
      return plain / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * plain / factor + smooth * plain

  return frequency


@pytest.mark.parametrize('name', SWITCHES)
def test_logits_are_those_of_the_reference(name):
  config = tiny(**SWITCHES[name])
  values = tiny_models.parameters(config)
  batch = tiny_models.batch(config, np.random.default_rng(3), size=1)
  found = logits_of(config, values, batch)[0]
  expected = reference.retro(
      values, batch.tokens[0], batch.segments[0], (batch.neighbors[0], batch.mask[0]),
      m=config.chunk_length, num_layers=config.num_layers, cca_layers=config.cca_layers,
      epsilon=config.norm_epsilon, kind=config.activation, scaled=config.scaled_embeddings,
      first_id=config.first_id, frequency=frequency_of(config))
  real = batch.segments[0] > 0
  np.testing.assert_allclose(found[real, config.first_id:], expected[real], rtol=2e-4, atol=2e-4)
  assert found.shape[1] == config.vocab_size and np.all(found[:, :config.first_id] == -np.inf)


def test_frequencies_of_llama_3():
  """Its published numbers: base 500,000, heads of 128, factor 8 from 8,192 positions."""
  plain = 500_000.0 ** (-np.arange(64) / 64)
  found = scaled_frequencies(plain, (8.0, 1.0, 4.0, 8192))
  config = RetroConfig(positions='rotary', rotary_base=500_000.0, rotary_scaling=(8, 1, 4, 8192))
  expected = [frequency_of(config)(i, 64) for i in range(64)]
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  assert found[0] == plain[0] and found[-1] == plain[-1] / 8
  assert sum((found < plain * 0.999) & (found > plain / 7.99)) > 3  # some lie between


def test_learned_positions_begin_anew_with_each_document():
  """A document gives the same logits wherever in the sequence it stands."""
  config = tiny(positions='learned', max_positions=16).baseline()
  values = tiny_models.parameters(config)
  one = np.random.default_rng(0).integers(1, 32, (1, 8)).astype(np.int32)
  run = jax.jit(functools.partial(retro.apply, config))
  alone = run(values, one, np.ones_like(one), None)
  both = run(values, np.concatenate([one[:, ::-1], one], 1), np.repeat([[1, 2]], 8, 1), None)
  np.testing.assert_allclose(both[:, 8:], alone, rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match='beyond the 16 learned positions'):
    retro.apply(config, values, np.ones((1, 20), int), np.ones((1, 20), int), None)


@pytest.mark.parametrize('kernel', ['blocked', 'dot_product', 'splash'])
@pytest.mark.parametrize('positions', ['rotary', 'learned'])
def test_kernels_agree_on_grouped_heads(kernel, positions):
  maximum = 128 if positions == 'learned' else 0
  config = tiny(num_heads=4, num_kv_heads=2, head_dim=8, positions=positions, num_layers=1,
                cca_layers=(), max_positions=maximum, chunk_length=32,
                attention_block=64 if kernel == 'blocked' else 0)
  values = {k: v * np.float32(0.3) for k, v in tiny_models.parameters(config).items()}
  tokens = np.random.default_rng(1).integers(1, 32, (1, 128)).astype(np.int32)
  segments = np.repeat([[1, 2]], [48, 80], axis=1).astype(np.int32)
  run = lambda name: np.asarray(jax.jit(functools.partial(
      retro.apply, dataclasses.replace(config, attention_kernel=name)))(
          values, tokens, segments, None))
  np.testing.assert_allclose(run(kernel), run('einsum'), rtol=1e-4, atol=1e-4)


def test_loss_is_that_of_the_logits():
  config = tiny(padding_row=False, tied_read=False, loss_block=4, cca_layers=())
  values = tiny_models.parameters(config)
  batch = tiny_models.batch(config, np.random.default_rng(5))
  targets = np.random.default_rng(6).integers(1, config.vocab_size, batch.tokens.shape)
  targets[:, -1] = 0  # where there is none
  weights = (targets != 0).astype(np.float32)
  model = retro.build(config, values)
  logits = logits_of(config, values, batch).astype(np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = -np.where(weights, np.take_along_axis(log_p, targets[..., None], -1)[..., 0], 0)
  losses = model.token_losses(batch.tokens, batch.segments, targets, None)
  np.testing.assert_allclose(losses * weights, expected, rtol=1e-4, atol=1e-4)
  total, gradient = jax.jit(jax.value_and_grad(lambda p: retro.build(config, p).summed_loss(
      batch.tokens, batch.segments, targets, weights, None)))(values)
  assert float(total) == pytest.approx(expected.sum(), rel=1e-4)
  assert all(np.isfinite(leaf).all() for leaf in gradient.values())
  assert np.abs(gradient['head.table']).max() > 0


@pytest.mark.parametrize('changes, match', [
    (dict(num_kv_heads=3, num_heads=4), 'num_kv_heads = 3 does not divide num_heads = 4'),
    (dict(positions='learned'), 'max_positions = 0'),
    (dict(max_positions=8), "positions = 'relative'"),
    (dict(rotary_base=5.0), 'rotary_base and rotary_scaling'),
    (dict(positions='rotary', rotary_scaling=(8.0,)), 'rotary_scaling'),
    (dict(norm='batch'), "norm = 'batch', expected one of"),
    (dict(activation='relu'), "activation = 'relu', expected one of"),
    (dict(retrieval_positions='learned'), "retrieval_positions = 'learned', expected one of"),
    (dict(positions='learned', max_positions=8, retrieval_positions='rotary', head_dim=5),
     'even head_dim')])
def test_what_does_not_go_together_is_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    tiny(**changes)


def test_placement_of_what_is_new():
  config = tiny(num_heads=4, num_kv_heads=2, gated=True, norm='layer', qkv_bias=True,
                output_bias=True, ffw_bias=True, tied_read=False, positions='learned',
                max_positions=16, cca_layers=())
  sizes = lambda tensor: AbstractMesh((1, 2, tensor), partitioning.MESH_AXES,
                                      axis_types=(AxisType.Auto,) * 3)
  rule = optimizer.make_optimizer(optimizer.OptimizerConfig(), 10)
  found = {name: leaf.sharding.spec for name, leaf in state.abstract_state(
      config, rule, partitioning.ShardingRules(), sizes(2)).parameters.items()}
  layer = 'decoder.prefix'
  for name, spec in {
      'head.table': P('tensor', 'fsdp'), 'position_embedding.table': P(None, 'fsdp'),
      f'{layer}.attention.attention.key': P(None, 'fsdp', 'tensor', None),
      f'{layer}.attention.attention.key_bias': P(None, 'tensor', None),
      f'{layer}.attention.attention.output_bias': P(None, None),
      f'{layer}.feed_forward.gate': P(None, 'fsdp', 'tensor'),
      f'{layer}.feed_forward.gate_bias': P(None, 'tensor'),
      f'{layer}.attention.norm.bias': P(None, None)}.items():
    assert found[name] == spec, name
  with pytest.raises(partitioning.UserError, match="'kv_heads' of size 2 does not divide"):
    state.abstract_state(config, rule, partitioning.ShardingRules(), sizes(4))
  rules = partitioning.ShardingRules(kv_heads=None)
  found = state.abstract_state(config, rule, rules, sizes(4)).parameters
  assert found[f'{layer}.attention.attention.value'].sharding.spec == P(None, 'fsdp', None, None)


def test_a_mesh_changes_nothing():
  """One step of a model with everything switched on, whole and cut over 8 devices."""
  config = tiny(num_heads=4, num_kv_heads=2, gated=True, activation='silu', norm='layer',
                qkv_bias=True, output_bias=True, ffw_bias=True, tied_read=False,
                positions='learned', max_positions=16, vocab_size=33, padding_row=False,
                num_layers=2, cca_layers=())
  values = {k: v * np.float32(0.5) for k, v in tiny_models.parameters(config).items()}
  data = tiny_models.batch(config, np.random.default_rng(2), size=4)
  batch = {'tokens': data.tokens, 'targets': np.roll(data.tokens, -1, 1),
           'loss_weights': (np.roll(data.tokens, -1, 1) != 0).astype(np.float32),
           'documents': data.segments.reshape(4, -1, config.chunk_length).max(-1),
           'text_bytes': np.ones((4, 4), np.int32)}

  def losses(*sizes):
    mesh = partitioning.make_mesh(partitioning.MeshConfig(*sizes),
                                  jax.devices()[:math.prod(sizes)])
    rule = optimizer.make_optimizer(optimizer.OptimizerConfig(initial_learning_rate=1e-2), 10)
    abstract = state.abstract_state(config, rule, partitioning.ShardingRules(), mesh)
    placed = {k: jax.device_put(v, abstract.parameters[k].sharding) for k, v in values.items()}
    current = dataclasses.replace(state.init_state(config, rule, 0, abstract), parameters=placed)
    run = step.make_train_step(config, rule, lambda s: 0.0, mesh, abstract)
    found = []
    for _ in range(2):
      current, metrics = run(current, batch)
      found.append(float(metrics['loss']))
    return found

  whole = losses(1, 1, 1)
  np.testing.assert_allclose(losses(2, 2, 2), whole, rtol=2e-5)
  assert whole[1] != whole[0]


def test_flops_and_counts():
  config = tiny(num_heads=4, num_kv_heads=2, positions='rotary').baseline()
  b, n, d, c = 2, 16, config.d_model, config.head_dim
  found = flops.forward_flops(config, b, n)
  # Queries and outputs of 4 heads, keys and values of 2; half the pairs, logits and mixing.
  assert found.attention == 4 * (2 * b * n * d * c * (2 * 4 + 2 * 2) + 2 * b * n * n * 4 * c)
  gated = flops.forward_flops(dataclasses.replace(config, gated=True), b, n)
  assert gated.ffw == 1.5 * found.ffw
  counts = count_parameters(tiny(norm='layer', qkv_bias=True, output_bias=True, ffw_bias=True,
                                 tied_read=False, positions='learned', max_positions=16))
  plain = count_parameters(tiny())
  assert counts['embedding'] == 2 * plain['embedding'] + 16 * 8
  # Without relative positions in 4 self-attentions: a matrix of d x (2 heads of 6) each.
  assert counts['non_embedding'] == plain['non_embedding'] - 4 * 8 * 12
