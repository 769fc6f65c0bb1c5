"""Tokens that two chunks have in common: longest common substring and prefix.

The paper (section 2.6) calls an evaluation chunk leaked by how long a token substring it
shares with its neighbours. Here are the lengths, and where they lie, for many pairs at once;
what follows from them is decided in policies.py and shown by the inspector and evaluation.
"""

from typing import NamedTuple

import numpy as np

# Cells of one [r + 1, pairs] table. A few tables of so many bytes stay in the cache of one
# core, which is worth more than fewer steps; they are also all the memory that is needed.
_CELLS = 1 << 16


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
  return Spans(*_in_blocks(_longest_with_ends, 3, a, b, a_lengths, b_lengths))


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
  step = max(1, _CELLS // (a.shape[1] + b.shape[-1]))
  for first in range(0, result.shape[1], step):
    block = slice(first, first + step)
    rows = np.arange(first, min(first + step, result.shape[1])) // partners
    ours = _clean(a[rows], None if a_lengths is None else a_lengths[rows])
    theirs = _clean(flat[block], None if b_lengths is None else b_lengths[block])
    result[:, block] = function(*_unmatchable_padding(ours, theirs))
  return result.reshape((outputs,) + pairs)


def _clean(tokens: np.ndarray, lengths: np.ndarray | None) -> np.ndarray:
  """The ids that count; 0 elsewhere."""
  counts = tokens > 0
  if lengths is not None:
    counts &= np.arange(tokens.shape[1]) < lengths[:, None]
  return np.where(counts, tokens, 0)


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

  Each is uint8 or uint16 [1 + r, n], row 0 always 0, and valid until the next.
  """
  dtype = np.uint8 if min(len(a), len(b)) < 0xFF else np.uint32
  previous, current = np.zeros(b.shape, dtype), np.zeros(b.shape, dtype)
  equal = np.empty(b.shape, bool)
  for token in a:
    np.equal(b, token, out=equal)
    np.add(previous[:-1], 1, out=current[1:])
    np.multiply(current, equal.view(np.uint8), out=current)
    yield current
    previous, current = current, previous


def _longest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  longest = None
  for run in _runs(a, b):
    longest = run.copy() if longest is None else np.maximum(longest, run, out=longest)
  return longest.max(0)


def _longest_with_ends(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """lengths, starts in `a`, starts in `b`: int32 [3, n]."""
  result = np.zeros((3, b.shape[1]), np.int32)
  for i, run in enumerate(_runs(a, b)):
    length = run.max(0)
    # Only a longer one replaces: the first end is the first start. argmax is the first in b.
    longer = np.flatnonzero(length > result[0])
    if len(longer):
      found = length[longer].astype(np.int32)
      ends = np.argmax(run[:, longer], axis=0)  # row j of `run` ends at token j - 1
      result[:, longer] = found, i + 1 - found, ends - found
  return result


def _prefix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  shorter = min(len(a), len(b) - 1)
  return np.logical_and.accumulate(a[:shorter] == b[1:shorter + 1], axis=0).sum(0)
