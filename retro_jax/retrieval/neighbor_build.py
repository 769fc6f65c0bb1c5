"""Sequences and their neighbours as TFRecords: search, merge, write, one block at a time.

A block is the sequences of one pair of record files. Searching it in one part of the index
is a task of its own; merging the parts and writing the records is another. What a search
does is in search.py, what a record holds in data/records.py.

  manifest.json         kind 'retrieval-examples'
  shard-00000/          kind 'examples-shard': examples.tfrecord, neighbors.tfrecord
  near-documents/       kind 'near-documents', where the policy asks for them
  search/00000-00000/   kind 'search-result' of block and part; gone when all is done
"""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax import files, storage
from retro_jax.data import records
from retro_jax.errors import UserError
from retro_jax.retrieval import database as database_lib
from retro_jax.retrieval import policies, search, stages
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.near_documents import near_document_pairs
from retro_jax.retrieval.policies import Policy, PolicyConfig
from retro_jax.retrieval.sharded_index import Index, chunk_texts, resident_part

SHARD_KIND, SEARCH_KIND, NEAR_KIND = 'examples-shard', 'search-result', 'near-documents'
_ROWS = 4096
_SEQUENCES_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
  """How a chunk store becomes training examples.

  Attributes:
    sequence_length: n, a multiple of the chunk length (paper: 2048).
    num_neighbors: K stored a chunk, at least the k of training.
    margin: candidates beyond K asked for before the policy filters.
    kind: 'nearest', or 'random' for the control.
    seed: of the random neighbours.
    examples_per_shard: records in a file; with it a block of chunks is searched, and lost when
      a build is killed.
    rerank_candidates: with a BM25 index to re-rank by, how many of the nearest it orders anew.
    policy: which neighbours are allowed.
  """

  sequence_length: int = 2048
  num_neighbors: int = 10
  margin: int = 32
  kind: str = 'nearest'
  seed: int = 0
  examples_per_shard: int = 512
  rerank_candidates: int = 64
  policy: PolicyConfig = PolicyConfig()

  def __post_init__(self):
    if self.kind not in ('nearest', 'random'):
      raise UserError(f"neighbour kind {self.kind!r} is unknown; expected 'nearest' or 'random'")
    if min(self.num_neighbors, self.examples_per_shard, self.rerank_candidates) < 1 or (
        self.margin < 0):
      raise UserError(
          f'num_neighbors is {self.num_neighbors}, examples_per_shard {self.examples_per_shard}, '
          f'rerank_candidates {self.rerank_candidates}, margin {self.margin}; '
          'expected at least 1, 1, 1 and 0')


@dataclasses.dataclass(frozen=True)
class Handle:
  """An artefact that tasks open for themselves: where it lies and what it must hold."""

  folder: str
  fingerprint: str


@dataclasses.dataclass(frozen=True)
class Retrieval:
  """All that the tasks of one examples folder have in common.

  Attributes:
    folder: of the examples.
    queries, database: the two stores.
    index, rerank: indices over `database`; None for random neighbours, and without re-ranking.
    config: the settings.
    parts: (first chunk, size) of each part of `index`.
    policy_inputs: JSON of all that the policy depends on.
  """

  folder: str
  queries: Handle
  database: Handle
  index: Handle | None
  rerank: Handle | None
  config: ExamplesConfig
  parts: tuple[tuple[int, int], ...] = ()
  policy_inputs: Any = None

  def opened(self) -> tuple[ChunkDatabase, ChunkDatabase]:
    return (database_lib.resident(self.queries.folder, self.queries.fingerprint),
            database_lib.resident(self.database.folder, self.database.fingerprint))

  def policy(self) -> Policy:
    """A fresh policy, its counters at zero."""
    pairs = None
    if self.config.policy.near_duplicate_documents:
      near = files.fetch_tree(files.join(self.folder, 'near-documents'))
      pairs = np.load(Path(near) / 'pairs.npy')
    return Policy(self.config.policy, *self.opened(), pairs)

  def part(self, handle: Handle, number: int) -> Any:
    return resident_part(handle.folder, handle.fingerprint, self.database.folder,
                         self.database.fingerprint, number)

  @property
  def candidates(self) -> int:
    """Neighbours that the search keeps a chunk."""
    config = self.config
    return max(config.num_neighbors, config.rerank_candidates) if self.rerank else (
        config.num_neighbors)


