"""The index of a chunk store: one part for so many consecutive chunks, merged exactly.

Parts bound memory: each is built and searched alone. What a part is stands in index.py
(dense vectors) and bm25.py (words); which neighbours are allowed in policies.py.

  manifest.json           kind 'index': which parts there are, recall over all of them
  part-00000/...          kind 'index-part', over whole shards of the store
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax import files, storage
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.errors import UserError
from retro_jax.retrieval import bm25, stages
from retro_jax.retrieval import database as database_lib
from retro_jax.retrieval import index as index_lib
from retro_jax.retrieval.bm25 import Bm25Config
from retro_jax.retrieval.database import ChunkDatabase, Shard
from retro_jax.retrieval.exact import nearest_first
from retro_jax.retrieval.index import IndexConfig

KIND, PART_KIND = 'index', 'index-part'
FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True)
class PartRange:
  """Chunks [first, last) of a store, which consist of whole shards."""

  first: int
  last: int
  shards: tuple[Shard, ...]

  @property
  def size(self) -> int:
    return self.last - self.first


def part_ranges(database: ChunkDatabase, vectors_per_part: int) -> list[PartRange]:
  """Consecutive shards, as many as fit into a part; at least one each."""
  ranges, begin = [], 0
  shards, starts = database.shards, database.chunk_starts
  for i in range(1, len(shards) + 1):
    if i == len(shards) or starts[i + 1] - starts[begin] > vectors_per_part:
      if starts[i] > starts[begin]:
        ranges.append(PartRange(int(starts[begin]), int(starts[i]), tuple(shards[begin:i])))
        begin = i
  return ranges


def index_tasks(
    folder: str | os.PathLike, database: ChunkDatabase, config: IndexConfig | Bm25Config
) -> list[stages.Task]:
  """One task a part.

  Raises:
    UserError: dense vectors are asked for and the store has none.
  """
  lexical = isinstance(config, Bm25Config)
  if not lexical:
    database.embeddings  # refuses a store that has none  # pylint: disable=pointless-statement
  tasks = []
  for i, part in enumerate(part_ranges(database, config.vectors_per_part)):
    content = [s.tokens if lexical else s.embedding for s in part.shards]
    tasks.append(stages.Task(
        folder=files.join(folder, f'part-{i:05d}'), kind=PART_KIND,
        inputs={'format_version': FORMAT_VERSION, 'config': dataclasses.asdict(config),
                'method': 'bm25' if lexical else 'vectors',
                'shards': storage.fingerprint(content)},
        make=functools.partial(_make_part, str(database.location), database.fingerprint,
                               part.first, part.last, config),
        weight=part.size))
  return tasks


def _make_part(
    folder: str, fingerprint: str, first: int, last: int, config: IndexConfig | Bm25Config,
    target: Path, manifest: dict[str, Any]) -> None:
  """Indexes chunks [first, last); the pure function of the stage."""
  database = database_lib.resident(folder, fingerprint)
  if isinstance(config, Bm25Config):
    texts = chunk_texts(database, np.arange(first, last))
    manifest['facts'] = bm25.build_part(target, texts, config)
  else:
    manifest['facts'] = index_lib.build_part(
        target, database.embeddings.part(first, last), config)


def build_index(
    folder: str | os.PathLike, database: ChunkDatabase,
    config: IndexConfig | Bm25Config = IndexConfig(),
    runner: stages.Runner = stages.HERE) -> 'Index':
  """Builds the parts that are not current.

  Args:
    folder: where the index is to lie.
    database: whose chunks are indexed.
    config: `IndexConfig` for vectors, `Bm25Config` for words.
    runner: who builds the parts.

  Raises:
    UserError: no chunks, no embeddings, or settings that cannot be.
  """
  if not database.num_chunks:
    raise UserError(f'{database.folder}: no chunks to index')
  with stages.building_in(folder, runner):
    tasks = index_tasks(folder, database, config)
    runner.run('index', tasks, 'chunks')
    if runner.leads:
      _finish(folder, database, config, tasks)
  return Index.open(folder, database)


def _finish(
    folder: str | os.PathLike, database: ChunkDatabase, config: IndexConfig | Bm25Config,
    tasks: Sequence[stages.Task]) -> None:
  """Writes the manifest over all parts, and removes parts of an earlier, larger store."""
  parts = part_ranges(database, config.vectors_per_part)
  manifests = [task.manifest() for task in tasks]
  lexical = isinstance(config, Bm25Config)
  manifest = {
      'kind': KIND, 'format_version': FORMAT_VERSION,
      'config': dataclasses.asdict(config), 'method': 'bm25' if lexical else 'vectors',
      'database': _identity(database, lexical),
      'size': database.num_chunks,
      'parts': [{'first': part.first, 'size': part.size, 'facts': m['facts'],
                 'content': storage.content_fingerprint(m)}
                for part, m in zip(parts, manifests)],
      'recall': mean_recall([m['facts'] for m in manifests]),
      'files': {},
  }
  keep = {f'part-{i:05d}' for i in range(len(tasks))}
  for name in files.list_folder(folder):
    if name.startswith('part-') and name not in keep:
      files.remove_tree(files.join(folder, name))
  whole = storage.is_whole(folder, KIND)
  old = storage.read_manifest(folder, KIND) if whole else {}
  if storage.as_json({**manifest, 'checksum': old.get('checksum')}) != old:
    storage.write_manifest(folder, manifest)


def _identity(database: ChunkDatabase, lexical: bool) -> str:
  """Of what an index depends on: the vectors, or the text."""
  if lexical:
    return storage.fingerprint([s.tokens for s in database.shards])
  return database.embedding_fingerprint


def mean_recall(facts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
  """Recall over all parts, weighted by their size; None where it is not measured."""
  measured = [f for f in facts if f.get('recall')]
  if not measured:
    return None
  weights = np.array([f['size'] for f in measured], float)
  mean = lambda key: float(np.average([f['recall'][key] for f in measured], weights=weights))
  return {'at': measured[0]['recall']['at'], 'sample': sum(f['recall']['sample'] for f in measured),
          'recall': mean('recall'), 'self_recall': mean('self_recall')}


class Index:
  """A finished index, searched part by part.

  Attributes:
    location: where it lies, as it was given; `folder` is where its files are read.
    method: 'vectors' or 'bm25'.
    kind: 'exact' when every vector is looked at, else the kinds of its parts.
    size: number of chunks.
    fingerprint: of all its parts.
  """

  def __init__(self, location: str | os.PathLike, folder: str | os.PathLike,
               manifest: dict[str, Any], database: ChunkDatabase):
    """Use `Index.open`."""
    self.location, self.folder = location, Path(folder)
    self.manifest, self.database = manifest, database
    self.method: str = manifest['method']
    self.size: int = manifest['size']
    kinds = sorted({part['facts'].get('search', 'bm25') for part in manifest['parts']})
    self.kind = '+'.join(kinds)
    self.fingerprint = storage.fingerprint(
        [manifest['config'], manifest['method'], manifest['database'],
         [part['content'] for part in manifest['parts']]])
    # Live search keeps every part at hand; tasks, which see one part at a time, only the last.
    self.part = functools.cache(self._load)

  @classmethod
  def open(cls, folder: str | os.PathLike, database: ChunkDatabase) -> 'Index':
    """Opens the index of a store; a remote one is copied to the local cache first.

    Raises:
      UserError: nothing there, or made from another store.
    """
    local = files.fetch_tree(folder)
    manifest = storage.read_manifest(local, KIND)
    if manifest['format_version'] != FORMAT_VERSION:
      raise UserError(f'{folder}: format version {manifest["format_version"]}, '
                      f'expected {FORMAT_VERSION}; build the index again')
    expected = _identity(database, manifest['method'] == 'bm25')
    if manifest['database'] != expected:
      raise UserError(f'{folder}: indexes content {manifest["database"]}, the database '
                      f'{database.folder} holds {expected}; build the index again')
    return cls(folder, local, manifest, database)

  def ranges(self) -> list[tuple[int, int]]:
    """(first chunk, number of chunks) of each part."""
    return [(part['first'], part['size']) for part in self.manifest['parts']]

  def _load(self, number: int) -> Any:
    folder = self.folder / f'part-{number:05d}'
    storage.read_manifest(folder, PART_KIND)
    entry = self.manifest['parts'][number]
    if self.method == 'bm25':
      return bm25.load_part(folder, entry['facts'])
    first = entry['first']
    return index_lib.load_part(
        folder, entry['facts'], self.database.embeddings.part(first, first + entry['size']))

  def search(self, queries: Any, k: int, effort: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest chunks of each query, over all parts, ties by chunk id.

    Nothing is filtered, not even removed documents: search.py does that.

    Args:
      queries: float32 [q, d0]; for BM25 a sequence of q texts.
      k: how many.
      effort: multiplies the work of an approximate search.

    Returns:
      ids int64 [q, k] and squared distances (BM25: negated scores) float32 [q, k], nearest
      first; -1 and inf where there are fewer.
    """
    ids = np.full((len(queries), 0), -1, np.int64)
    distances = np.zeros(ids.shape, np.float32)
    for number, (first, _) in enumerate(self.ranges()):
      found, found_distances = self.part(number).search(queries, k, effort)
      ids = np.concatenate([ids, np.where(found >= 0, found + first, -1)], 1)
      distances = np.concatenate([distances, found_distances], 1)
      ids, distances = nearest_first(ids, distances, k)
    return ids, distances


