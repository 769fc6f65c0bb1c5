"""Shuffling without a list: where item i goes is computed, in O(1), for any i.

A Feistel network over the smallest even number of bits that holds `size`, walked along
its cycle until it falls inside. The order of training examples and the choice of random
neighbours rest on it, so its values must never change.
"""

from typing import Any

import numpy as np

_ROUNDS = 6


def mix(values: Any) -> np.ndarray:
  """A good 64-bit hash of uint64 values, elementwise (the finaliser of SplitMix64)."""
  with np.errstate(over='ignore'):
    x = np.asarray(values, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*parts: Any) -> np.ndarray:
  """One uint64 key from integers or integer arrays (broadcast); every part matters."""
  result = np.uint64(0)
  for part in parts:
    result = mix(np.bitwise_xor(mix(np.asarray(part).astype(np.int64).view(np.uint64)), result))
  return result


def permute(positions: Any, size: int, keys: Any) -> np.ndarray:
  """The images of `positions` under the permutation of range(size) that `keys` names.

  Args:
    positions: integers in [0, size), any shape.
    size: how many items there are, at least 1.
    keys: uint64, broadcast against `positions`; each key is another permutation.

  Returns:
    int64 of the broadcast shape.
  """
  positions, keys = np.broadcast_arrays(
      np.asarray(positions, np.int64), np.asarray(keys, np.uint64))
  if positions.size and (positions.min() < 0 or positions.max() >= size):
    raise IndexError(f'positions {positions.min()}..{positions.max()} in a permutation of {size}')
  half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
  mask = np.uint64((1 << int(half)) - 1)
  values = positions.astype(np.uint64).ravel()
  keys = keys.ravel()
  todo = np.arange(values.size)
  while todo.size:
    left, right = values[todo] >> half, values[todo] & mask
    for i in range(_ROUNDS):
      scrambled = mix(right ^ mix(keys[todo] ^ np.uint64(i * 0x10001)))
      left, right = right, left ^ ((scrambled >> np.uint64(20)) & mask)
    values[todo] = (left << half) | right
    todo = todo[values[todo] >= size]
  return values.astype(np.int64).reshape(positions.shape)
