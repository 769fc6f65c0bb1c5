"""Tiny models with every parameter random, and sequences with documents, padding and neighbours."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.models import retro
from retro_jax.models.config import RetroConfig

TINY = RetroConfig(
    vocab_size=32, d_model=8, num_layers=4, num_heads=2, head_dim=6, d_ff=16, chunk_length=4,
    cca_layers=(2, 4), encoder_d_model=6, encoder_layers=2, encoder_heads=3, encoder_head_dim=4,
    encoder_d_ff=10)


def tiny(**changes) -> RetroConfig:
  """`TINY` with other fields; r is 2 m unless it is given."""
  return dataclasses.replace(TINY, **{'retrieved_length': 0, **changes})


def parameters(config: RetroConfig, seed: int = 0) -> dict[str, np.ndarray]:
  """Random values of every parameter; biases and norm scales too, fresh ones being 0 and 1."""
  shapes = jax.eval_shape(lambda: retro.init_parameters(config, jax.random.key(0)))
  rng = np.random.default_rng(seed)
  result = {}
  for name, leaf in shapes.items():
    value = rng.normal(size=leaf.shape) * 0.5
    result[name] = np.asarray(value + 1 if name.endswith('.scale') else value, np.float32)
  return result


def randomized(make: Callable[[], nnx.Module], seed: int = 0
               ) -> tuple[nnx.Module, dict[str, np.ndarray]]:
  """A module with every parameter random, and these parameters under dotted names."""
  structure, state = nnx.split(nnx.eval_shape(make))
  rng = np.random.default_rng(seed)
  flat, values = [], {}
  for path, leaf in nnx.to_flat_state(state):
    value = rng.normal(size=leaf.get_value().shape).astype(np.float32) * np.float32(0.5)
    values['.'.join(map(str, path))] = value
    flat.append((path, leaf.replace(jnp.asarray(value))))
  return nnx.merge(structure, nnx.from_flat_state(flat)), values


@dataclasses.dataclass
class Batch:
  """Attributes: tokens, segments [b, n]; neighbors, mask [b, l, k, r]."""
  tokens: np.ndarray
  segments: np.ndarray
  neighbors: np.ndarray
  mask: np.ndarray

  @property
  def retrieval(self) -> retro.Retrieval:
    return retro.Retrieval(self.neighbors, self.mask)

  def copy(self) -> 'Batch':
    return Batch(*(value.copy() for value in dataclasses.astuple(self)))


def pad_left(batch: Batch, lengths: Sequence[int]) -> Batch:
  """A copy in which so many tokens at the beginning of each sequence are padding."""
  changed = batch.copy()
  for row, length in enumerate(lengths):
    changed.tokens[row, :length] = changed.segments[row, :length] = 0
  return changed


def batch(config: RetroConfig, rng: np.random.Generator, *, size: int = 2, chunks: int = 4,
          k: int | None = None, documents: bool = True) -> Batch:
  """Random sequences of whole chunks.

  With `documents`, chunks belong to a few documents whose last chunk may be padded, empty
  chunks may end a sequence, and neighbours may be short or missing. Without, there is one
  document and every retrieved token is real.
  """
  m, r, k = config.chunk_length, config.retrieved_length, k or config.num_neighbors
  tokens = rng.integers(1, config.vocab_size, (size, chunks * m))
  segments = np.ones((size, chunks * m), int)
  neighbors = rng.integers(1, config.vocab_size, (size, chunks, k, r))
  mask = np.ones(neighbors.shape, bool)
  if documents:
    for b in range(size):
      document = 1
      for u in range(chunks):
        here = slice(u * m, (u + 1) * m)
        segments[b, here] = document
        if rng.random() < 0.35:  # the document ends here, perhaps short of the chunk
          segments[b, u * m + rng.integers(1, m + 1):(u + 1) * m] = 0
          document += 1
      if rng.random() < 0.3:
        segments[b, -m:] = 0
    lengths = rng.choice([0, r, r, rng.integers(1, r)], (size, chunks, k))
    mask = np.arange(r) < lengths[..., None]
  tokens[segments == 0] = 0
  neighbors[~mask] = 0
  return Batch(tokens.astype(np.int32), segments.astype(np.int32), neighbors.astype(np.int32), mask)
