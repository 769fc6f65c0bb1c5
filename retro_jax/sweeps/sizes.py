"""Parameters of a model by kind, from shapes: nothing is allocated. FLOPs are models/flops.py's."""

import functools
import math

import jax

from retro_jax.models import retro
from retro_jax.models.config import RetroConfig


@functools.cache
def count_parameters(config: RetroConfig) -> dict[str, int]:
  """Parameters by kind, adding up to all: matrices, `vectors`, tables of the decoder (READ's own
  and positions included) and of the encoder."""
  shapes = jax.eval_shape(lambda: retro.init_parameters(config, jax.random.key(0)))
  sizes = {name: math.prod(leaf.shape) for name, leaf in shapes.items()}
  tables = ('embedding.table', 'head.table', 'position_embedding.table')
  embedding = sum(sizes.pop(name, 0) for name in tables)
  encoder_embedding = sizes.pop('encoder_embedding.table', 0)
  vectors = sum(size for name, size in sizes.items() if not retro.is_matrix(name))
  return {'non_embedding': sum(sizes.values()) - vectors, 'vectors': vectors,
          'embedding': embedding, 'encoder_embedding': encoder_embedding}
