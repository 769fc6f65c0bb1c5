"""The step: the same on one device and on eight in any mesh; its loss; AdamW in NumPy."""

import dataclasses
import functools
import math

import jax
import numpy as np
import optax
import pytest

from retro_jax.data import batches
from retro_jax.training import optimizer, partitioning, state, step
from retro_jax.training.optimizer import OptimizerConfig
from retro_jax.training.partitioning import MeshConfig, ShardingRules
from tests import reference, tiny_models

CONFIG = tiny_models.tiny(num_layers=2, cca_layers=(1,), num_heads=4, encoder_d_model=8,
                          encoder_heads=4, encoder_d_ff=16, encoder_layers=1)
BATCH_SIZE = 8
STEPS = 3


def batch_of(seed):
  """A batch as data/features.py makes it."""
  rng = np.random.default_rng(seed)
  made = tiny_models.batch(CONFIG, rng, size=BATCH_SIZE, chunks=3)
  m = CONFIG.chunk_length
  targets = np.zeros_like(made.tokens)
  same = made.segments[:, 1:] == made.segments[:, :-1]
  targets[:, :-1] = np.where(same, made.tokens[:, 1:], 0)
  documents = made.segments[:, ::m] - 1
  return {'tokens': made.tokens, 'targets': targets,
          'loss_weights': (targets != 0).astype(np.float32), 'documents': documents,
          'text_bytes': rng.integers(1, 20, documents.shape).astype(np.int32),
          'neighbor_tokens': made.neighbors, 'neighbor_mask': made.mask}


def keep_gradient():
  """Plain gradient descent whose state is the gradient just seen."""
  return optax.chain(optax.trace(decay=0.0), optax.scale(-0.05))


@functools.cache
def train(sizes, microbatches=1, **changes):
  """Losses, gradient of each step, final parameters: `STEPS` real steps on such a mesh."""
  config = dataclasses.replace(CONFIG, **changes)
  mesh = partitioning.make_mesh(MeshConfig(*sizes), jax.devices()[:math.prod(sizes)])
  rule = keep_gradient()
  abstract = state.abstract_state(config, rule, ShardingRules(), mesh)
  parameters = tiny_models.parameters(config)
  host = state.TrainState(np.zeros((), np.int32), parameters, rule.init(parameters))
  current = jax.device_put(host, state.shardings(abstract))
  train_step = step.make_train_step(config, rule, lambda count: 0.05, mesh, abstract,
                                    microbatches=microbatches)
  losses, gradients = [], []
  for number in range(STEPS):
    current, metrics = train_step(current, batches.to_global(batch_of(number), mesh))
    sums = np.asarray(metrics.pop('sums'))
    losses.append({name: float(value) for name, value in metrics.items()})
    assert sums.shape == (3, len(parameters)) and np.isfinite(sums).all()
    gradients.append(jax.device_get(current.optimizer[0].trace))
  assert int(current.step) == STEPS
  placed = {name: leaf.sharding for name, leaf in current.parameters.items()}
  assert placed == {name: leaf.sharding for name, leaf in abstract.parameters.items()}
  return losses, gradients, jax.device_get(current.parameters)


@pytest.mark.parametrize('sizes, changes', [
    ((8, 1, 1), {}), ((1, 8, 1), dict(loss_block=5)), ((2, 2, 2), dict(remat='full')),
    ((1, 4, 2), dict(remat='dots', attention_block=5, scan_layers=False)),
    ((2, 2, 1), dict(remat='attention', microbatches=2)),
    ((2, 1, 2), dict(remat='projections', attention_kernel='einsum', microbatches=4))],
    ids=['data8', 'fsdp8', 'data2-fsdp2-tensor2-remat-full', 'fsdp4-tensor2-remat-dots',
         'data2-fsdp2-microbatches2', 'data2-tensor2-microbatches4'])