@stages.resident(1)
def resident_part(folder: str, fingerprint: str, database: str, database_fingerprint: str,
                  number: int) -> Any:
  """One part of an index, kept for the next task of this process.

  Raises:
    UserError: index or store are others by now.
  """
  index = Index.open(folder, database_lib.resident(database, database_fingerprint))
  if index.fingerprint != fingerprint:
    raise UserError(f'{folder}: changed while it was being searched; run the command again')
  return index.part(number)


@functools.lru_cache(maxsize=4)
def _vocabulary(path: str) -> Vocabulary:
  return Vocabulary.load(path)


def chunk_texts(database: ChunkDatabase, ids: np.ndarray) -> Iterator[str]:
  """Text of chunks, by the vocabulary that the store keeps."""
  vocabulary = _vocabulary(str(database.folder / database_lib.VOCABULARY))
  for first in range(0, len(ids), 4096):
    for row in database.tokens(ids[first:first + 4096]):
      yield vocabulary.decode(row.tolist())


def rebuild_index(
    folder: str | os.PathLike, database: ChunkDatabase,
    runner: stages.Runner = stages.HERE) -> Index:
  """Brings an index up to date with its store, with the settings it was built with.

  Raises:
    UserError: no index there.
  """
  manifest = storage.read_manifest(folder, KIND)
  make = Bm25Config if manifest['method'] == 'bm25' else IndexConfig
  config = {key: tuple(value) if isinstance(value, list) else value
            for key, value in manifest['config'].items()}
  return build_index(folder, database, make(**config), runner)
