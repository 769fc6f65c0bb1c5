"""How much faster the vectorised longest common substring is than a loop in Python.

  python -m benchmarks.overlap

prints microseconds a pair for both on the same chunks, m = 64 against [N, F] of 128 tokens,
and their ratio. The results must be equal, or it fails.
"""

import time
from collections.abc import Sequence

import numpy as np

from retro_jax.retrieval.overlap import common_substring_spans, longest_common_substring


def brute_force(a: Sequence[int], b: Sequence[int]) -> tuple[int, int, int]:
  """Length and starts of the longest common substring of one pair, row after row.

  The textbook table of runs, on lists; token 0 matches nothing. The first in `a`, then in `b`.
  """
  best = (0, 0, 0)
  previous = [0] * (len(b) + 1)
  for i, token in enumerate(a):
    current = [0] * (len(b) + 1)
    if token:
      for j, other in enumerate(b):
        if token == other:
          length = current[j + 1] = previous[j] + 1
          if length > best[0]:
            best = (length, i + 1 - length, j + 1 - length)
    previous = current
  return best


def main() -> None:
  """Times both on random chunks of which a third have a copied part."""
  rng = np.random.default_rng(0)
  pairs, slow_pairs = 20000, 400
  a = rng.zipf(1.2, (pairs, 64)) % 32000
  b = rng.zipf(1.2, (pairs, 128)) % 32000
  b[::3, 40:80] = a[::3, 10:50]
  start = time.perf_counter()
  slow = [brute_force(x, y) for x, y in zip(a[:slow_pairs].tolist(), b[:slow_pairs].tolist())]
  seconds_slow = (time.perf_counter() - start) / slow_pairs
  for name, function in (('lengths', longest_common_substring), ('spans', common_substring_spans)):
    start = time.perf_counter()
    fast = function(a, b)
    seconds = (time.perf_counter() - start) / pairs
    lengths = fast if name == 'lengths' else fast.lengths
    np.testing.assert_array_equal(lengths[:slow_pairs], [length for length, _, _ in slow])
    print(f'{name}: {seconds * 1e6:.2f} us a pair, Python {seconds_slow * 1e6:.0f} us, '
          f'ratio {seconds_slow / seconds:.0f}')


if __name__ == '__main__':
  main()
