"""How much of a gain is text that the database shares with what is scored (paper, section 2.6).

A chunk's overlap is the longest run of tokens it has in common with one of its nearest
neighbours, N and F, as a fraction of its own length. Curves are over the chunks whose overlap
is at most alpha. What runs are shared is found in retrieval/overlap.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from retro_jax.data.records import EXAMPLES, NEIGHBORS, Examples
from retro_jax.data.windows import Documents
from retro_jax.errors import UserError
from retro_jax.evaluation.bits_per_byte import Score, gain_interval
from retro_jax.evaluation.token_scores import TokenScores, check_same_texts
from retro_jax.retrieval.overlap import longest_common_substring

_CHUNKS_AT_ONCE = 512


@dataclasses.dataclass(frozen=True)
class LeakageConfig:
  """How shared text is measured.

  Attributes:
    alphas: overlaps up to which chunks are kept, from 0 to 1.
    neighbors: how many of the nearest are looked at; fewer where the examples hold fewer.
    examples: examples of the same texts with neighbours from the *training* data, unfiltered by
      near-duplicates; '' takes those that are evaluated.
  """
  alphas: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75, 1.0)
  neighbors: int = 10
  examples: str = ''

  def __post_init__(self):
    if not self.alphas or not all(0 <= alpha <= 1 for alpha in self.alphas) or self.neighbors < 1:
      raise UserError(f'LeakageConfig(alphas={self.alphas}, neighbors={self.neighbors}), expected '
                      'fractions from 0 to 1 and at least one neighbour')


@dataclasses.dataclass(frozen=True)
class Leaks:
  """What the documents share with the database.

  Attributes:
    config: how it was measured.
    documents: which.
    overlap: of each chunk, the longest run shared by its tokens that are not padding, float64
      [chunks]. A document's last chunk is shorter than m.
    num_neighbors: that were looked at.
    kinds: of each token, uint8 [chunks, m]: one of `TOKEN_KINDS`.
    facts: of the examples whose neighbours were looked at.
    notes: sentences on what could not be measured as asked.
  """
  config: LeakageConfig
  documents: Documents
  overlap: np.ndarray
  num_neighbors: int
  kinds: np.ndarray
  facts: Mapping[str, Any]
  notes: list[str]


TOKEN_KINDS = ('not_predicted', 'nothing_retrieved', 'not_in_retrieved', 'in_retrieved')


def measured(documents: Documents, config: LeakageConfig, read: int) -> Leaks:
  """Compares every chunk with its neighbours.

  Args:
    documents: of the split.
    config: how.
    read: k in which single tokens are looked up.

  Raises:
    UserError: `config.examples` are of other texts.
  """
  source = Examples(config.examples) if config.examples else documents.examples
  check_same_texts(documents.examples, source)
  held = source.shape.num_neighbors
  looked_at = min(config.neighbors, held)
  notes = []
  if looked_at < config.neighbors:
    notes.append(f'leakage over {config.neighbors} neighbours: {source.folder} holds {held}, '
                 'which were looked at')
  policy = source.manifest['policy']
  if policy['near_duplicate_chunks'] or policy['near_duplicate_documents']:
    notes.append(f'leakage from near-duplicates: the policy of {source.folder} removed them')
  overlap = np.zeros(documents.num_chunks)
  m = documents.examples.shape.chunk_length
  kinds = np.zeros((documents.num_chunks, m), np.uint8)
  for first in range(0, documents.num_chunks, _CHUNKS_AT_ONCE):
    chunks = np.arange(first, min(first + _CHUNKS_AT_ONCE, documents.num_chunks))
    tokens = documents.read(chunks, (EXAMPLES,))['tokens']
    found = documents.read(chunks, (NEIGHBORS,), source)['neighbor_tokens'][:, :looked_at]
    shared = longest_common_substring(tokens, found).max(-1)
    overlap[chunks] = shared / np.maximum((tokens != 0).sum(-1), 1)
    kinds[chunks] = _kinds(documents, chunks, tokens, read)
  return Leaks(config, documents, overlap, looked_at, kinds,
               {key: source.manifest[key] for key in ('neighbors', 'policy', 'database')}, notes)


def _kinds(documents: Documents, chunks: np.ndarray, tokens: np.ndarray, read: int) -> np.ndarray:
  """Which `TOKEN_KINDS` the tokens are; chunk u reads what chunk u - 1 retrieved."""
  begins = documents.starts[documents.document[chunks]] == chunks
  before = np.where(begins, -1, chunks - 1)
  found = documents.read(before, (NEIGHBORS,))
  retrieved = found['neighbor_tokens'][:, :read]
  there = (retrieved != 0) & (found['neighbor_ids'][:, :read, None] >= 0)
  retrieved = np.where(there, retrieved, 0).reshape(len(chunks), -1)
  inside = np.stack([np.isin(row, of[of != 0]) for row, of in zip(tokens, retrieved)])
  kinds = np.where(inside, 3, np.where((retrieved != 0).any(-1)[:, None], 2, 1))
  kinds[begins, 0] = 0
  return np.where(tokens != 0, kinds, 0).astype(np.uint8)


def curves(leaks: Leaks, settings: Mapping[str, TokenScores]) -> dict[str, Any]:
  """Bits-per-byte by overlap, with intervals, as `results.json` holds it.

  Returns:
    `rows`: setting, alpha, bits_per_byte, low, high, chunks, bytes, tokens, documents.
    `gains`: alpha, over, gain, low, high of retro_on over each other setting.
    `tokens`: bits a token of each setting by whether the token occurs in what the model read
      there, and the gain of retro_on over retro_off among those.
    Beside them what was looked at, and how the overlaps are spread.
  """
  rows, gains = [], []
  for alpha in sorted(leaks.config.alphas):
    chunks = leaks.overlap <= alpha
    scores = {name: tokens.score(chunks) for name, tokens in settings.items()}
    for name, score in scores.items():
      if len(score.bits):
        low, high = score.interval()
        rows.append({'setting': name, 'alpha': alpha, 'bits_per_byte': score.bits_per_byte,
                     'low': low, 'high': high, 'chunks': int(chunks.sum()),
                     'bytes': int(score.text_bytes.sum()), 'tokens': int(score.tokens.sum()),
                     'documents': len(score.bits)})
    gains += [{'alpha': alpha, **gain} for gain in _gains(scores)]
  quantiles = np.quantile(leaks.overlap, (0, 0.25, 0.5, 0.75, 1)) if len(leaks.overlap) else []
  return {'rows': rows, 'gains': gains, 'tokens': _by_kind(leaks, settings),
          'neighbors': leaks.num_neighbors, 'chunks': len(leaks.overlap),
          'overlap_quartiles': [float(q) for q in quantiles],
          'mean_overlap': float(leaks.overlap.mean()), 'source': dict(leaks.facts)}


def _gains(scores: Mapping[str, Score]) -> list[dict[str, Any]]:
  on = scores.get('retro_on')
  if on is None or not on.bits.sum():
    return []
  result = []
  for name, other in scores.items():
    if name != 'retro_on':
      low, high = gain_interval(on, other)
      result.append({'over': name, 'gain': float(1 - on.bits.sum() / other.bits.sum()),
                     'low': low, 'high': high})
  return result


def _by_kind(leaks: Leaks, settings: Mapping[str, TokenScores]) -> dict[str, Any]:
  result = {}
  for number, kind in enumerate(TOKEN_KINDS):
    if not number:
      continue
    scores = {name: _of_tokens(tokens, leaks.kinds == number) for name, tokens in settings.items()}
    some = next(iter(scores.values()))
    if len(some.bits):
      result[kind] = {'tokens': int(some.tokens.sum()),
                      'bits_per_token': {name: float(score.bits.sum() / score.tokens.sum())
                                         for name, score in scores.items()},
                      'gains': _gains(scores)}
  return result


def _of_tokens(tokens: TokenScores, which: np.ndarray) -> Score:
  """Sums by document over some tokens, bool [chunks, m]; bytes are not told apart."""
  documents = tokens.documents
  bits = np.zeros(len(documents))
  for first, block in tokens.blocks():
    here = slice(first, first + len(block))
    np.add.at(bits, documents.document[here], (block * which[here]).sum(-1, dtype=np.float64))
  count = np.bincount(documents.document, which.sum(-1), len(documents))
  keep = count > 0
  return Score(documents.ordinals[keep], bits[keep], np.zeros(keep.sum()), count[keep])