def test_many_devices_equal_one(sizes, changes):
  """Whatever is recomputed, cut into blocks or accumulated: none may change the result."""
  losses, gradients, parameters = train((1, 1, 1))
  losses_8, gradients_8, parameters_8 = train(sizes, **changes)
  for one, eight in zip(losses, losses_8, strict=True):
    assert eight == pytest.approx(one, rel=1e-5)
  assert losses[0]['loss'] != pytest.approx(losses[1]['loss'], rel=1e-3)
  for one, eight in zip(gradients, gradients_8, strict=True):
    largest = max(np.abs(value).max() for value in one.values())
    for name in one:
      np.testing.assert_allclose(eight[name], one[name], rtol=1e-4, atol=1e-5 * largest,
                                 err_msg=name)
  for name in parameters:
    np.testing.assert_allclose(parameters_8[name], parameters[name], rtol=1e-4, atol=1e-5,
                               err_msg=name)


def test_loss_and_metrics_equal_the_reference():
  losses, gradients, _ = train((1, 1, 1))
  batch, parameters = batch_of(0), tiny_models.parameters(CONFIG)
  nats = 0.0
  for b in range(BATCH_SIZE):
    documents = np.where(batch['tokens'][b] != 0, np.repeat(batch['documents'][b], 4) + 1, 0)
    logits = reference.retro(
        parameters, batch['tokens'][b], documents,
        (batch['neighbor_tokens'][b], batch['neighbor_mask'][b]), m=CONFIG.chunk_length,
        num_layers=CONFIG.num_layers, cca_layers=CONFIG.cca_layers)
    for t, target in enumerate(batch['targets'][b]):
      if target:
        nats += np.log(np.exp(logits[t]).sum()) - logits[t, target]
  count = batch['loss_weights'].sum()
  assert losses[0]['loss'] == pytest.approx(nats / count, rel=1e-5)
  assert losses[0]['tokens'] == count
  assert losses[0]['bits_per_byte'] == pytest.approx(
      nats / math.log(2) / batch['text_bytes'].sum(), rel=1e-5)
  squares = sum((np.asarray(g, np.float64) ** 2).sum() for g in gradients[0].values())
  assert losses[0]['gradient_norm'] == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_gradient_equals_finite_differences():
  _, gradients, _ = train((1, 1, 1))
  batch, parameters = batch_of(0), tiny_models.parameters(CONFIG)
  loss = jax.jit(lambda p: step.token_losses(CONFIG, p, batch, True).sum()
                 / batch['loss_weights'].sum())
  rng = np.random.default_rng(0)
  for name in ('embedding.table', 'encoder_embedding.table', 'decoder.entry.cca.attention.relative',
               'encoder.layers.0.cross_attention.value', 'decoder.entry.attention.norm.scale',
               'decoder.tail.attention.attention.position_bias'):
    direction = rng.choice([-1.0, 1.0], parameters[name].shape).astype(np.float32)
    h = 2e-3
    change = [float(loss(parameters | {name: parameters[name] + s * h * direction}))
              for s in (1, -1)]
    expected = float((gradients[0][name] * direction).sum())
    assert (change[0] - change[1]) / (2 * h) == pytest.approx(expected, rel=2e-2, abs=2e-3), name


def learning_rate(config, count, total):
  """C.1 in plain words: linear up, then half a cosine down to the final fraction at `total`."""
  if count < config.warmup_steps:
    part = count / config.warmup_steps
    return config.initial_learning_rate + part * (
        config.peak_learning_rate - config.initial_learning_rate)
  part = min((count - config.warmup_steps) / (total - config.warmup_steps), 1)
  low = config.final_fraction * config.peak_learning_rate
  return low + (config.peak_learning_rate - low) * (1 + math.cos(math.pi * part)) / 2


def test_schedule():
  config = OptimizerConfig(peak_learning_rate=2e-4, warmup_steps=750)
  schedule = optimizer.schedule(config, 10_000)
  for count in (0, 1, 375, 749, 750, 751, 5000, 9999, 10_000, 20_000):
    assert float(schedule(count)) == pytest.approx(learning_rate(config, count, 10_000), rel=1e-5)
  assert float(schedule(0)) == pytest.approx(1e-7) and float(schedule(750)) == pytest.approx(2e-4)
  assert float(schedule(10_000)) == pytest.approx(2e-5)


def test_schedule_of_a_run_shorter_than_its_warm_up():
  schedule = optimizer.schedule(OptimizerConfig(warmup_steps=750), 1)
  assert math.isfinite(float(schedule(0)))
  schedule = optimizer.schedule(OptimizerConfig(warmup_steps=750), 20)
  assert float(schedule(19)) == pytest.approx(2e-4)


