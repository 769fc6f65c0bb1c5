"""Building a chunk store: inputs to chunks, chunks to embeddings, document ids, manifest.

Each stage is a pure function of one shard (stages.py); the format of what they write stands
in database.py. Taking documents out again is database_edit.py's.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax import files, storage
from retro_jax.data import corpus
from retro_jax.data.chunking import Chunks, chunk_documents
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.errors import UserError
from retro_jax.retrieval import database as database_lib
from retro_jax.retrieval import stages
from retro_jax.retrieval.database import (
  CHUNKS_KIND,
  EMBEDDINGS_KIND,
  FORMAT_VERSION,
  IDS_KIND,
  KIND,
  ChunkDatabase,
  Shard,
)

_COLUMNS = ('tokens', 'valid_length', 'text_bytes', 'document')
# An embedder sorts these by length; more texts waste less padding.
_EMBED_AT_ONCE = 16384
# The manifest of a store that is being changed: readers find none, the next build finds this.
_WITHDRAWN = 'manifest.json.old'
# Documents whose ids are looked at together: bounds memory, sets the number of buckets.
_IDS_AT_ONCE = 1 << 20


@dataclasses.dataclass(frozen=True)
class DatabaseConfig:
  """How documents become a chunk store.

  Attributes:
    chunk_length: m (paper: 64).
    chunks_per_shard: a shard ends with the document that reaches this many. What a killed
      build loses, and what memory holds, is one shard.
    shuffle_seed: permutes the documents of each input, so that similar ones do not sit in the
      same training sequence; None keeps their order.
  """

  chunk_length: int = 64
  chunks_per_shard: int = 16384
  shuffle_seed: int | None = 0

  def __post_init__(self):
    if self.chunk_length < 1 or self.chunks_per_shard < 1:
      raise UserError(f'chunk_length is {self.chunk_length} and chunks_per_shard is '
                      f'{self.chunks_per_shard}, expected at least 1')


def chunk_tasks(
    folder: str | os.PathLike, inputs: Sequence[Any], vocabulary: Any, config: DatabaseConfig,
    compacted: Mapping[str, Sequence[str]] | None = None) -> list[stages.Task]:
  """One task an input (a `SourceShard` of data/corpus.py): its documents, cut into chunks.

  Args:
    folder: of the database.
    inputs: in the order in which their chunks are to be numbered.
    vocabulary: a `Vocabulary`.
    config: the settings.
    compacted: sha256 of the ids of documents taken out of an input for good, by its folder.

  Raises:
    UserError: two inputs of one name.
  """
  tasks, seen = [], {}
  for shard in inputs:
    name = input_name(shard.name)
    if name in seen:
      raise UserError(f'two inputs are called {shard.name!r} and {seen[name]!r}; rename one')
    seen[name] = shard.name
    without = sorted((compacted or {}).get(name, ()))
    tasks.append(stages.Task(
        folder=files.join(folder, 'chunks', name), kind=CHUNKS_KIND,
        inputs={
            'format_version': FORMAT_VERSION, 'input': shard.describe(),
            'vocabulary': vocabulary.fingerprint, **dataclasses.asdict(config),
            **({'without': without} if without else {})},
        make=functools.partial(_make_chunks, shard, vocabulary.path, config, frozenset(without)),
        weight=max(1, shard.weight)))
  return tasks


def input_name(name: str) -> str:
  """A folder name for an input: readable, safe, and its own."""
  readable = re.sub(r'[^A-Za-z0-9._]+', '_', name).strip('._')[-48:] or 'input'
  return f'{readable}-{storage.fingerprint(name)[:8]}'


@functools.lru_cache(maxsize=4)
def _vocabulary(path: str) -> Vocabulary:
  return Vocabulary.load(path)


def _make_chunks(
    shard: Any, vocabulary_path: str, config: DatabaseConfig, without: frozenset[str],
    folder: Path, manifest: dict[str, Any]) -> None:
  """Reads one input and writes its shards; the pure function of the stage."""
  vocabulary = _vocabulary(vocabulary_path)
  documents = _documents(shard, folder, config.shuffle_seed, without)
  parts: list[dict[str, int]] = []
  # The cutter reads a batch of texts ahead; tee keeps their documents for so long.
  documents, texts = itertools.tee(documents)
  cut = chunk_documents((document.text for document in texts), vocabulary, config.chunk_length)
  pairs = zip(documents, cut, strict=True)
  dtype = database_lib.token_dtype(vocabulary.size)
  while True:
    writer = _ShardWriter(folder / f'{len(parts):05d}', config.chunk_length, dtype)
    for document, chunks in pairs:
      writer.add(document, chunks)
      if writer.chunks >= config.chunks_per_shard:
        break
    if not writer.documents:
      break
    parts.append(writer.close())
  manifest['parts'] = parts
  manifest['report'] = dict(vars(shard.report))


class _ShardWriter:
  """Collects the documents of one shard and writes its columns."""

  def __init__(self, folder: Path, chunk_length: int, dtype: np.dtype):
    self._folder, self._dtype = folder, dtype
    self._columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    self._columns['tokens'].append(np.zeros((0, chunk_length), dtype))
    self._lines: list[bytes] = []
    self._first_chunk = [0]

  @property
  def documents(self) -> int:
    return len(self._lines)

  @property
  def chunks(self) -> int:
    return self._first_chunk[-1]

  def add(self, document: Any, chunks: Chunks) -> None:
    self._columns['tokens'].append(chunks.tokens.astype(self._dtype))
    self._columns['valid_length'].append(chunks.valid_length)
    self._columns['text_bytes'].append(chunks.text_bytes)
    self._columns['document'].append(np.full(len(chunks), self.documents, np.int32))
    self._first_chunk.append(self.chunks + len(chunks))
    line = {'id': document.id, 'title': document.title, 'source': document.source,
            'bytes': int(np.sum(chunks.text_bytes)), 'metadata': dict(document.metadata),
            'place': document.place}
    self._lines.append(json.dumps(line, default=str).encode() + b'\n')

  def close(self) -> dict[str, int]:
    """Writes everything; returns the counts."""
    self._folder.mkdir()
    for name, parts in self._columns.items():
      column = np.concatenate(parts)
      storage.save_array(self._folder / f'{name}.npy',
              column if name == 'tokens' else column.astype('<i4'))
    write_document_table(self._folder, self._lines, self._first_chunk)
    return {'documents': self.documents, 'chunks': self.chunks,
            'tokens': int(sum(map(np.sum, self._columns['valid_length']))),
            'text_bytes': int(sum(map(np.sum, self._columns['text_bytes'])))}


def write_document_table(
    folder: Path, lines: Sequence[bytes], first_chunk: Sequence[int]) -> None:
  """The documents of a shard, where each line begins, and where each one's chunks do."""
  (folder / 'documents.jsonl').write_bytes(b''.join(lines))
  storage.save_array(folder / 'document_line.npy', np.cumsum([0, *map(len, lines)]).astype('<i8'))
  storage.save_array(folder / 'document_chunk.npy', np.asarray(first_chunk, '<i8'))


