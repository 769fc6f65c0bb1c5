"""Everything that is jitted: the loss, the training step, the evaluation step.

A batch is the dict of arrays that data/features.py makes (tokens [b, n], targets [b, n],
loss_weights [b, n], documents [b, l], text_bytes [b, l], neighbor_tokens [b, l, k, r],
neighbor_mask [b, l, k, r]).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from retro_jax.models import for_cpus, placement, retro
from retro_jax.models.config import RetroConfig
from retro_jax.training import gradients, partitioning
from retro_jax.training.compiler import CompilerConfig
from retro_jax.training.partitioning import ShardingRules
from retro_jax.training.spikes import SpikeState
from retro_jax.training.state import TrainState, shardings

Batch = Mapping[str, jax.Array]
# What the steps read of a batch; the rest (ids, for people) stays on the host.
MODEL_INPUTS = ('tokens', 'targets', 'loss_weights', 'documents', 'text_bytes')
RETRIEVAL_INPUTS = ('neighbor_tokens', 'neighbor_mask')


def batch_inputs(model: RetroConfig) -> tuple[str, ...]:
  """Names of the batch's arrays that the steps of this model take."""
  return MODEL_INPUTS + (RETRIEVAL_INPUTS if model.has_retrieval else ())


def token_losses(model: RetroConfig, parameters: retro.Parameters, batch: Batch,
                 retrieval: bool) -> jax.Array:
  """Negative log-likelihood in nats of each target, 0 where there is none; float32 [b, n]."""
  losses = retro.build(model, parameters).token_losses(
      batch['tokens'], _segments(model, batch), batch['targets'],
      _neighbors(model, batch) if retrieval else None)
  return losses * batch['loss_weights']


def summed_loss(model: RetroConfig, parameters: retro.Parameters, batch: Batch) -> jax.Array:
  """The sum of `token_losses` with retrieval, cheaper to differentiate."""
  return retro.build(model, parameters).summed_loss(
      batch['tokens'], _segments(model, batch), batch['targets'], batch['loss_weights'],
      _neighbors(model, batch))


def _segments(model: RetroConfig, batch: Batch) -> jax.Array:
  by_token = jnp.repeat(batch['documents'], model.chunk_length, axis=1)
  return jnp.where(batch['tokens'] != 0, by_token + 1, 0)


def _neighbors(model: RetroConfig, batch: Batch) -> retro.Retrieval | None:
  if not model.has_retrieval:
    return None
  return retro.Retrieval(batch['neighbor_tokens'], batch['neighbor_mask'])


def make_train_step(
    model: RetroConfig, optimizer: optax.GradientTransformation, learning_rate: optax.Schedule,
    mesh: Mesh, abstract: TrainState, rules: ShardingRules = ShardingRules(),
    microbatches: int = 1, compiler: CompilerConfig = CompilerConfig(),
    trained: Collection[str] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """The jitted step: (state, batch) -> (state, metrics); the old state is donated.

  Metrics, float32 scalars: `loss` in nats a token, `bits_per_byte`, `gradient_norm`
  before clipping, `learning_rate`, `tokens` with a target, `batch_hash` (uint32: two runs that
  saw the same batch, row by row, have the same, on whatever mesh), and `skipped_steps` of an
  optimizer that skips spikes. Beside them, for the watch on numbers that are no numbers
  (training/faults.py): `sums`, float32 [3, parameters], parameter by parameter the sums of the
  gradient's squares, of the updates and of the new values; each as bad as one of its terms.

  Args:
    model, optimizer, learning_rate: of the run.
    mesh, abstract: the devices, and the state's shapes and shardings on them.
    rules: of which the activations are placed.
    microbatches: parts of the batch that are computed one after the other, for memory; the
      gradient is that of the whole.
    compiler: options for XLA, used on TPUs.
    trained: names of the parameters that `optimizer` has a state for; None for all. The others
      leave the step as they entered it, and no gradient of theirs is computed.
  """

  def loss_and_gradient(parameters: retro.Parameters, frozen: retro.Parameters, batch: Batch):
    run = jax.value_and_grad(lambda p, part: summed_loss(model, {**frozen, **p}, part))
    if microbatches == 1:
      return run(parameters, batch)

    def add(total, part):
      return jax.tree.map(jnp.add, total, run(parameters, part)), None

    zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, parameters)
    return jax.lax.scan(add, zero, _microbatches(batch, microbatches, mesh))[0]

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    learning = {name: state.parameters[name] for name in names}
    frozen = {name: leaf for name, leaf in state.parameters.items() if name not in learning}
    with placement.on(rules.activations(mesh)):
      total, gradient = loss_and_gradient(learning, frozen, batch)
      # Before anything reads it, or XLA may do that to the whole on every device.
      gradient = jax.lax.with_sharding_constraint(
          gradient, {name: placed.parameters[name] for name in names})
      targets = jnp.maximum(batch['loss_weights'].sum(), 1.0)
      loss, gradient = total / targets, jax.tree.map(lambda g: g / targets, gradient)
      updates, optimizer_state = optax.with_extra_args_support(optimizer).update(
          gradient, state.optimizer, learning, value=loss)
      parameters = {**state.parameters, **optax.apply_updates(learning, updates)}
      order = sorted(parameters)
      squares = _by_name(order, learning, lambda name: gradients.squares(gradient[name]))
      changes = _by_name(order, learning, lambda name: for_cpus.total_change(
          updates[name], learning[name], parameters[name]))
      values = _by_name(order, parameters, lambda name: for_cpus.total(parameters[name]))
    text_bytes = jnp.maximum(batch['text_bytes'].sum(), 1)
    metrics = {
        'loss': loss,
        'bits_per_byte': loss * targets / math.log(2) / text_bytes,
        'gradient_norm': jnp.sqrt(squares.sum()),
        'learning_rate': jnp.asarray(learning_rate(state.step), jnp.float32),
        'tokens': targets,
        'batch_hash': _hash(batch),
        'sums': jnp.stack([squares, changes, values]),
    }
    if isinstance(optimizer_state, SpikeState):
      metrics['skipped_steps'] = optimizer_state.skipped.astype(jnp.float32)
    return TrainState(state.step + 1, parameters, optimizer_state), metrics

  placed = shardings(abstract)
  names = [name for name in abstract.parameters if trained is None or name in trained]
  everywhere = partitioning.replicated(mesh)
  examples = partitioning.batch_sharding(mesh)
  return jax.jit(step, in_shardings=(placed, {name: examples for name in batch_inputs(model)}),
                 out_shardings=(placed, everywhere), donate_argnums=0,
                 compiler_options=compiler.on(mesh))


