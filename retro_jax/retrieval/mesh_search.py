"""Brute force on the accelerators: every vector is on a device, every device is asked.

For when a pod is at hand; nothing is built or stored. The matrix product proposes
candidates, their distances are taken again on the host (exact.py), so that answers merge
with those of other parts.
"""

import functools
from typing import Any

import numpy as np

from retro_jax.retrieval.exact import (
  array_blocks,
  check_queries,
  exact_search,
  joined,
  nearest_first,
  product_slack,
  squared_distances,
)

# Candidates beyond k, for what rounding of the product may have swapped.
_SPARE = 16
_QUERY_BLOCK = 1024
_VECTOR_BLOCK = 65536
_RECALL_TARGET = 0.98


def all_devices() -> Any:
  """A mesh over every device of this process."""
  import jax
  devices = jax.local_devices()
  return jax.make_mesh((len(devices),), ('rows',), devices=devices,
                       axis_types=(jax.sharding.AxisType.Auto,))


class MeshSearch:
  """The k nearest of all vectors by one matrix product a device; see `index.Part`."""

  kind = 'mesh'

  def __init__(self, mesh: Any, vectors: Any, approximate: bool = False):
    """Puts the vectors on the devices.

    Args:
      mesh: a jax.sharding.Mesh; all its axes together hold the rows. Every device must
        belong to this process.
      vectors: [n, d0], float16 or float32, by slices and integer arrays; read in blocks.
      approximate: whether each device answers with approx_max_k, faster on a TPU; otherwise
        the answers are those of exact search.
    """
    import jax

    self.size = len(vectors)
    self._vectors, self._approximate = vectors, approximate
    self._mesh = jax.sharding.Mesh(
        mesh.devices.reshape(-1), ('rows',), axis_types=(jax.sharding.AxisType.Auto,))
    self._per_device = max(1, -(-self.size // mesh.devices.size))
    rows, norms = zip(*(self._device_rows(i, device)
                        for i, device in enumerate(self._mesh.devices.flat)))
    self._longest = max((float(np.sqrt(np.max(x, initial=0, where=np.isfinite(x))))
                         for x in map(np.asarray, norms)), default=0.0)
    sharding = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec('rows'))
    total = self._per_device * mesh.devices.size
    self._rows = jax.make_array_from_single_device_arrays(
        (total, vectors.shape[1]), sharding, list(rows))
    self._norms = jax.make_array_from_single_device_arrays((total,), sharding, list(norms))

  def _device_rows(self, number: int, device: Any) -> tuple[Any, Any]:
    """Rows of one device, float32 [per, d0], and their squared lengths: inf beyond the last."""
    import jax
    import jax.numpy as jnp

    first = min(self.size, number * self._per_device)
    last = min(self.size, first + self._per_device)
    padding = self._per_device - (last - first)
    pieces = [jax.device_put(np.asarray(self._vectors[a:min(last, a + _VECTOR_BLOCK)], np.float32),
                             device) for a in range(first, last, _VECTOR_BLOCK)]
    pieces.append(jax.device_put(
        np.zeros((padding, self._vectors.shape[1]), np.float32), device))
    rows = jnp.concatenate(pieces)
    return rows, jnp.sum(rows * rows, -1).at[self._per_device - padding:].set(jnp.inf)

  def search(self, queries: np.ndarray, k: int, effort: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """See `index.Part.search`; `effort` changes nothing."""
    del effort
    queries = check_queries(queries, self._vectors.shape[1])
    return joined([self._search_block(queries[first:first + _QUERY_BLOCK], k)
                   for first in range(0, len(queries), _QUERY_BLOCK)], k)

  def _search_block(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    count = min(self.size, k + _SPARE)
    # Blocks have few different lengths, so that few programs are compiled.
    rows = 1 << (len(queries) - 1).bit_length()
    padded = np.zeros((rows, queries.shape[1]), np.float32)
    padded[:len(queries)] = queries
    scores, ids = (np.asarray(x)[:len(queries)] for x in _candidates(
        self._mesh, count, self._approximate)(padded, self._rows, self._norms))
    ids = np.where(np.isfinite(scores), ids.astype(np.int64), -1)
    distances = squared_distances(queries, self._vectors, ids)
    if not self._approximate and count < self.size:
      # As in exact search: rows whose cut lies within what rounding can have swapped.
      slack = product_slack(queries, self._longest)
      unsafe = np.flatnonzero(scores[:, -1] >= scores[:, min(k, count) - 1] - 2 * slack)
      if len(unsafe):
        ids[unsafe], distances[unsafe] = exact_search(
            queries[unsafe], array_blocks(self._vectors), count)
    ids, distances = nearest_first(ids, distances, k)
    missing = ((0, 0), (0, k - ids.shape[1]))
    return (np.pad(ids, missing, constant_values=-1),
            np.pad(distances, missing, constant_values=np.inf))


@functools.lru_cache(maxsize=32)
def _candidates(mesh: Any, count: int, approximate: bool) -> Any:
  """A jitted function: queries, rows, squared lengths -> scores, row numbers, [q, count].

  A score is 2 q.x - |x|^2, largest for the nearest row; each device names its best rows, of
  which the best of all remain.
  """
  import jax
  import jax.numpy as jnp
  from jax.sharding import PartitionSpec

  def of_device(queries, rows, norms):
    # float32 on every accelerator: the exact answer rests on the rounding of that.
    products = jnp.matmul(queries, rows.T, precision='highest')
    scores = 2 * products - norms
    here = min(count, rows.shape[0])
    if approximate:
      best, columns = jax.lax.approx_max_k(scores, here, recall_target=_RECALL_TARGET)
    else:
      best, columns = jax.lax.top_k(scores, here)
    return best, columns + jax.lax.axis_index('rows') * rows.shape[0]

  @jax.jit
  def candidates(queries, rows, norms):
    by_row = PartitionSpec('rows')
    best, ids = jax.shard_map(
        of_device, mesh=mesh, in_specs=(PartitionSpec(), by_row, by_row),
        out_specs=(PartitionSpec(None, 'rows'),) * 2)(queries, rows, norms)
    best, columns = jax.lax.top_k(best, count)
    return best, jnp.take_along_axis(ids, columns, -1)

  return candidates