def _documents(
    shard: Any, folder: Path, shuffle_seed: int | None, without: frozenset[str]
) -> Iterator[Any]:
  """Documents of one input in their order, or permuted by `shuffle_seed`."""
  documents = (d for d in shard.documents() if not without or sha_of_id(d.id) not in without)
  if shuffle_seed is None:
    yield from documents
    return
  # A permutation has to know them all; the text waits on disk, not in memory.
  spool = folder / 'spool'
  offsets, make = [0], None
  with open(spool, 'wb') as f:
    for document in documents:
      make = make or type(document)
      fields = {field.name: getattr(document, field.name)
                for field in dataclasses.fields(document)}
      fields['metadata'] = dict(fields['metadata'])
      offsets.append(offsets[-1] + f.write(json.dumps(fields, default=str).encode() + b'\n'))
  with open(spool, 'rb') as f:
    for i in np.random.default_rng(shuffle_seed).permutation(len(offsets) - 1):
      f.seek(offsets[i])
      yield make(**json.loads(f.read(offsets[i + 1] - offsets[i])))
  spool.unlink()


def sha_of_id(document_id: str) -> str:
  """What is kept of the id of a document that was compacted away."""
  return hashlib.sha256(document_id.encode('utf-8', 'surrogatepass')).hexdigest()