@pytest.mark.parametrize('size', [0.01, 30.0], ids=['unclipped', 'clipped'])
def test_adamw_equals_numpy(size):
  config = OptimizerConfig(peak_learning_rate=0.02, warmup_steps=3, clip_norm=1.0)
  total = 7
  rng = np.random.default_rng(0)
  shapes = {'layer.wi': (3, 4), 'layer.norm.scale': (4,), 'layer.content_bias': (2, 2),
            'layer.position_bias': (2, 2), 'embedding.table': (5, 3)}
  parameters = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  expected = {name: value.astype(np.float64) for name, value in parameters.items()}
  first = {name: np.zeros(shape) for name, shape in shapes.items()}
  second = {name: np.zeros(shape) for name, shape in shapes.items()}
  rule = optimizer.make_optimizer(config, total)
  moments = rule.init(parameters)
  update = jax.jit(rule.update)
  for count in range(total):
    gradient = {name: (rng.normal(size=shape) * size).astype(np.float32)
                for name, shape in shapes.items()}
    updates, moments = update(gradient, moments, parameters)
    parameters = optax.apply_updates(parameters, updates)

    norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
    assert (norm > config.clip_norm) == (size > 1)
    for name, g in gradient.items():
      g = g.astype(np.float64) * min(1.0, config.clip_norm / norm)
      first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
      second[name] = config.beta2 * second[name] + (1 - config.beta2) * g * g
      move = (first[name] / (1 - config.beta1 ** (count + 1))
              / (np.sqrt(second[name] / (1 - config.beta2 ** (count + 1))) + config.epsilon))
      if name in ('layer.wi', 'embedding.table'):  # scales and biases do not decay
        move = move + config.weight_decay * expected[name]
      expected[name] = expected[name] - learning_rate(config, count, total) * move
    for name in shapes:
      np.testing.assert_allclose(parameters[name], expected[name], rtol=1e-5, atol=1e-6,
                                 err_msg=f'{name} after step {count}')


@pytest.mark.parametrize('sizes', [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)],
                         ids=lambda sizes: 'x'.join(map(str, sizes)))
def test_every_device_computes_its_share_and_no_more(sizes):
  """Decoder, CCA and encoder alike: XLA's count of one device's FLOPs is an eighth of one's own."""
  config = dataclasses.replace(
      CONFIG, d_model=64, head_dim=16, d_ff=256, encoder_d_model=64, encoder_head_dim=16,
      encoder_d_ff=256, vocab_size=512, positions='rotary')

  def flops(sizes):
    mesh = partitioning.make_mesh(MeshConfig(*sizes), jax.devices()[:math.prod(sizes)])
    rule = optax.sgd(0.1)
    abstract = state.abstract_state(config, rule, ShardingRules(), mesh)
    train_step = step.make_train_step(config, rule, lambda count: 0.1, mesh, abstract)
    examples = partitioning.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=examples)
             for name, x in batch_of(0).items() if name in step.batch_inputs(config)}
    return train_step.lower(abstract, batch).compile().cost_analysis()['flops']

  assert flops(sizes) / flops((1, 1, 1)) == pytest.approx(1 / 8, rel=0.15)


def test_depth_does_not_make_the_program_longer():
  """Layers are scanned: 30 layers in the pattern 6, 9, 12, ... are written as 12 are."""
  def operations(layers, **changes):
    config = dataclasses.replace(CONFIG, num_layers=layers, remat='full', **changes,
                                 cca_layers=tuple(range(6, layers + 1, 3)))
    mesh = partitioning.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    rule = optimizer.make_optimizer(OptimizerConfig(), 10)
    abstract = state.abstract_state(config, rule, ShardingRules(), mesh)
    train_step = step.make_train_step(config, rule, lambda count: 0.1, mesh, abstract)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype)
             for name, x in batch_of(0).items() if name in step.batch_inputs(config)}
    return len(train_step.lower(abstract, batch).as_text().splitlines())

  assert operations(30) == pytest.approx(operations(12), rel=0.01)
  # Equal functions are written once, but called by each layer.
  assert operations(30, scan_layers=False) > 1.05 * operations(12, scan_layers=False)
