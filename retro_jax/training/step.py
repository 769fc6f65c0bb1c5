"""Everything that is jitted: the loss, the training step, the evaluation step.

A batch is the dict of arrays that data/features.py makes (tokens [b, n], targets [b, n],
loss_weights [b, n], documents [b, l], text_bytes [b, l], neighbor_tokens [b, l, k, r],
neighbor_mask [b, l, k, r]).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from retro_jax.models import retro
from retro_jax.models.config import RetroConfig
from retro_jax.training import partitioning
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
  tokens = batch['tokens']
  by_token = jnp.repeat(batch['documents'], model.chunk_length, axis=1)
  segments = jnp.where(tokens != 0, by_token + 1, 0)
  neighbors = None
  if retrieval and model.has_retrieval:
    neighbors = retro.Retrieval(batch['neighbor_tokens'], batch['neighbor_mask'])
  logits = retro.apply(model, parameters, tokens, segments, neighbors)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['targets'])
  return losses * batch['loss_weights']


def make_train_step(model: RetroConfig, optimizer: optax.GradientTransformation,
                    learning_rate: optax.Schedule, mesh: Mesh, abstract: TrainState
                    ) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """The jitted step: (state, batch) -> (state, metrics); the old state is donated.

  Metrics, float32 scalars: `loss` in nats a token, `bits_per_byte`, `gradient_norm`
  before clipping, `learning_rate`, `tokens` with a target.
  """

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    targets = jnp.maximum(batch['loss_weights'].sum(), 1.0)

    def mean_loss(parameters: retro.Parameters) -> jax.Array:
      return token_losses(model, parameters, batch, retrieval=True).sum() / targets

    loss, gradient = jax.value_and_grad(mean_loss)(state.parameters)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
    parameters = optax.apply_updates(state.parameters, updates)
    text_bytes = jnp.maximum(batch['text_bytes'].sum(), 1)
    metrics = {
        'loss': loss,
        'bits_per_byte': loss * targets / math.log(2) / text_bytes,
        'gradient_norm': optax.global_norm(gradient),
        'learning_rate': jnp.asarray(learning_rate(state.step), jnp.float32),
        'tokens': targets,
    }
    return TrainState(state.step + 1, parameters, optimizer_state), metrics

  placed = shardings(abstract)
  everywhere = partitioning.replicated(mesh)
  examples = partitioning.batch_sharding(mesh)
  return jax.jit(step, in_shardings=(placed, {name: examples for name in batch_inputs(model)}),
                 out_shardings=(placed, everywhere), donate_argnums=0)


def make_evaluation_step(model: RetroConfig, mesh: Mesh, parameter_shardings: Any, retrieval: bool
                         ) -> Callable[[retro.Parameters, Batch], dict[str, jax.Array]]:
  """The jitted scoring of a batch: (parameters, batch) -> sums by chunk, each [b, l].

  `bits` and number of `tokens` of the targets that the positions of a chunk predict (a
  target is always of the same document as the position that predicts it), and the batch's
  own `documents` and `text_bytes`, so that every process sees all rows.
  """

  def score(parameters: retro.Parameters, batch: Batch) -> dict[str, jax.Array]:
    by_chunk = lambda x: x.reshape(x.shape[0], -1, model.chunk_length).sum(axis=-1)
    losses = token_losses(model, parameters, batch, retrieval)
    return {'bits': by_chunk(losses) / math.log(2), 'tokens': by_chunk(batch['loss_weights']),
            'documents': batch['documents'], 'text_bytes': batch['text_bytes']}

  examples = partitioning.batch_sharding(mesh)
  inputs = {name: examples for name in batch_inputs(model)}
  return jax.jit(score, in_shardings=(parameter_shardings, inputs),
                 out_shardings=partitioning.replicated(mesh))
