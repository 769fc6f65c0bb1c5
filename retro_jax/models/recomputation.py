"""What the backward pass recomputes: the policies that RetroConfig.remat names."""

from collections.abc import Callable

import jax
from flax import nnx

# By name of the policy, what is kept of a layer; `query`, ... are marked in attention.py.
_POLICIES = {
    # Fused attention is no product that JAX sees, so what it gave is kept by name.
    'dots': jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names('mixed')),
    'projections': jax.checkpoint_policies.save_only_these_names('query', 'key', 'value', 'mixed'),
    'attention': jax.checkpoint_policies.save_only_these_names('mixed'),
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
