"""What a database holds and what its neighbours are worth, as numbers before any training.

Sizes are counted over the whole store, block after block of its memory-mapped columns; what
needs neighbours is measured on a sample of the chunks of retrieval examples. The page and the
picture of these numbers are in corpus_report_page.py and corpus_picture.py, the measure of
what neighbours could give in potential.py.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from retro_jax.data.vocabulary import PAD_ID, Vocabulary
from retro_jax.errors import UserError
from retro_jax.evaluation import potential
from retro_jax.evaluation.chunk_samples import Chunks, StoredChunks
from retro_jax.progress import Progress
from retro_jax.retrieval import search
from retro_jax.retrieval.database import VOCABULARY, ChunkDatabase
from retro_jax.retrieval.overlap import longest_common_substring
from retro_jax.retrieval.policies import Policy, PolicyConfig
from retro_jax.retrieval.sharded_index import Index

_CHUNKS_AT_ONCE = 65536
_PERCENTILES = (5, 25, 50, 75, 95)
_DISTANCE_BINS = 40
# Counts in the manifest of examples that say how the search went, not why something was dropped.
_NOT_A_REASON = ('chunks', 'chunks_with_fewer', 'empty_places', 'searched_wider',
                 'searched_exactly')
_SCORE = 'negated BM25 score'
_HUBS = 5


@dataclasses.dataclass(frozen=True)
class ReportConfig:
  """How closely to look.

  Attributes:
    sample: chunks whose neighbours are looked at.
    seed: of the sample, of the random neighbours and of the bootstrap.
    numbers_of_neighbors: k for which the potential is measured.
    near_duplicate: from which share of m in one common run two chunks are near-duplicates.
    short_below: chunks of fewer tokens are counted as short.
    hashes: chunks compared for exact copies, at most; of more, a sample by hash value.
    documents: read for the table of sources, at most; of more, a random sample.
  """

  sample: int = 4096
  seed: int = 0
  numbers_of_neighbors: tuple[int, ...] = (1, 2, 5, 10)
  near_duplicate: float = 0.5
  short_below: int = 8
  hashes: int = 1 << 23
  documents: int = 100_000

  def __post_init__(self):
    if min(self.sample, self.hashes, self.documents, *self.numbers_of_neighbors) < 1:
      raise UserError(f'{self}: sample, hashes, documents and every number of neighbours must be '
                      'at least 1')


def measure(database: ChunkDatabase, examples: Mapping[str, StoredChunks],
            index: Index | None, config: ReportConfig = ReportConfig()) -> dict[str, Any]:
  """Everything the report says, as JSON.

  Args:
    database: the store the report is about.
    examples: retrieval examples with neighbours from it, by a name for them.
    index: over the database; None where there is none.
    config: the settings.
  """
  return {
      'database': {
          'folder': str(database.folder), 'fingerprint': database.fingerprint,
          'chunk_length': database.chunk_length, 'vocabulary': database.manifest['vocabulary'],
          'embedder': (database.manifest['embedder'] or {}).get('description')},
      'corpus': corpus_facts(database, config),
      'index': index and {
          'folder': str(index.location), 'method': index.method, 'kind': index.kind,
          'size': index.size, 'parts': len(index.ranges()), 'recall': index.manifest['recall'],
          'config': index.manifest['config']},
      'neighbors': {name: neighbor_facts(stored, config, name)
                    for name, stored in examples.items()}}


def corpus_facts(database: ChunkDatabase, config: ReportConfig) -> dict[str, Any]:
  """Documents, chunks, tokens, bytes, their lengths, copies and sources; removed ones left out."""
  m = database.chunk_length
  lengths = np.zeros(m + 1, np.int64)
  tokens_of = np.zeros(database.num_documents, np.int64)
  chunks = text_bytes = 0
  copies = Copies(config.hashes)
  progress = Progress('corpus', database.num_chunks, 'chunks')
  for first in range(0, database.num_chunks, _CHUNKS_AT_ONCE):
    ids = np.arange(first, min(first + _CHUNKS_AT_ONCE, database.num_chunks))
    documents = database.document(ids)
    stays = ~np.isin(documents, database.removed)
    ids, documents = ids[stays], documents[stays]
    valid = database.valid_length(ids)
    lengths += np.bincount(valid, minlength=m + 1)
    np.add.at(tokens_of, documents, valid)
    text_bytes += int(database.text_bytes(ids).sum(dtype=np.int64))
    chunks += len(ids)
    copies.add(database.tokens(ids[valid > 0]))
    progress.update(len(stays))
  progress.close()
  there = np.setdiff1d(np.arange(database.num_documents), database.removed)
  tokens = int(tokens_of.sum())
  return {
      'documents': len(there), 'removed_documents': len(database.removed), 'chunks': chunks,
      'tokens': tokens, 'text_bytes': text_bytes,
      'bytes_per_token': text_bytes / max(tokens, 1),
      'chunk_lengths': lengths.tolist(),
      'empty_chunks': int(lengths[0]),
      'short_chunks': int(lengths[1:config.short_below].sum()), 'short_below': config.short_below,
      'document_lengths': _lengths(tokens_of[there]),
      'copies': copies.facts(),
      'sources': _sources(database, there, tokens_of, config)}


class Copies:
  """Counts exact copies among rows of tokens, in bounded memory.

  Keeps a 64-bit hash of each row. When these are more than `most`, rows whose hash lies in the
  upper half of the range are forgotten, and so on: copies stay or go together, so the share
  among those kept is an unbiased estimate.
  """

  def __init__(self, most: int):
    self._most, self._limit = most, 1 << 64
    self._hashes = np.zeros(0, np.uint64)
    self._seen = 0

  def add(self, rows: np.ndarray) -> None:
    """Rows int32 [n, m], each with its padding."""
    data = np.ascontiguousarray(rows, '<i4')
    new = np.array([int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest())
                    for row in data], np.uint64)
    self._seen += len(new)
    self._hashes = np.concatenate([self._hashes, new[new <= self._limit - 1]])
    while len(self._hashes) > self._most and self._limit > 1:
      self._limit //= 2
      self._hashes = self._hashes[self._hashes < self._limit]

  def facts(self) -> dict[str, Any]:
    """JSON: chunks `compared` of those `seen`, the share that is an `extra` copy of another one,
    and the share `with_copies`."""
    _, counts = np.unique(self._hashes, return_counts=True)
    compared = max(len(self._hashes), 1)
    return {'seen': self._seen, 'compared': len(self._hashes),
            'extra': float((counts - 1).sum() / compared),
            'with_copies': float(counts[counts > 1].sum() / compared)}


def _lengths(tokens: np.ndarray) -> dict[str, Any]:
  """Lengths of documents in tokens: mean, percentiles, and counts between powers of two."""
  if not len(tokens):
    return {'mean': 0.0, 'percentiles': {}, 'edges': [], 'counts': []}
  edges = 2 ** np.arange(int(tokens.max()).bit_length() + 1)
  edges[0] = 0  # empty documents are counted with those of one token
  counts, _ = np.histogram(tokens, edges)
  return {'mean': float(tokens.mean()), 'max': int(tokens.max()),
          'percentiles': _percentiles(tokens), 'edges': edges.tolist(),
          'counts': counts.tolist()}


def _sources(database: ChunkDatabase, there: np.ndarray, tokens_of: np.ndarray,
             config: ReportConfig) -> dict[str, Any]:
  """Documents, tokens and bytes by source; `documents_read` says of how many documents."""
  if len(there) > config.documents:
    there = np.sort(np.random.default_rng(config.seed).choice(
        there, config.documents, replace=False))
  sums: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  for ordinal in there.tolist():
    info = database.document_info(ordinal)
    sums[info['source']].update(
        documents=1, tokens=int(tokens_of[ordinal]), text_bytes=int(info['bytes']))
  return {'documents_read': len(there),
          'by_source': {source: dict(sums[source]) for source in sorted(sums)}}


def neighbor_facts(stored: StoredChunks, config: ReportConfig, name: str) -> dict[str, Any]:
  """What a folder of examples retrieved: on all chunks where it counted, else on a sample."""
  manifest = stored.examples.manifest
  counts = manifest.get('policy', {}).get('counts', {})
  places = stored.sample(config.sample, config.seed)
  seen = _Seen(stored, config)
  gain = potential.measure(seen.watch(places, name), config.numbers_of_neighbors, config.seed)
  return {
      'examples': str(stored.examples.folder), 'queries': manifest['queries'],
      'kind': manifest['neighbors'], 'distance': _distance(manifest),
      'num_neighbors': stored.examples.shape.num_neighbors,
      'sample': {'chunks': seen.chunks, 'asked_for': config.sample, 'seed': config.seed},
      'chunks': counts.get('chunks'), 'chunks_with_fewer': counts.get('chunks_with_fewer'),
      'dropped': {reason: n for reason, n in counts.items() if reason not in _NOT_A_REASON},
      **seen.facts(), 'potential': gain}


def _distance(manifest: Mapping[str, Any]) -> str:
  """What the distances of examples are, by their manifest."""
  lexical = manifest['rerank'] or (manifest['index'] or {}).get('method') == 'bm25'
  return _SCORE if lexical else 'squared distance'


class _Seen:
  """Sums over the blocks of a sample, taken as they pass on to potential.py."""

  def __init__(self, stored: StoredChunks, config: ReportConfig):
    self._stored, self._config = stored, config
    self._policy = Policy(PolicyConfig(), stored.queries, stored.database)
    self._nearest: list[np.ndarray] = []
    # Distances of random neighbours are between vectors; scores cannot be drawn beside them.
    self._comparable = _distance(stored.examples.manifest) != _SCORE
    self._random: list[np.ndarray] = []
    self._overlap: list[np.ndarray] = []
    self._same: list[np.ndarray] = []
    self._found: list[np.ndarray] = []

  @property
  def chunks(self) -> int:
    return sum(map(len, self._nearest))

  def watch(self, places: np.ndarray, name: str) -> Iterator[tuple[Chunks, np.ndarray]]:
    """The blocks with random neighbours, as `potential.measure` takes them."""
    stored = self._stored
    progress = Progress(f'neighbours of {name}', len(places), 'chunks')
    for chunks in stored.blocks(places):
      # Sequences of one chunk: only its own document is kept out.
      random = search.random_neighbors(
          stored.queries, stored.database, self._policy, chunks.ids[:, None],
          chunks.neighbor_ids.shape[1], self._config.seed)
      self._nearest.append(chunks.distances)
      self._found.append(chunks.neighbor_ids)
      if self._comparable:
        self._random.append(random.distances[:, 0])
      self._compare(chunks)
      yield chunks, stored.database.with_continuation(random.ids[:, 0])[0]
      progress.update(len(chunks))
    progress.close()

  def _compare(self, chunks: Chunks) -> None:
    """Each chunk with its nearest neighbour of another document."""
    m = chunks.tokens.shape[1]
    own = self._policy.own_documents(chunks.documents[:, None])
    other = self._policy.allowed(chunks.ids, own, chunks.neighbor_ids, count=False)
    place = np.argmax(other, -1)[:, None]
    found = np.take_along_axis(chunks.neighbor_tokens, place[..., None], 1)[:, 0]
    found = np.where(other.any(-1)[:, None], found, PAD_ID)
    self._overlap.append(longest_common_substring(chunks.tokens, found) / m)
    self._same.append(np.all(found[:, :m] == chunks.tokens, -1))

  def facts(self) -> dict[str, Any]:
    """JSON: shares and histograms over the sample."""
    nearest = np.concatenate(self._nearest)
    random = np.concatenate([nearest[:0], *self._random])
    overlap, same = np.concatenate(self._overlap), np.concatenate(self._same)
    finite = np.concatenate([nearest[np.isfinite(nearest)], random[np.isfinite(random)]])
    low, high = float(finite.min(initial=0)), float(finite.max(initial=0))
    edges = np.linspace(low, high if high > low else low + 1, _DISTANCE_BINS + 1)
    by_rank = {}
    for rank in range(nearest.shape[1]):
      values = nearest[:, rank][np.isfinite(nearest[:, rank])]
      by_rank[str(rank + 1)] = {'percentiles': _percentiles(values),
                                'counts': np.histogram(values, edges)[0].tolist()}
    random = random[np.isfinite(random)]
    return {
        'hubs': self._hubs(),
        'fewer_neighbors': float(np.isinf(nearest[:, -1]).mean()) if len(nearest) else 0.0,
        'no_neighbor': float(np.isinf(nearest[:, 0]).mean()) if len(nearest) else 0.0,
        'near_duplicates': {
            'threshold': self._config.near_duplicate,
            'share': float((overlap > self._config.near_duplicate).mean()) if len(overlap) else 0.0,
            'identical': float(same.mean()) if len(same) else 0.0,
            'edges': np.linspace(0, 1, 21).tolist(),
            'counts': np.histogram(overlap, np.linspace(0, 1, 21))[0].tolist()},
        'distances': {'edges': edges.tolist(), 'by_rank': by_rank, 'random': {
            'percentiles': _percentiles(random),
            'counts': np.histogram(random, edges)[0].tolist()}}}


  def _hubs(self) -> list[dict[str, Any]]:
    """The chunks that most of the sample retrieved, and for what `share` of it each is there.

    A chunk that is near to everything, as one without text may be, takes the place of a real
    neighbour everywhere.
    """
    database, found = self._stored.database, np.concatenate(self._found)
    vocabulary = Vocabulary.load(database.folder / VOCABULARY)
    ids, times = np.unique(found[found >= 0], return_counts=True)
    hubs = []
    for place in np.lexsort((ids, -times))[:_HUBS].tolist():
      info = database.document_info(int(database.document(ids[place])))
      hubs.append({'chunk': int(ids[place]), 'share': float(times[place] / len(found)),
                   'document': info['id'], 'title': info['title'],
                   'text': vocabulary.decode(database.tokens(ids[place]).tolist())})
    return hubs


def _percentiles(values: np.ndarray) -> dict[str, float]:
  if not len(values):
    return {}
  return {str(p): float(v) for p, v in zip(_PERCENTILES, np.percentile(values, _PERCENTILES))}