def _hash(batch: Batch) -> jax.Array:
  """A sum modulo 2^32 in which every token counts by its place; exact in any order."""
  total = jnp.zeros((), jnp.uint32)
  for name in ('tokens', 'neighbor_tokens'):
    if name in batch:
      x = batch[name].astype(jnp.uint32) + jnp.uint32(1)
      for axis in range(x.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        x = (x ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA77)
      total += x.sum(dtype=jnp.uint32)
  return total


def _by_name(names: Sequence[str], known: Collection[str], summed: Callable[[str], jax.Array]
             ) -> jax.Array:
  """A scalar for every name, `summed` of it; 0 for what is not known."""
  zero = jnp.zeros((), jnp.float32)
  return jnp.stack([summed(name) if name in known else zero for name in names])


def _microbatches(batch: Batch, count: int, mesh: Mesh) -> dict[str, jax.Array]:
  """Arrays [b, ...] as [count, b / count, ...], each device cutting its own examples."""
  examples = partitioning.batch_sharding(mesh).spec

  def cut(x: jax.Array) -> jax.Array:
    parts = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
    return jax.lax.with_sharding_constraint(parts, jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(None, *examples)))

  return {name: cut(x) for name, x in batch.items()}


def make_evaluation_step(model: RetroConfig, mesh: Mesh, parameter_shardings: Any, retrieval: bool,
                         rules: ShardingRules = ShardingRules()
                         ) -> Callable[[retro.Parameters, Batch], dict[str, jax.Array]]:
  """The jitted scoring of a batch: (parameters, batch) -> sums by chunk, each [b, l].

  `bits` and number of `tokens` of the targets that the positions of a chunk predict (a
  target is always of the same document as the position that predicts it), and the batch's
  own `documents` and `text_bytes`, so that every process sees all rows.
  """

  def score(parameters: retro.Parameters, batch: Batch) -> dict[str, jax.Array]:
    by_chunk = lambda x: x.reshape(x.shape[0], -1, model.chunk_length).sum(axis=-1)
    with placement.on(rules.activations(mesh)):
      losses = token_losses(model, parameters, batch, retrieval)
    return {'bits': by_chunk(losses) / math.log(2), 'tokens': by_chunk(batch['loss_weights']),
            'documents': batch['documents'], 'text_bytes': batch['text_bytes']}

  examples = partitioning.batch_sharding(mesh)
  inputs = {name: examples for name in batch_inputs(model)}
  return jax.jit(score, in_shardings=(parameter_shardings, inputs),
                 out_shardings=partitioning.replicated(mesh))


def scoring_inputs(retrieval: bool) -> tuple[str, ...]:
  """Names of the batch's arrays that the scoring of tokens takes."""
  return ('tokens', 'targets', 'loss_weights', 'documents') + (
      RETRIEVAL_INPUTS if retrieval else ())


def make_token_step(model: RetroConfig, mesh: Mesh, parameter_shardings: Any, retrieval: bool,
                    rules: ShardingRules = ShardingRules()
                    ) -> Callable[[retro.Parameters, Batch], jax.Array]:
  """The jitted scoring of single tokens: (parameters, batch) -> bits, float32 [b, n].

  The batch is one of `scoring_inputs`. Bits of each position's target, 0 where its
  loss_weights are; every process sees all rows. It is what evaluation/token_scores.py keeps,
  while `make_evaluation_step` sums where only a sum is wanted.
  """

  def score(parameters: retro.Parameters, batch: Batch) -> jax.Array:
    with placement.on(rules.activations(mesh)):
      return token_losses(model, parameters, batch, retrieval) / math.log(2)

  examples = partitioning.batch_sharding(mesh)
  inputs = {name: examples for name in scoring_inputs(retrieval)}
  return jax.jit(score, in_shardings=(parameter_shardings, inputs),
                 out_shardings=partitioning.replicated(mesh))