def build_examples(
    folder: str | os.PathLike,
    queries: ChunkDatabase,
    database: ChunkDatabase,
    index_folder: str | os.PathLike | None,
    config: ExamplesConfig = ExamplesConfig(),
    runner: stages.Runner = stages.HERE,
    rerank_folder: str | os.PathLike | None = None,
) -> records.Examples:
  """The sequences of a store, with neighbours from a database; does only what is not done.

  Args:
    folder: where the records are to lie.
    queries: the store whose chunks make up the sequences.
    database: the store that is searched; may be the same.
    index_folder: an index over `database`; random neighbours need none.
    config: the settings.
    runner: who searches and writes.
    rerank_folder: a BM25 index over `database` that orders the nearest anew, or None.

  Raises:
    UserError: stores that do not fit each other or the index, or wrong settings.
  """
  retrieval, facts = prepared(folder, queries, database, index_folder, config, rerank_folder)
  shape = _shape(queries, config)
  sequences = -(-queries.num_chunks // shape.num_chunks)
  with stages.building_in(folder, runner):
    near = near_task(retrieval)
    runner.run('near-duplicate documents', near)
    blocks = block_tasks(retrieval, sequences, shape.num_chunks)
    todo = {block for block, task in enumerate(blocks) if task.why_not_current() is not None}
    if todo and runner.leads and storage.is_whole(folder, records.KIND):
      files.remove_tree(files.join(folder, storage.MANIFEST))
    by_block = [search_tasks(retrieval, block, sequences, shape.num_chunks)
                for block in sorted(todo)]
    # Part by part: a process keeps one in memory, and loads the next when it is through.
    searches = [task for of_part in zip(*by_block) for task in of_part]
    runner.run('neighbours', searches, 'chunks x parts')
    runner.run('records', blocks, 'chunks')
    if runner.leads:
      _finish(retrieval, facts, queries, shape, sequences, blocks)
  return records.Examples(folder)


def prepared(
    folder: str | os.PathLike, queries: ChunkDatabase, database: ChunkDatabase,
    index_folder: str | os.PathLike | None, config: ExamplesConfig,
    rerank_folder: str | os.PathLike | None) -> tuple[Retrieval, dict[str, Any]]:
  """Checks that everything fits; also what the manifest says of the index.

  Raises:
    UserError: it does not.
  """
  records.check_multiple(config.sequence_length, queries.chunk_length)
  search.check_same_space(queries, database)
  index = rerank = None
  if config.kind == 'nearest':
    if index_folder is None:
      raise UserError(
          f'{folder}: nearest neighbours need an index; build one over {database.folder}')
    index = Index.open(index_folder, database)
    if rerank_folder is not None:
      rerank = Index.open(rerank_folder, database)
      if rerank.method != 'bm25' or index.method == 'bm25':
        raise UserError(f'{rerank_folder}: candidates of a {index.method} index are to be '
                        f're-ranked by a {rerank.method} one; expected vectors and bm25')
  handle = lambda thing: thing and Handle(str(thing.location), thing.fingerprint)
  retrieval = Retrieval(
      str(folder), handle(queries), handle(database), handle(index), handle(rerank), config,
      tuple(map(tuple, index.ranges())) if index else (), policies.describe(config.policy))
  facts = index and {'method': index.method, 'kind': index.kind, 'parts': len(index.ranges()),
                     'recall': index.manifest['recall'], 'config': index.manifest['config']}
  return retrieval, facts


def _shape(queries: ChunkDatabase, config: ExamplesConfig) -> records.ExampleShape:
  return records.ExampleShape(
      config.sequence_length, queries.chunk_length, config.num_neighbors,
      database_lib.token_dtype(queries.manifest['vocabulary']['size']).str)


def _inputs(retrieval: Retrieval, **more: Any) -> dict[str, Any]:
  """What neighbours depend on: contents, never places."""
  queries, database = retrieval.opened()
  config = dataclasses.asdict(retrieval.config)
  return {'format_version': records.FORMAT_VERSION, 'queries': queries.fingerprint,
          'database': database.fingerprint,
          'index': retrieval.index and retrieval.index.fingerprint,
          'rerank': retrieval.rerank and retrieval.rerank.fingerprint,
          'config': {**config, 'policy': retrieval.policy_inputs}, **more}


def near_task(retrieval: Retrieval) -> list[stages.Task]:
  """The pairs of documents that the policy keeps apart; no task where it keeps none."""
  policy = retrieval.config.policy
  if not policy.near_duplicate_documents:
    return []
  return [stages.Task(
      folder=files.join(retrieval.folder, 'near-documents'), kind=NEAR_KIND,
      inputs={'queries': retrieval.queries.fingerprint,
              'database': retrieval.database.fingerprint,
              'threshold': policy.near_duplicate_documents},
      make=functools.partial(_make_near, retrieval))]


def _make_near(retrieval: Retrieval, folder: Path, manifest: dict[str, Any]) -> None:
  pairs, similarity = near_document_pairs(
      *retrieval.opened(), threshold=retrieval.config.policy.near_duplicate_documents)
  storage.save_array(folder / 'pairs.npy', pairs)
  storage.save_array(folder / 'similarity.npy', similarity)
  manifest['pairs'] = len(pairs)


def search_tasks(
    retrieval: Retrieval, block: int, sequences: int, num_chunks: int) -> list[stages.Task]:
  """One task a part of the index, for one block."""
  size = retrieval.config.examples_per_shard
  first, last = block * size, min(sequences, (block + 1) * size)
  return [stages.Task(
      folder=files.join(retrieval.folder, 'search', f'{block:05d}-{number:05d}'),
      kind=SEARCH_KIND,
      inputs=_inputs(retrieval, first=first, last=last, part=number),
      make=functools.partial(_make_search, retrieval, first, last, number),
      weight=(last - first) * num_chunks) for number in range(len(retrieval.parts))]


def _make_search(
    retrieval: Retrieval, first: int, last: int, number: int, folder: Path,
    manifest: dict[str, Any]) -> None:
  """Searches a block of sequences in one part; the pure function of the stage."""
  queries, database = retrieval.opened()
  policy = retrieval.policy()
  chunk_ids = search.sequence_chunk_ids(
      queries.num_chunks, retrieval.config.sequence_length // queries.chunk_length, first, last)
  ids, distances = search.search_part(
      retrieval.part(retrieval.index, number), retrieval.parts[number][0], queries, database,
      policy, chunk_ids, retrieval.candidates, retrieval.config.margin)
  storage.save_array(folder / 'ids.npy', ids)
  storage.save_array(folder / 'distances.npy', distances)
  manifest['drops'] = dict(sorted(policy.drops.items()))


def block_tasks(
    retrieval: Retrieval, sequences: int, num_chunks: int) -> list[stages.Task]:
  """One task a pair of record files."""
  size = retrieval.config.examples_per_shard
  return [stages.Task(
      folder=files.join(retrieval.folder, f'shard-{block:05d}'), kind=SHARD_KIND,
      inputs=_inputs(retrieval, first=first, last=min(sequences, first + size)),
      make=functools.partial(
          _make_records, retrieval, block, first, min(sequences, first + size)),
      weight=(min(sequences, first + size) - first) * num_chunks)
          for block, first in enumerate(range(0, sequences, size))]


def _make_records(
    retrieval: Retrieval, block: int, first: int, last: int, folder: Path,
    manifest: dict[str, Any]) -> None:
  """Merges what the parts returned for a block, and writes its records."""
  queries, database = retrieval.opened()
  config = retrieval.config
  policy = retrieval.policy()
  shape = _shape(queries, config)
  chunk_ids = search.sequence_chunk_ids(queries.num_chunks, shape.num_chunks, first, last)
  drops: Counter[str] = Counter()
  if retrieval.index is None:
    found = search.random_neighbors(
        queries, database, policy, chunk_ids, config.num_neighbors, config.seed)
  else:
    pieces = []
    for number in range(len(retrieval.parts)):
      result = Path(files.fetch_tree(
          files.join(retrieval.folder, 'search', f'{block:05d}-{number:05d}')))
      drops.update(storage.read_manifest(result, SEARCH_KIND)['drops'])
      pieces.append((np.load(result / 'ids.npy'), np.load(result / 'distances.npy')))
    ids, distances = search.merged(pieces, retrieval.candidates)
    if retrieval.rerank:
      ids, distances = _reranked(retrieval, queries, chunk_ids, ids, distances)
    found = search.placed(
        chunk_ids, ids[:, :config.num_neighbors], distances[:, :config.num_neighbors], policy)
  drops.update(policy.drops)
  manifest['drops'] = dict(sorted(drops.items()))
  writer = records.RecordWriter(folder, shape)
  try:
    for begin in range(0, len(chunk_ids), _SEQUENCES_AT_ONCE):
      rows = slice(begin, begin + _SEQUENCES_AT_ONCE)
      columns = sequence_columns(queries, chunk_ids[rows])
      retrieved, _ = database.with_continuation(found.ids[rows])
      for i in range(len(retrieved)):
        writer.write({name: column[i] for name, column in columns.items()},
                     {'ids': found.ids[rows][i], 'distances': found.distances[rows][i],
                      'tokens': retrieved[i]})
  finally:
    writer.close()


def _reranked(
    retrieval: Retrieval, queries: ChunkDatabase, chunk_ids: np.ndarray, ids: np.ndarray,
    distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Candidates [rows, c] in the order of their BM25 score with the chunk, ties as they were."""
  database = retrieval.opened()[1]
  ranges = Index.open(retrieval.rerank.folder, database).ranges()
  query_ids = chunk_ids[chunk_ids >= 0]
  scores = np.full(ids.shape, np.inf, np.float32)
  for number, (first, size) in enumerate(ranges):
    part = retrieval.part(retrieval.rerank, number)
    here = (ids >= first) & (ids < first + size)
    for begin in range(0, len(ids), _ROWS):
      rows = slice(begin, begin + _ROWS)
      texts = list(chunk_texts(queries, query_ids[rows]))
      found = part.score(texts, np.where(here[rows], ids[rows] - first, -1))
      scores[rows] = np.where(here[rows], found, scores[rows])
  # Candidates without a word in common stay behind those with one; empty places come last.
  order = np.lexsort((np.arange(ids.shape[1]) + np.zeros_like(ids), scores, ids < 0))
  return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)


def sequence_columns(queries: ChunkDatabase, chunk_ids: np.ndarray) -> dict[str, np.ndarray]:
  """What `examples` records hold, for sequences of chunks [s, l]; -1 is padding."""
  real = chunk_ids >= 0
  tokens = np.zeros(chunk_ids.shape + (queries.chunk_length,), np.int32)
  tokens[real] = queries.tokens(chunk_ids[real])
  text_bytes = np.zeros(chunk_ids.shape, np.int32)
  text_bytes[real] = queries.text_bytes(chunk_ids[real])
  documents = search.documents_of(queries, chunk_ids)
  # The token after the sequence belongs to it as a target if the document goes on.
  last = chunk_ids[:, -1]
  after = np.minimum(last + 1, queries.num_chunks - 1)
  goes_on = (last >= 0) & (after > last) & (queries.document(after) == documents[:, -1])
  following = np.where(goes_on, queries.tokens(after)[:, 0], 0)
  return {'tokens': tokens.reshape(len(chunk_ids), -1), 'next_token': following[:, None],
          'chunk_ids': chunk_ids, 'documents': documents, 'text_bytes': text_bytes}


def _finish(
    retrieval: Retrieval, facts: Mapping[str, Any] | None, queries: ChunkDatabase,
    shape: records.ExampleShape, sequences: int, blocks: Sequence[stages.Task]) -> None:
  """Writes the manifest over all blocks, and removes what only the way here needed."""
  folder, config = retrieval.folder, retrieval.config
  drops: Counter[str] = Counter()
  for task in blocks:
    drops.update(task.manifest()['drops'])
  policy = retrieval.policy()
  manifest = {
      'kind': records.KIND, 'format_version': records.FORMAT_VERSION,
      'inputs': _inputs(retrieval),
      **dataclasses.asdict(shape), 'retrieved_length': shape.retrieved_length,
      'num_examples': sequences, 'examples_per_shard': config.examples_per_shard,
      'vocabulary': queries.manifest['vocabulary'],
      'queries': dataclasses.asdict(retrieval.queries),
      'database': dataclasses.asdict(retrieval.database),
      'index': facts, 'rerank': retrieval.rerank and dataclasses.asdict(retrieval.rerank),
      'neighbors': config.kind,
      'content': storage.fingerprint(
          [storage.content_fingerprint(task.manifest()) for task in blocks]),
      'policy': {**policy.description, 'denied_documents': policy.num_denied,
                 'counts': dict(sorted(drops.items()))},
      'files': {},
  }
  keep = {Path(task.folder).name for task in blocks}
  for name in files.list_folder(folder):
    if name == 'search' or (name.startswith('shard-') and name not in keep):
      files.remove_tree(files.join(folder, name))
  whole = storage.is_whole(folder, records.KIND)
  old = storage.read_manifest(folder, records.KIND) if whole else {}
  if storage.as_json({**manifest, 'checksum': old.get('checksum')}) != old:
    storage.write_manifest(folder, manifest)