def shards_of(task: stages.Task) -> list[Shard]:
  """The shards of an input that has been cut."""
  manifest = task.manifest()
  content = storage.content_fingerprint(manifest)
  name = task.folder.rstrip('/').rsplit('/', 1)[-1]
  return [Shard(name, i, part['chunks'], part['documents'], content,
                manifest['files'][f'{i:05d}/tokens.npy']['sha256'])
          for i, part in enumerate(manifest['parts'])]


def embedding_tasks(
    folder: str | os.PathLike, shards: Sequence[Shard], vocabulary: Any, embedder: Any
) -> list[stages.Task]:
  """One task a shard: the embedding of each of its chunks."""
  return [stages.Task(
      folder=files.join(folder, 'embeddings', shard.name), kind=EMBEDDINGS_KIND,
      inputs={'format_version': FORMAT_VERSION, 'tokens': shard.tokens,
              'vocabulary': vocabulary.fingerprint, 'embedder': embedder.fingerprint},
      make=functools.partial(
          _make_embeddings, files.join(folder, 'chunks', shard.input), shard.part,
          vocabulary.path, embedder),
      weight=shard.chunks) for shard in shards]


@functools.lru_cache(maxsize=2)
def _resident_embedder(embedder: Any) -> Any:
  """The first of equal embedders that this process saw: it has its weights loaded."""
  return embedder


def _make_embeddings(
    chunks: str, part: int, vocabulary_path: str, embedder: Any, folder: Path,
    manifest: dict[str, Any]) -> None:
  """Embeds the chunks of one shard; the pure function of the stage."""
  del manifest
  vocabulary, embedder = _vocabulary(vocabulary_path), _resident_embedder(embedder)
  local = files.fetch_tree(chunks)
  tokens = database_lib.open_column(Path(local) / f'{part:05d}' / 'tokens.npy')

  def blocks() -> Iterator[np.ndarray]:
    for first in range(0, len(tokens), _EMBED_AT_ONCE):
      block = tokens[first:first + _EMBED_AT_ONCE]
      vectors = embedder.embed([vocabulary.decode(row.tolist()) for row in block])
      with np.errstate(over='ignore'):
        stored = vectors.astype('<f2')
      if not np.isfinite(stored).all():
        raise UserError(f'{embedder.describe()}: an embedding is not finite in float16; '
                        'use an embedder whose values stay below 65504')
      yield stored

  storage.save_blocks(
      folder / 'embedding.npy', (len(tokens), embedder.dimension), '<f2', blocks())


def with_embedding(shard: Shard, task: stages.Task) -> Shard:
  """The shard with the checksum of its embeddings."""
  return dataclasses.replace(
      shard, embedding=task.manifest()['files']['embedding.npy']['sha256'])


def ids_task(folder: str | os.PathLike, shards: Sequence[Shard]) -> stages.Task:
  """The table that leads from a document's id to the document; finds ids that come twice."""
  return stages.Task(
      folder=files.join(folder, 'ids'), kind=IDS_KIND,
      inputs={'format_version': FORMAT_VERSION,
              'shards': storage.fingerprint([(s.input, s.part, s.content) for s in shards])},
      make=functools.partial(_make_ids, str(folder), list(shards)))


