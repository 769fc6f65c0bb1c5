"""Parameters of a model and the arithmetic of training it, from shapes: nothing is allocated."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from retro_jax.models import retro
from retro_jax.models.config import RetroConfig


@functools.cache
def count_parameters(config: RetroConfig) -> dict[str, int]:
  """Parameters by kind, adding up to all: matrices, `vectors`, the two embedding tables."""
  shapes = jax.eval_shape(lambda: retro.init_parameters(config, jax.random.key(0)))
  sizes = {name: math.prod(leaf.shape) for name, leaf in shapes.items()}
  embedding = sizes.pop('embedding.table')
  encoder_embedding = sizes.pop('encoder_embedding.table', 0)
  vectors = sum(size for name, size in sizes.items() if name.endswith(('.scale', '_bias')))
  return {'non_embedding': sum(sizes.values()) - vectors, 'vectors': vectors,
          'embedding': embedding, 'encoder_embedding': encoder_embedding}


@functools.cache
def training_flops_per_token(config: RetroConfig, sequence_length: int) -> float:
  """Of the matrix products of one token's forward and backward pass, READ included.

  Counted in the traced model, backward as twice forward; nothing for what is recomputed, as
  that is a choice of the machine and not of the model.
  """
  m, n = config.chunk_length, sequence_length
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  neighbors = None
  if config.has_retrieval:
    shape = (1, n // m, config.num_neighbors, config.retrieved_length)
    neighbors = retro.Retrieval(ints(*shape), jax.ShapeDtypeStruct(shape, jnp.bool_))
  parameters = jax.eval_shape(lambda: retro.init_parameters(config, jax.random.key(0)))
  traced = jax.make_jaxpr(functools.partial(retro.apply, config))(
      parameters, ints(1, n), ints(1, n), neighbors)
  return 3 * _flops(traced.jaxpr) / n


def _flops(jaxpr: Any) -> float:
  """Multiplications and additions of the matrix products in a program."""
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
      total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
      continue
    inner = [_flops(part) for part in _programs(equation.params)]
    times = equation.params['length'] if equation.primitive.name == 'scan' else 1
    # Of the branches of a cond one runs.
    total += max(inner, default=0) if equation.primitive.name == 'cond' else times * sum(inner)
  return total


def _programs(parameters: dict[str, Any]) -> list[Any]:
  """The programs inside an equation."""
  found = []
  for value in parameters.values():
    for item in value if isinstance(value, (tuple, list)) else [value]:
      item = getattr(item, 'jaxpr', item)
      if hasattr(item, 'eqns'):
        found.append(item)
  return found
