"""How much there is to gain from neighbours, before any training is paid for.

A model reads RET(C_u) while it predicts C_{u+1} (paper, section 2.2). What it could copy is
counted here: the tokens, the pairs of tokens and the longest run of C_{u+1} that are found in
its neighbours, beside the same of random neighbours, which is what any text has in common
with any other. Which chunks are looked at is chunk_samples.py's; how it is shown,
corpus_report_page.py's.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from retro_jax.data.vocabulary import PAD_ID
from retro_jax.evaluation.chunk_samples import Chunks
from retro_jax.retrieval.overlap import longest_common_substring

MEASURES = ('tokens', 'bigrams', 'longest span')
PARTS = ('N', 'F', 'NF')
KINDS = ('nearest', 'random')
_RESAMPLES = 1000
# Resamples drawn together, times documents: bounds memory.
_DRAWS_AT_ONCE = 1 << 22


@dataclasses.dataclass(frozen=True)
class Counts:
  """What of p chunks was found.

  Attributes:
    found: int64 [p, measures, parts, ks].
    total: what could have been: int64 [p, measures].
  """

  found: np.ndarray
  total: np.ndarray


def count(following: np.ndarray, neighbors: np.ndarray, ks: Sequence[int]) -> Counts:
  """Counts what of each chunk is found in its nearest neighbours.

  Tokens and bigrams count as often as they come in the chunk; bigrams lie inside the chunk.
  The longest span is the longest run of tokens that the chunk shares with one neighbour; its
  total is m, also for a shorter last chunk.

  Args:
    following: C_{u+1}, int [p, m], padding at the end.
    neighbors: N and F of the neighbours of C_u, int [p, K, 2m], nearest first; all padding
      where there is none.
    ks: numbers of neighbours, each in 1..K.
  """
  p, m = following.shape
  counts = Counts(np.zeros((p, len(MEASURES), len(PARTS), len(ks)), np.int64),
                  np.zeros((p, len(MEASURES)), np.int64))
  real = following != PAD_ID
  pairs = real[:, 1:] & real[:, :-1]
  counts.total[:] = np.stack([real.sum(-1), pairs.sum(-1), np.full(p, m)], -1)
  vocabulary = int(max(following.max(initial=0), neighbors.max(initial=0))) + 1
  for part, columns in enumerate((slice(0, m), slice(m, 2 * m), slice(0, 2 * m))):
    theirs = neighbors[:, :, columns]
    for measure, (ours, there, counted) in enumerate((
        (following, theirs, real),
        (_bigrams(following, vocabulary), _bigrams(theirs, vocabulary), pairs))):
      ranks = _first_rank(np.where(counted, ours, PAD_ID), there)
      for i, k in enumerate(ks):
        counts.found[:, measure, part, i] = (counted & (ranks < k)).sum(-1)
    longest = np.maximum.accumulate(longest_common_substring(following, theirs), axis=-1)
    counts.found[:, 2, part] = longest[:, np.asarray(ks) - 1]
  return counts


def _bigrams(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
  """Each pair of consecutive tokens as one number above 0; PAD_ID where one is padding."""
  first, second = tokens[..., :-1].astype(np.int64), tokens[..., 1:].astype(np.int64)
  return np.where((first != PAD_ID) & (second != PAD_ID), first * vocabulary + second, PAD_ID)


def _first_rank(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
  """For each value the first of its row's neighbours that has it: int64 [p, a], K for none.

  Args:
    ours: int [p, a].
    theirs: int [p, K, b]; PAD_ID is found nowhere.
  """
  p, k, width = theirs.shape
  # Values are numbered, so that (row, value) fits in one integer whatever the vocabulary.
  values, numbered = np.unique(
      np.concatenate([ours.ravel(), theirs.ravel()]), return_inverse=True)
  row = np.arange(p, dtype=np.int64)[:, None] * len(values)
  code = row + numbered[:ours.size].reshape(ours.shape)
  codes, first = np.unique(
      row + numbered[ours.size:].reshape(p, k * width), return_index=True)
  if not len(codes):
    return np.full(ours.shape, k, np.int64)
  at = np.minimum(np.searchsorted(codes, code), len(codes) - 1)
  # unique gives the first of equals, and within a row the nearest neighbour comes first.
  rank = first[at] % (k * width) // width
  return np.where((codes[at] == code) & (ours != PAD_ID), rank, k)


def measure(blocks: Iterable[tuple[Chunks, np.ndarray]], ks: Sequence[int], seed: int = 0
            ) -> dict[str, Any]:
  """What the neighbours of a sample of chunks could give, against random neighbours.

  Chunks that end their document are left out: nothing follows them. A chunk with fewer than k
  neighbours counts with those it has.

  Args:
    blocks: the sample, each part with as many random neighbours from other documents, int
      [p, K, 2m].
    ks: numbers of neighbours; those above the K that is stored are left out.
    seed: of the bootstrap.

  Returns:
    JSON: `chunks`, `documents`, `ks`, and `rows`, one for each measure, part and k with the
    shares `nearest` and `random`, their difference `gain` and 95 % intervals `*_low`, `*_high`
    over documents.
  """
  documents, totals, sums = [], [], {kind: [] for kind in KINDS}
  for chunks, random_tokens in blocks:
    stored = chunks.neighbor_ids.shape[1]
    ks = [k for k in ks if k <= stored] or [stored]
    followed = chunks.following[:, 0] != PAD_ID
    chunks, random_tokens = chunks.of(followed), random_tokens[followed]
    nearest = count(chunks.following, chunks.neighbor_tokens, ks)
    random = count(chunks.following, random_tokens, ks)
    documents.append(chunks.documents)
    totals.append(nearest.total)
    for kind, counts in zip(KINDS, (nearest, random)):
      sums[kind].append(counts.found.reshape(len(chunks), len(MEASURES) * len(PARTS) * len(ks)))
  body: dict[str, Any] = {'chunks': 0, 'documents': 0, 'ks': list(ks), 'rows': []}
  if not sum(map(len, documents)):
    return body
  ordinals, owner = np.unique(np.concatenate(documents), return_inverse=True)
  total = np.repeat(_by_owner(np.concatenate(totals), owner), len(PARTS) * len(ks), axis=1)
  found = [_by_owner(np.concatenate(sums[kind]), owner) for kind in KINDS]
  shares, low, high = bootstrap(
      np.concatenate([*found, found[0] - found[1]], 1), np.tile(total, 3), seed)
  body |= {'chunks': len(owner), 'documents': len(ordinals), 'resamples': _RESAMPLES}
  width = found[0].shape[1]
  labels = [(name, part, k) for name in MEASURES for part in PARTS for k in ks]
  for column, (name, part, k) in enumerate(labels):
    row = {'measure': name, 'part': part, 'k': k}
    for i, kind in enumerate((*KINDS, 'gain')):
      at = i * width + column
      row |= {kind: float(shares[at]), f'{kind}_low': float(low[at]),
              f'{kind}_high': float(high[at])}
    body['rows'].append(row)
  return body


def _by_owner(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
  """Sums of the rows [p, s] of each owner: float64 [owners, s]."""
  result = np.zeros((int(owner.max()) + 1, values.shape[1]))
  np.add.at(result, owner, values)
  return result


def bootstrap(found: np.ndarray, total: np.ndarray, seed: int = 0
              ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Shares sum(found) / sum(total) and their 95 % intervals over resampled documents.

  Args:
    found: float64 [documents, s].
    total: likewise; shares of nothing are 0.
    seed: of the resampling; all columns see the same documents, so differences are paired.

  Returns:
    share, lower and upper end, float64 [s] each.
  """
  def share(found_sum: np.ndarray, total_sum: np.ndarray) -> np.ndarray:
    return np.divide(found_sum, total_sum, out=np.zeros_like(found_sum), where=total_sum > 0)

  rng = np.random.default_rng(seed)
  size = len(found)
  drawn = []
  at_once = max(1, _DRAWS_AT_ONCE // size)
  for first in range(0, _RESAMPLES, at_once):
    times = rng.multinomial(size, np.full(size, 1 / size), min(at_once, _RESAMPLES - first))
    drawn.append(share(times @ found, times @ total))
  low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5], axis=0)
  return share(found.sum(0), total.sum(0)), low, high
