"""What the backward pass recomputes: the policies that RetroConfig.remat names."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

_either = jax.checkpoint_policies.save_from_both_policies
_named = jax.checkpoint_policies.save_only_these_names


def _is_fused(primitive: Any, *unused: Any, **parameters: Any) -> bool:
  """cuDNN's attention, whose backward pass needs sums beside its result; splash names its own."""
  return primitive.name.startswith('dot_product_attention_fwd')


# By name of the policy, what is kept of a layer; `query`, ... are marked in attention.py.
_POLICIES = {
    # Fused attention is no product that JAX sees.
    'dots': _either(_either(jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
                            _named('mixed')), _is_fused),
    'projections': _either(_named('query', 'key', 'value', 'mixed'), _is_fused),
    'attention': _either(_named('mixed'), _is_fused),
    'full': jax.checkpoint_policies.nothing_saveable,
}


def recomputed(module: nnx.Module, remat: str, scanned: bool = False
               ) -> Callable[..., jax.Array]:
  """`module` as a function whose inner values are made again in the backward pass, or itself.

  Args:
    module: a part of the model.
    remat: RetroConfig.remat.
    scanned: called in the body of a scan, whose passes XLA cannot merge anyway.
  """
  if remat == 'none':
    return module
  structure, parameters = nnx.split(module)

  def run(parameters, *arguments):
    return nnx.merge(structure, parameters)(*arguments)

  function = jax.checkpoint(run, policy=_POLICIES[remat], prevent_cse=not scanned)
  return lambda *arguments: function(parameters, *arguments)