def _make_ids(
    database: str, shards: Sequence[Shard], folder: Path, manifest: dict[str, Any]) -> None:
  """Sorts hashes of all ids into buckets, a bounded number of documents at a time."""
  total = sum(shard.documents for shard in shards)
  bits = max(0, math.ceil(math.log2(max(1, total) / _IDS_AT_ONCE)))
  manifest['id_bits'] = bits
  spools = [open(folder / f'.bucket-{b}', 'wb') for b in range(1 << bits)]
  first = 0
  for shard in shards:
    hashes = np.array([database_lib.id_hash(json.loads(line)['id'])
                       for line in _table(database, shard)], np.uint64)
    ordinals = first + np.arange(len(hashes), dtype=np.int64)
    buckets = (hashes >> np.uint64(64 - bits)).astype(int) if bits else np.zeros(len(hashes), int)
    for bucket in np.unique(buckets):
      here = buckets == bucket
      spools[bucket].write(np.stack([hashes[here].view(np.int64), ordinals[here]], 1).tobytes())
    first += shard.documents
  for bucket, spool in enumerate(spools):
    spool.close()
    rows = np.fromfile(spool.name, np.int64).reshape(-1, 2)
    os.unlink(spool.name)
    hashes = rows[:, 0].view(np.uint64)
    order = np.argsort(hashes, kind='stable')
    hashes, ordinals = hashes[order], rows[order, 1]
    _refuse_copies(database, shards, hashes, ordinals)
    storage.save_array(folder / f'hash-{bucket:02d}.npy', hashes)
    storage.save_array(folder / f'ordinal-{bucket:02d}.npy', ordinals)


def _table(database: str, shard: Shard) -> Iterator[bytes]:
  chunks = files.join(database, 'chunks', shard.input)
  local = files.fetch_tree(chunks)
  with open(Path(local) / f'{shard.part:05d}' / 'documents.jsonl', 'rb') as f:
    yield from f


def _refuse_copies(
    database: str, shards: Sequence[Shard], hashes: np.ndarray, ordinals: np.ndarray) -> None:
  """Raises UserError for two documents of one id (equal hashes alone are no offence)."""
  starts = np.cumsum([0] + [shard.documents for shard in shards])

  def document(ordinal: int) -> dict[str, Any]:
    shard = int(np.searchsorted(starts, ordinal, 'right')) - 1
    line = next(itertools.islice(_table(database, shards[shard]),
                                 int(ordinal - starts[shard]), None))
    return json.loads(line)

  for i in np.flatnonzero(hashes[1:] == hashes[:-1]):
    a, b = document(ordinals[i]), document(ordinals[i + 1])
    if a['id'] == b['id']:
      places = ' and '.join(sorted(x['place'] or x['source'] for x in (a, b)))
      raise UserError(f'document id {a["id"]!r} comes twice, at {places}; ids must be unique: '
                      'name another id field or remove the copy')


def build_chunk_database(
    folder: str | os.PathLike, source: Any, vocabulary: Any, config: DatabaseConfig = (
        DatabaseConfig()), embedder: Any | None = None,
    runner: stages.Runner = stages.HERE, add: bool = False) -> ChunkDatabase:
  """Cuts every document of `source` into chunks and embeds them; does only what is not done.

  The result depends on the arguments but `runner` alone. Documents that `add` brought into
  the store stay until they are removed.

  Args:
    folder: where the store is to lie.
    source: a source of documents (data/corpus.py).
    vocabulary: a `Vocabulary`.
    config: the settings.
    embedder: turns texts into vectors (retrieval/embedders.py); None stores no embeddings.
    runner: who runs the stages.
    add: keep all inputs that the store has, and put those of `source` behind them.

  Raises:
    UserError: no text at all, two documents with one id, or another builder is at work.
  """
  with stages.building_in(folder, runner):
    before = existing_manifest(folder)
    tasks, kept = planned_chunks(folder, source, vocabulary, config, before, add)
    _run(folder, runner, 'chunks', tasks, 'bytes')
    shards = [shard for task in tasks for shard in shards_of(task)]
    counts = {key: sum(part[key] for task in tasks for part in task.manifest()['parts'])
              for key in ('documents', 'chunks', 'tokens', 'text_bytes')}
    if not counts['chunks']:
      raise UserError(f'{json.dumps(source.describe(), default=str)[:200]}: no text in its '
                      f'{counts["documents"]} documents; check the pattern or field names')
    if embedder:
      embed = embedding_tasks(folder, shards, vocabulary, embedder)
      _run(folder, runner, 'embeddings', embed, 'chunks')
      shards = [with_embedding(shard, task) for shard, task in zip(shards, embed)]
    ids = ids_task(folder, shards)
    _run(folder, runner, 'document ids', [ids], 'tables')
    if runner.leads:
      _finish(folder, tasks, shards, counts, vocabulary, config, embedder, ids, kept, before)
  return ChunkDatabase.open(folder)


