"""How much faster the vectorised longest common substring is than a loop in Python.

  python -m benchmarks.overlap

prints CPU microseconds a pair for both on the same chunks, m = 64 against [N, F] of 128 tokens,
and their ratio. The results must be equal, or it fails.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

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
  rows = list(zip(a[:slow_pairs].tolist(), b[:slow_pairs].tolist()))
  slow, slow_seconds = best_of(lambda: [brute_force(*row) for row in rows])
  slow_seconds /= slow_pairs
  for name, function in (('lengths', lambda: longest_common_substring(a, b)),
                         ('spans', lambda: common_substring_spans(a, b).lengths)):
    lengths, seconds = best_of(function)
    seconds /= pairs
    np.testing.assert_array_equal(lengths[:slow_pairs], [length for length, _, _ in slow])
    print(f'{name}: {seconds * 1e6:.2f} us a pair, Python {slow_seconds * 1e6:.0f} us, '
          f'ratio {slow_seconds / seconds:.0f}')


def best_of(function: Callable[[], Any], times: int = 3) -> tuple[Any, float]:
  """The result and the least CPU seconds of `times` calls, which other processes distort little."""
  seconds = []
  for _ in range(times):
    start = time.process_time()
    result = function()
    seconds.append(time.process_time() - start)
  return result, min(seconds)


if __name__ == '__main__':
  main()
