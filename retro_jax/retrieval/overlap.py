"""Tokens that two chunks have in common: longest common substring and prefix.

The paper (section 2.6) calls an evaluation chunk leaked by how long a token substring it
shares with its neighbours. Here are the lengths, and where they lie, for many pairs at once;
what follows from them is decided in policies.py and shown by the inspector and evaluation.
"""

from typing import NamedTuple

import numpy as np

# Tokens of the pairs that are compared at a time: some 20 MB of tables. Fewer would fit a
# core's cache, but then the many short rows of each step cost more than the cache saves.
_TOKENS_AT_ONCE = 1 << 19


class Spans(NamedTuple):
  """The longest common substring of each pair.

  Attributes:
    lengths: in tokens, int32 [p] or [p, k].
    a_starts: where it begins in a, int32, of the same shape; 0 where the length is 0.
    b_starts: where it begins in b.
  """

  lengths: np.ndarray
  a_starts: np.ndarray
  b_starts: np.ndarray


def longest_common_substring(
    a: np.ndarray, b: np.ndarray, a_lengths: np.ndarray | None = None,
    b_lengths: np.ndarray | None = None) -> np.ndarray:
  """How long a run of tokens each pair shares.

  Args:
    a: token ids, int [p, m]. Ids below 1 are padding and match nothing, not even each other.
    b: token ids, int [p, r], or [p, k, r] for k partners of each row of `a`.
    a_lengths: how many tokens of each row count, int [p]; None for all.
    b_lengths: likewise, int [p] or [p, k].

  Returns:
    int32 [p] or [p, k], 0 where no token is shared. Time is p k m r steps of a vectorised
    loop; memory beside arguments and result does not grow with p or k.
  """
  return _in_blocks(_longest, 1, a, b, a_lengths, b_lengths)[0]


def common_substring_spans(
    a: np.ndarray, b: np.ndarray, a_lengths: np.ndarray | None = None,
    b_lengths: np.ndarray | None = None) -> Spans:
  """As `longest_common_substring`, with where it lies.

  Of several of the same length the one that begins first in `a`, and of its places in `b` the
  first.
  """
  return Spans(*_in_blocks(_longest_with_starts, 3, a, b, a_lengths, b_lengths))


def longest_common_prefix(
    a: np.ndarray, b: np.ndarray, a_lengths: np.ndarray | None = None,
    b_lengths: np.ndarray | None = None) -> np.ndarray:
  """With how many equal tokens each pair begins: int32; arguments as of the substring."""
  return _in_blocks(_prefix, 1, a, b, a_lengths, b_lengths)[0]


def _in_blocks(function, outputs: int, a: np.ndarray, b: np.ndarray,
               a_lengths: np.ndarray | None, b_lengths: np.ndarray | None) -> np.ndarray:
  """Calls `function(a [m, n], b [1 + r, n])` on n pairs at a time; int32 [outputs, *pairs]."""
  a, b = np.asarray(a), np.asarray(b)
  if a.ndim != 2 or b.ndim not in (2, 3) or len(a) != len(b):
    raise ValueError(f'token ids [p, m] and [p, r] or [p, k, r] expected, got {a.shape}, {b.shape}')
  pairs = b.shape[:-1]
  result = np.zeros((outputs, int(np.prod(pairs))), np.int32)
  partners = b.shape[1] if b.ndim == 3 else 1
  flat = b.reshape(result.shape[1], b.shape[-1])
  if a_lengths is not None:
    a_lengths = np.asarray(a_lengths)
  if b_lengths is not None:
    b_lengths = np.broadcast_to(b_lengths, pairs).reshape(-1)
  if not a.shape[1] or not b.shape[-1]:
    return result.reshape((outputs,) + pairs)
  step = max(1, _TOKENS_AT_ONCE // (a.shape[1] + b.shape[-1]))
  for first in range(0, result.shape[1], step):
    block = slice(first, first + step)
    rows = np.arange(first, min(first + step, result.shape[1])) // partners
    ours = _clean(a[rows], None if a_lengths is None else a_lengths[rows])
    theirs = _clean(flat[block], None if b_lengths is None else b_lengths[block])
    result[:, block] = function(*_unmatchable_padding(ours, theirs))
  return result.reshape((outputs,) + pairs)


def _clean(tokens: np.ndarray, lengths: np.ndarray | None) -> np.ndarray:
  """The ids that count; 0 elsewhere."""
  tokens = np.maximum(tokens, 0)
  if lengths is not None:
    tokens *= np.arange(tokens.shape[1]) < lengths[:, None]
  return tokens


def _unmatchable_padding(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Pairs last, in the narrowest type; padding of `a` is an id that `b` does not have.

  `b` gets a row of padding before its first token, where every run starts at 0.
  """
  largest = max(a.max(), b.max())
  dtype, missing = (np.uint16, 0xFFFF) if largest < 0xFFFF else (np.int64, -1)
  theirs = np.zeros((b.shape[1] + 1, len(b)), dtype)
  theirs[1:] = b.T
  return np.ascontiguousarray(np.where(a > 0, a, missing).astype(dtype).T), theirs


def _runs(a: np.ndarray, b: np.ndarray):
  """Yields for each token of `a` the run of equal tokens that ends at each place of `b`.

  Each is unsigned [1 + r, n], row 0 always 0, and valid until the next.
  """
  previous, current = (np.zeros(b.shape, _run_dtype(a, b)) for _ in range(2))
  equal = np.empty(b.shape, bool)
  for token in a:
    np.equal(b, token, out=equal)
    np.add(previous[:-1], 1, out=current[1:])
    np.multiply(current, equal.view(np.uint8), out=current)
    yield current
    previous, current = current, previous


def _run_dtype(a: np.ndarray, b: np.ndarray) -> np.dtype:
  """Holds one more than the longest possible run."""
  return np.min_scalar_type(min(len(a), len(b)) + 1)


def _longest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  longest = np.zeros(b.shape, _run_dtype(a, b))
  for run in _runs(a, b):
    np.maximum(longest, run, out=longest)
  return longest.max(0)


def _longest_with_starts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """lengths, starts in `a`, starts in `b`: int32 [3, n]."""
  by_end = np.stack([run.max(0) for run in _runs(a, b)]).astype(np.int32)
  lengths, last = by_end.max(0), by_end.argmax(0)  # the first that ends began first, too
  b_starts = np.zeros(lengths.shape, np.int32)
  # A second sweep, because keeping all tables would take m times the memory.
  for i, run in enumerate(_runs(a, b)):
    here = np.flatnonzero((last == i) & (lengths > 0))
    # Row j of `run` ends at token j - 1.
    b_starts[here] = np.argmax(run[:, here], axis=0) - lengths[here]
  return np.stack([lengths, np.where(lengths > 0, last + 1 - lengths, 0), b_starts])


def _prefix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  shorter = min(len(a), len(b) - 1)
  return np.logical_and.accumulate(a[:shorter] == b[1:shorter + 1], axis=0).sum(0)