def _run(folder: str | os.PathLike, runner: stages.Runner, label: str,
         tasks: Sequence[stages.Task], unit: str) -> None:
  """Runs a stage; from its first change on, readers find no store until it is whole again."""
  if runner.leads and stages.pending(tasks):
    withdraw(folder)
  runner.run(label, tasks, unit)


def withdraw(folder: str | os.PathLike) -> None:
  """Takes the manifest away from readers, but keeps what it says for the build."""
  path = files.join(folder, storage.MANIFEST)
  if files.exists(path):
    files.write_bytes(files.join(folder, _WITHDRAWN), files.read_bytes(path))
    files.remove_tree(path)


def existing_manifest(folder: str | os.PathLike) -> dict[str, Any]:
  """The manifest of a store that is there or was being changed; empty where there is none."""
  damaged = False
  for name in (storage.MANIFEST, _WITHDRAWN, storage.DAMAGED):
    path = files.join(folder, name)
    if files.exists(path):
      try:
        manifest = json.loads(files.read_bytes(path))
      except ValueError:
        manifest = None
      if isinstance(manifest, dict) and storage.manifest_is_whole(manifest):
        return manifest
      damaged = True
  return _recovered(folder) if damaged else {}


def _recovered(folder: str | os.PathLike) -> dict[str, Any]:
  """What can be told of a store whose manifest was damaged: its inputs, all as if added.

  So that a build keeps documents whose source it is not given, and leaves out those that were
  compacted away.
  """
  names = files.list_folder(files.join(folder, 'chunks'))
  manifests = {}
  for name in names:
    there = files.join(folder, 'chunks', name)
    if storage.is_whole(there, CHUNKS_KIND):
      manifests[name] = storage.read_manifest(there, CHUNKS_KIND)
  return {'shards': [{'input': name} for name in manifests], 'added': list(manifests),
          'compacted': {name: manifest['inputs']['without']
                        for name, manifest in manifests.items() if 'without' in manifest['inputs']}}


def publish(folder: str | os.PathLike, manifest: Mapping[str, Any]) -> None:
  """Gives readers the store."""
  storage.write_manifest(folder, manifest)
  for name in (_WITHDRAWN, storage.DAMAGED):
    if files.exists(files.join(folder, name)):
      files.remove_tree(files.join(folder, name))


