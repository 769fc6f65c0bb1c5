"""The whole model: tokens and neighbours in, logits out (Algorithm 1).

`Retro` is an NNX module; around it a functional core: `init_parameters` gives a flat
dict of arrays under stable dotted names, `apply` runs the model on such a dict.
Loss, optimizer and sharding are the trainer's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from retro_jax.models import cross_entropy
from retro_jax.models.chunked_cross_attention import attending_mask
from retro_jax.models.config import RetroConfig
from retro_jax.models.decoder import Decoder, Encoded
from retro_jax.models.encoder import NeighborEncoder
from retro_jax.models.for_cpus import stored
from retro_jax.models.layers import Embedding, PositionEmbedding
from retro_jax.models.placement import place
from retro_jax.models.positions import places

Array = jax.Array
Parameters = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Retrieval:
  """RET(C_u) for every chunk of a batch.

  Attributes:
    tokens: int32 [b, l, k, r], neighbour and continuation.
    mask: bool [b, l, k, r], False for padding and for missing neighbours.
  """
  tokens: Array
  mask: Array


class Retro(nnx.Module):
  """RETRO, or its baseline when the config has no CCA layers."""

  def __init__(self, config: RetroConfig, *, rngs: nnx.Rngs):
    self.config = config
    table = functools.partial(Embedding, config.rows, first_id=config.first_id, rngs=rngs)
    self.embedding = table(config.d_model, scaled=config.scaled_embeddings)
    self.decoder = Decoder(config, rngs=rngs)
    self.encoder = NeighborEncoder(config, rngs=rngs) if config.has_retrieval else None
    separate = config.has_retrieval and not config.share_embeddings
    self.encoder_embedding = table(config.encoder_d_model) if separate else None
    self.position_embedding = PositionEmbedding(
        config.max_positions, config.d_model, rngs=rngs) if config.max_positions else None
    self.head = None if config.tied_read else table(config.d_model)

  def __call__(self, tokens: Array, segments: Array, retrieval: Retrieval | None) -> Array:
    """Next-token logits.

    Args:
      tokens: int32 [b, n], n a multiple of m.
      segments: int32 [b, n], equal for tokens of one document, 0 for padding; chunks
        never cross documents.
      retrieval: the neighbours of each chunk, or None for RETRO[OFF].

    Returns:
      float32 [b, n, vocab_size]; position t is about token t+1.

    Raises:
      ValueError: n is no multiple of m, or neighbours do not fit the chunks.
    """
    return self.read(self.hidden(tokens, segments, retrieval))

  def read(self, hidden: Array) -> Array:
    """READ: `hidden` [..., d] -> float32 logits [..., vocab_size]."""
    return self._reader.read(hidden)

  @property
  def _reader(self) -> Embedding:
    return self.embedding if self.head is None else self.head

  def _row(self, targets: Array) -> Array:
    """The row of READ's table for each id; -1 for an id without one."""
    return targets - self.config.first_id if self.config.first_id else targets

  def token_losses(self, tokens: Array, segments: Array, targets: Array,
                   retrieval: Retrieval | None) -> Array:
    """Negative log-likelihood of `targets` [b, n] in nats; float32 [b, n]."""
    hidden = self.hidden(tokens, segments, retrieval)
    return cross_entropy.token_losses(hidden, self._reader.table[...], self._row(targets),
                                      self.config.loss_block)

  def summed_loss(self, tokens: Array, segments: Array, targets: Array, weights: Array,
                  retrieval: Retrieval | None) -> Array:
    """The sum of `token_losses` times `weights` [b, n]: what training differentiates."""
    hidden = self.hidden(tokens, segments, retrieval)
    return cross_entropy.summed_loss(hidden, self._reader.table[...], self._row(targets), weights,
                                     self.config.loss_block)

  def encode(self, retrieval: Retrieval, h: Array, h_mask: Array) -> Array:
    """E [b, l, k, r, d'] of chunks whose H is h [b, l, m, d], where h_mask [b, l, m]."""
    table = self.encoder_embedding or self.embedding
    embedded = place(table(retrieval.tokens, self.config.compute_dtype))
    return self.encoder(embedded, retrieval.mask, h, h_mask)

  def hidden(self, tokens: Array, segments: Array, retrieval: Retrieval | None) -> Array:
    """As `__call__`, but the activations [b, n, d] that READ would be applied to."""
    b, n = tokens.shape
    m = self.config.chunk_length
    if n % m:
      raise ValueError(f'sequence length {n} is no multiple of the chunk length {m}')
    if retrieval is not None and retrieval.tokens.shape[:2] != (b, n // m):
      raise ValueError(f'neighbours of shape {retrieval.tokens.shape} for {b} sequences of '
                       f'{n // m} chunks')
    dtype, segments = self.config.compute_dtype, stored(segments)
    embedded = self.embedding(tokens, dtype)
    if self.position_embedding is not None:
      if n > self.config.max_positions:
        raise ValueError(f'sequence length {n} is beyond the {self.config.max_positions} learned '
                         'positions (RetroConfig.max_positions)')
      embedded += self.position_embedding(places(segments), dtype)

    def encode(h: Array) -> Encoded:
      if retrieval is None:
        return None
      by_chunk = lambda x: x.reshape(b, n // m, m, *x.shape[2:])
      encoded = self.encode(retrieval, by_chunk(h), by_chunk(segments != 0))
      return encoded, stored(attending_mask(segments, retrieval.mask, m))

    return self.decoder(place(embedded), segments, encode)


def init_parameters(config: RetroConfig, key: Array) -> Parameters:
  """Fresh parameters under dotted names; trace it with jax.jit or jax.eval_shape."""
  _, state = nnx.split(Retro(config, rngs=nnx.Rngs(params=key)), nnx.Param)
  return {'.'.join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.pure(state))}


def parameter_axes(config: RetroConfig) -> dict[str, tuple[str, ...]]:
  """The logical axes of each parameter, 'layers' first where layers are stacked."""
  _, state = _abstract(lambda: Retro(config, rngs=nnx.Rngs(params=0)))
  axes = {}
  for path, variable in nnx.to_flat_state(state):
    names = variable.get_metadata()['axes']
    stacked = len(variable.get_value().shape) - len(names)
    axes['.'.join(map(str, path))] = ('layers',) * stacked + tuple(names)
  return axes


def is_matrix(name: str) -> bool:
  """Whether a parameter is a matrix or table; norm scales and biases are vectors."""
  return not name.endswith(('.scale', '.bias', '_bias'))


def build(config: RetroConfig, parameters: Parameters) -> Retro:
  """The module over the given arrays."""
  return filled(lambda: Retro(config, rngs=nnx.Rngs(params=0)), parameters)


def filled(make: Callable[[], nnx.Module], parameters: Parameters) -> Any:
  """The module that `make` makes, over the given arrays instead of fresh ones."""
  structure, state = _abstract(make)
  flat = []
  for path, variable in nnx.to_flat_state(state):
    flat.append((path, variable.replace(parameters['.'.join(map(str, path))])))
  return nnx.merge(structure, nnx.from_flat_state(flat))


def apply(config: RetroConfig, parameters: Parameters, tokens: Array, segments: Array,
          retrieval: Retrieval | None) -> Array:
  """Logits of `Retro` with these parameters; see `Retro.__call__`."""
  return build(config, parameters)(tokens, segments, retrieval)


def _abstract(make: Callable[[], nnx.Module]) -> tuple[Any, Any]:
  return nnx.split(nnx.eval_shape(make), nnx.Param)
