"""Greedy answers of a model to many questions at a time.

Answers are short, so each token is a full forward pass over the fixed window of a whole batch,
all of them in one compiled loop. Which passages are read is the caller's choice; what answers
are worth is in answer_scores.py.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from retro_jax.data import batches
from retro_jax.data.vocabulary import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from retro_jax.models import placement, retro
from retro_jax.models.config import RetroConfig
from retro_jax.progress import Progress
from retro_jax.training import partitioning


class Answerer:
  """Answers with one model, with passages or without; compiled once for each."""

  def __init__(self, config: RetroConfig, parameters: Mapping[str, jax.Array],
               vocabulary_size: int, mesh: Mesh, batch_size: int, sequence_length: int,
               rules: partitioning.ShardingRules = partitioning.ShardingRules()):
    """
    Args:
      config, parameters: of the model.
      vocabulary_size: ids from here on are never written; neither are pad, bos and unk.
      mesh: rows of a batch lie over data x fsdp.
      batch_size: questions at a time, of all processes together.
      sequence_length: n; an answer ends there at the latest.
      rules: of which the activations are placed.

    Raises:
      UserError: the batch does not divide over the mesh.
    """
    self._config, self._batch_size, self._length = config, batch_size, sequence_length
    self._mesh, self._rows = mesh, batches.rows_of_process(mesh, batch_size)
    self._parameters = jax.device_put(dict(parameters), partitioning.replicated(mesh))
    allowed = np.arange(config.vocab_size) < vocabulary_size
    allowed[[PAD_ID, BOS_ID, UNK_ID]] = False

    def run(parameters: retro.Parameters, batch: Mapping[str, jax.Array]) -> jax.Array:
      with placement.on(rules.activations(mesh)):
        return _greedy(config, parameters, batch, allowed, sequence_length)

    self._run = jax.jit(run, out_shardings=partitioning.replicated(mesh))

  def __call__(self, questions: np.ndarray, passages: np.ndarray | None, label: str = ''
               ) -> np.ndarray:
    """Answers, token by token always the likeliest.

    Args:
      questions: int [q, m], padded on the left.
      passages: int [q, k, r] that each question reads, 0 for padding; None reads nothing and
        skips cross-attention.
      label: for the progress line.

    Returns:
      int32 [q, n - m] without [eos], 0 after the end.
    """
    progress = Progress(f'answer: {label or "questions"}', len(questions), 'questions')
    parts = []
    for first in range(0, len(questions), self._batch_size):
      batch = {'tokens': questions[first:first + self._batch_size]}
      if passages is not None:
        batch['passages'] = passages[first:first + self._batch_size]
      real = len(batch['tokens'])
      padded = {name: np.pad(value.astype(np.int32), [(0, self._batch_size - real)] + [
          (0, 0)] * (value.ndim - 1))[self._rows] for name, value in batch.items()}
      made = self._run(self._parameters, batches.to_global(padded, self._mesh))
      parts.append(np.asarray(made)[:real])
      progress.update(real)
    progress.close()
    return np.concatenate(parts)


def _greedy(config: RetroConfig, parameters: retro.Parameters, batch: Mapping[str, jax.Array],
            allowed: np.ndarray, length: int) -> jax.Array:
  """int32 [b, n - m] for questions [b, m], all of which end with their chunk."""
  m = config.chunk_length
  question = batch['tokens']
  b = len(question)
  model = retro.build(config, parameters)
  retrieval = None
  if 'passages' in batch:
    read = jnp.pad(batch['passages'][:, None], ((0, 0), (0, length // m - 1), (0, 0), (0, 0)))
    retrieval = retro.Retrieval(read, read != PAD_ID)

  def goes_on(state: tuple[jax.Array, ...]) -> jax.Array:
    position, _, ended = state
    return (position < length) & ~ended.all()

  def write(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    position, tokens, ended = state
    hidden = model.hidden(tokens, (tokens != PAD_ID).astype(jnp.int32), retrieval)
    last = jax.lax.dynamic_index_in_dim(hidden, position - 1, axis=1, keepdims=False)
    chosen = jnp.where(allowed, model.read(last), -jnp.inf).argmax(-1).astype(jnp.int32)
    ended |= chosen == EOS_ID
    return position + 1, tokens.at[:, position].set(jnp.where(ended, PAD_ID, chosen)), ended

  tokens = jnp.pad(question, ((0, 0), (0, length - m)))
  start = jnp.asarray(m, jnp.int32), tokens, (question == PAD_ID).all(-1)
  return jax.lax.while_loop(goes_on, write, start)[1][:, m:].reshape(b, length - m)