def planned_chunks(
    folder: str | os.PathLike, source: Any, vocabulary: Any, config: DatabaseConfig,
    before: Mapping[str, Any], add: bool) -> tuple[list[stages.Task], list[str]]:
  """The tasks of the first stage, and the names of inputs that earlier `add`s brought.

  Raises:
    UserError: an input that was added cannot be cut anew, since its source is not given.
  """
  compacted = before.get('compacted', {})
  tasks = chunk_tasks(folder, source.shards(), vocabulary, config, compacted)
  names = [task.folder.rsplit('/', 1)[-1] for task in tasks]
  have = list(dict.fromkeys(shard['input'] for shard in before.get('shards', ())))
  added = [name for name in before.get('added', ()) if name in have]
  if add:
    added += [name for name in names if name not in have]
    kept = [name for name in have if name not in names]
    order = have + [name for name in names if name not in have]
  else:
    # What the source has by now is no addition any more.
    kept = added = [name for name in added if name not in names]
    order = names + kept
  wanted = {'vocabulary': vocabulary.fingerprint, **dataclasses.asdict(config)}
  by_name = dict(zip(names, tasks))
  for name in kept:
    there = files.join(folder, 'chunks', name)
    manifest = storage.read_manifest(there, CHUNKS_KIND)
    changed = [k for k, v in wanted.items() if manifest['inputs'].get(k) != v]
    if changed:
      raise UserError(f'{there}: was cut with another {", ".join(changed)}, and its source is not '
                      'given now; run the build with that source, or use the same settings')
    by_name[name] = stages.Task(there, CHUNKS_KIND, manifest['inputs'], _cannot_make)
  return [by_name[name] for name in order], added


def _cannot_make(folder: Path, manifest: dict[str, Any]) -> None:
  raise UserError(f'{folder.name}: damaged, and its source is not given now; '
                  'run `build_database.py add` with that source')


def _finish(
    folder: str | os.PathLike, tasks: Sequence[stages.Task], shards: Sequence[Shard],
    counts: Mapping[str, int], vocabulary: Any, config: DatabaseConfig, embedder: Any | None,
    ids: stages.Task, added: Sequence[str], before: Mapping[str, Any]) -> None:
  """Removes what no input stands for any more, and writes the manifest, which makes the store."""
  compacted = {k: v for k, v in before.get('compacted', {}).items()
               if any(s.input == k for s in shards)}
  manifest = {
      'kind': KIND, 'format_version': FORMAT_VERSION,
      'chunk_length': config.chunk_length,
      'vocabulary': {'size': vocabulary.size, 'fingerprint': vocabulary.fingerprint},
      'embedder': embedder and {
          'fingerprint': embedder.fingerprint, 'dimension': embedder.dimension,
          'description': embedder.describe()},
      'config': dataclasses.asdict(config),
      'counts': counts,
      'shards': [dataclasses.asdict(shard) for shard in shards],
      'added': list(added), 'compacted': compacted,
      'id_bits': ids.manifest()['id_bits'],
      'report': _sum_reports(task.manifest()['report'] for task in tasks),
      'files': {},
  }
  model = files.read_bytes(vocabulary.path)
  manifest['files'][database_lib.VOCABULARY] = {
      'bytes': len(model), 'sha256': hashlib.sha256(model).hexdigest()}
  current = storage.is_whole(folder, KIND)
  if current and storage.as_json({**manifest, 'checksum': before.get('checksum')}) == before:
    return
  files.write_bytes(files.join(folder, database_lib.VOCABULARY), model)
  for name in sweep(folder, shards, bool(embedder)):
    print(f'database {folder}: removed {name}, which no input stands for any more', flush=True)
  publish(folder, manifest)


def sweep(folder: str | os.PathLike, shards: Sequence[Shard], embeddings: bool) -> list[str]:
  """Removes folders of shards that are not in the list; returns their names."""
  if files.is_remote(folder):
    return []
  keep = {'chunks': {s.input for s in shards},
          'embeddings': {s.name for s in shards} if embeddings else set()}
  gone = [path for stage, names in keep.items() if (Path(folder) / stage).is_dir()
          for path in sorted((Path(folder) / stage).iterdir()) if path.name not in names]
  for path in gone:
    shutil.rmtree(path)
  return [str(path.relative_to(folder)) for path in gone]


def _sum_reports(reports: Any) -> dict[str, Any]:
  total: dict[str, Any] = {}
  for report in reports:
    for key, value in report.items():
      total[key] = total[key] + value if key in total else value
  total['skipped_places'] = total.get('skipped_places', [])[:corpus.PLACES_KEPT]
  return total
