"""The chunk store: documents cut into chunks of m tokens, column by column, memory-mapped.

Reading one is here, and so is its format; building one is database_build.py's, removing
documents database_edit.py's. One class serves the database that is searched and the splits
that query it. Layout of a store:

  manifest.json                    kind 'chunk-database': counts, vocabulary, list of shards
  vocabulary.model                 what turns its tokens back into text
  removed.json                     documents that nobody may see any more (tombstones)
  chunks/INPUT/manifest.json       kind 'chunks': one input, cut into one or more shards
  chunks/INPUT/00000/tokens.npy        [C, m] uint16, or uint32 when the vocabulary needs it
  chunks/INPUT/00000/valid_length.npy  [C] int32, tokens that are not padding
  chunks/INPUT/00000/text_bytes.npy    [C] int32, UTF-8 bytes the chunk stands for
  chunks/INPUT/00000/document.npy      [C] int32, which document of the shard
  chunks/INPUT/00000/documents.jsonl   one line a document: id, title, source, bytes, ...
  chunks/INPUT/00000/document_line.npy   [D + 1] int64, where each line begins
  chunks/INPUT/00000/document_chunk.npy  [D + 1] int64, the first chunk of each document
  embeddings/INPUT-00000/embedding.npy   [C, d0] float16, where an embedder was given
  ids/hash-00.npy, ids/ordinal-00.npy    documents by a hash of their id, in buckets

Chunks and documents are numbered through all shards in order, a document's chunks are
consecutive, and no chunk holds text of two documents.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax import files, storage
from retro_jax.errors import UserError
from retro_jax.retrieval import stages

KIND = 'chunk-database'
CHUNKS_KIND, EMBEDDINGS_KIND, IDS_KIND = 'chunks', 'embeddings', 'document-ids'
FORMAT_VERSION = 2
PAD_ID = 0
REMOVED = 'removed.json'
VOCABULARY = 'vocabulary.model'
# Open memory maps are bounded by the operating system; few shards are read at a time.
_OPEN_COLUMNS = 4096


def token_dtype(vocabulary_size: int) -> np.dtype:
  """The smallest little-endian unsigned type that holds every id."""
  return np.dtype('<u2' if vocabulary_size <= 1 << 16 else '<u4')


def id_hash(document_id: str) -> int:
  """64 bits of a document id, equal on every machine."""
  data = document_id.encode('utf-8', 'surrogatepass')
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'little')


@dataclasses.dataclass(frozen=True)
class Shard:
  """One shard of a store, as its manifest lists it.

  Attributes:
    input: folder under chunks/ that it lies in.
    part: which shard of that input.
    chunks, documents: how many.
    content: fingerprint of all that was cut from its input.
    tokens: sha256 of its tokens, on which embeddings depend.
    embedding: sha256 of the embeddings, '' where there are none.
  """

  input: str
  part: int
  chunks: int
  documents: int
  content: str
  tokens: str
  embedding: str = ''

  @property
  def name(self) -> str:
    return f'{self.input}-{self.part:05d}'

  def chunks_folder(self, database: str | os.PathLike) -> Path:
    return Path(database) / 'chunks' / self.input / f'{self.part:05d}'

  def embedding_folder(self, database: str | os.PathLike) -> Path:
    return Path(database) / 'embeddings' / self.name


def open_column(path: Path) -> np.ndarray:
  """A memory-mapped `.npy` file.

  Raises:
    UserError: it is missing or cut short.
  """
  try:
    return np.load(path, mmap_mode='r')
  except (OSError, ValueError) as error:
    raise UserError(f'{path}: missing or damaged ({error}); run `build_database.py verify` on '
                    'the database and build it again') from None


class ShardedRows:
  """A column of several shards as one array: `len`, `shape`, rows by slice or by number."""

  def __init__(self, paths: Sequence[Path], lengths: Sequence[int]):
    self._paths = list(paths)
    self._starts = np.cumsum([0, *lengths])
    self._open = functools.lru_cache(_OPEN_COLUMNS)(lambda shard: open_column(self._paths[shard]))

  def __len__(self) -> int:
    return int(self._starts[-1])

  @functools.cached_property
  def _row(self) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of one row."""
    shard = int(np.argmax(np.diff(self._starts) > 0))
    column = self._open(shard)
    return column.shape[1:], column.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    return (len(self),) + self._row[0]

  @property
  def dtype(self) -> np.dtype:
    return self._row[1]

  def __getitem__(self, rows: Any) -> np.ndarray:
    """Rows of a slice or of an integer array of any shape; a copy.

    Raises:
      IndexError: there is no such row.
    """
    if isinstance(rows, slice):
      first, last, step = rows.indices(len(self))
      assert step == 1
      return self._between(first, last)
    ids = np.asarray(rows, np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
      raise IndexError(f'{self._paths[0].name}: rows {ids.min()}..{ids.max()} asked for, '
                       f'there are 0..{len(self) - 1}')
    shape, dtype = self._row
    result = np.empty(ids.shape + shape, dtype)
    shards = np.searchsorted(self._starts, ids, 'right') - 1
    for shard in np.unique(shards):
      here = shards == shard
      result[here] = self._open(int(shard))[ids[here] - self._starts[shard]]
    return result

  def _between(self, first: int, last: int) -> np.ndarray:
    pieces = [np.empty((0,) + self._row[0], self._row[1])]
    shard = int(np.searchsorted(self._starts, first, 'right')) - 1
    while first < last:
      start, end = self._starts[shard:shard + 2]
      stop = min(last, int(end))
      if stop > first:
        pieces.append(np.asarray(self._open(shard)[first - start:stop - start]))
      first, shard = stop, shard + 1
    return np.concatenate(pieces) if len(pieces) > 2 else pieces[-1]

  def part(self, first: int, last: int) -> 'ShardedRows':
    """Rows [first, last) as a column of their own; both are ends of shards."""
    a, b = np.searchsorted(self._starts, [first, last])
    return ShardedRows(self._paths[a:b], np.diff(self._starts)[a:b])


class ChunkDatabase:
  """Read access to a finished store; any array of chunk ids, of any shape, in one call.

  Attributes:
    location: where it lies, as it was given; `folder` is where its files are read.
    fingerprint: of the content of all columns and of what was removed.
    embedding_fingerprint: of the embeddings alone, which is what an index needs.
    removed: ordinals of the documents that nobody may see any more, int64, ascending.
  """

  def __init__(self, location: str | os.PathLike, manifest: dict[str, Any],
               folder: str | os.PathLike | None = None):
    """Use `ChunkDatabase.open`."""
    self.location = location
    self.folder = Path(location if folder is None else folder)
    self.manifest = manifest
    self.chunk_length: int = manifest['chunk_length']
    self.num_chunks: int = manifest['counts']['chunks']
    self.num_documents: int = manifest['counts']['documents']
    self.vocabulary_fingerprint: str = manifest['vocabulary']['fingerprint']
    embedder = manifest['embedder']
    self.embedding_dimension: int = embedder['dimension'] if embedder else 0
    self.embedder_fingerprint: str | None = embedder['fingerprint'] if embedder else None
    self.shards = [Shard(**shard) for shard in manifest['shards']]
    removed = read_removed(self.folder)
    self.fingerprint: str = storage.fingerprint(
        [[(s.content, s.part, s.embedding) for s in self.shards], self.chunk_length,
         manifest['vocabulary'], self.embedder_fingerprint, removed])
    self.embedding_fingerprint: str = storage.fingerprint([s.embedding for s in self.shards])
    self.chunk_starts = np.cumsum([0] + [s.chunks for s in self.shards])
    self.document_shard_starts = np.cumsum([0] + [s.documents for s in self.shards])
    ordinals = [self.ordinal_of(document) for document in removed]
    self.removed = np.array(sorted(o for o in ordinals if o is not None), np.int64)

  @classmethod
  def open(cls, folder: str | os.PathLike) -> 'ChunkDatabase':
    """Opens a finished store; a remote one is copied to the local cache first.

    Raises:
      UserError: nothing there, something else, another format version, or files missing.
    """
    local = files.fetch_tree(folder)
    manifest = storage.read_manifest(local, KIND)
    if manifest['format_version'] != FORMAT_VERSION:
      raise UserError(f'{folder}: format version {manifest["format_version"]}, '
                      f'expected {FORMAT_VERSION}; rebuild the {KIND}')
    return cls(folder, manifest, local)

  def tokens(self, ids: Any) -> np.ndarray:
    """Tokens of chunks `ids` [...]: int32 [..., m]; padding is 0."""
    return self._column('tokens')[ids].astype(np.int32)

  def valid_length(self, ids: Any) -> np.ndarray:
    """How many tokens of each chunk are not padding: int32 [...]."""
    return self._column('valid_length')[ids]

  def text_bytes(self, ids: Any) -> np.ndarray:
    """UTF-8 bytes that each chunk stands for: int32 [...]."""
    return self._column('text_bytes')[ids]

  def document(self, ids: Any) -> np.ndarray:
    """Ordinal of the document of each chunk: int64 [...]."""
    ids = np.asarray(ids, np.int64)
    shards = np.searchsorted(self.chunk_starts, ids, 'right') - 1
    return self._column('document')[ids] + self.document_shard_starts[shards]

  def embedding(self, ids: Any) -> np.ndarray:
    """Embeddings of chunks: float32 [..., d0]."""
    return self.embeddings[np.asarray(ids, np.int64)].astype(np.float32)

  @functools.cached_property
  def embeddings(self) -> ShardedRows:
    """All embeddings, float16 [chunks, d0], read as they are asked for.

    Raises:
      UserError: the store has none.
    """
    if not self.embedding_dimension:
      raise UserError(f'{self.folder}: was built without embeddings; '
                      'rebuild it with an embedder to search with or in it')
    return ShardedRows([s.embedding_folder(self.folder) / 'embedding.npy' for s in self.shards],
                       [s.chunks for s in self.shards])

  def embedding_blocks(self, rows: int = 65536) -> Iterator[tuple[int, np.ndarray]]:
    """All embeddings in order, as (first chunk id, float32 [at most `rows`, d0])."""
    vectors = self.embeddings
    for first in range(0, self.num_chunks, rows):
      yield first, vectors[first:first + rows].astype(np.float32)

  def with_continuation(self, ids: Any) -> tuple[np.ndarray, np.ndarray]:
    """[N, F] of each chunk: itself and what follows it in its document (paper, section 2.3).

    Args:
      ids: integers [...]; -1 means no chunk.

    Returns:
      tokens int32 [..., 2m], with F all padding where the document ends after N, and the
      number of tokens that are not padding, int32 [...]. All padding and 0 for id -1.
    """
    ids = np.asarray(ids, np.int64)
    there = ids >= 0
    this = np.where(there, ids, 0)
    following = np.minimum(this + 1, self.num_chunks - 1)
    continues = there & (following > this) & (self.document(following) == self.document(this))
    m = self.chunk_length
    tokens = np.zeros(ids.shape + (2 * m,), np.int32)
    tokens[there, :m] = self.tokens(this[there])
    tokens[continues, m:] = self.tokens(following[continues])
    lengths = np.zeros(ids.shape, np.int32)
    lengths[there] = self.valid_length(this[there])
    lengths[continues] += self.valid_length(following[continues])
    return tokens, lengths

  def document_info(self, ordinal: int) -> dict[str, Any]:
    """One document: id, title, source, bytes, metadata, place, first_chunk, num_chunks."""
    if not 0 <= ordinal < self.num_documents:
      raise IndexError(f'document {ordinal} of {self.num_documents}')
    shard = int(np.searchsorted(self.document_shard_starts, ordinal, 'right')) - 1
    local = int(ordinal - self.document_shard_starts[shard])
    folder = self.shards[shard].chunks_folder(self.folder)
    begin, end = self._in_shard(shard, 'document_line')[local:local + 2]
    with open(folder / 'documents.jsonl', 'rb') as f:
      f.seek(begin)
      info = json.loads(f.read(end - begin))
    first, last = self._in_shard(shard, 'document_chunk')[local:local + 2]
    return {**info, 'first_chunk': int(first + self.chunk_starts[shard]),
            'num_chunks': int(last - first)}

  def ordinal_of(self, document_id: str) -> int | None:
    """The ordinal of the document with this id, None when there is none."""
    bits = self.manifest['id_bits']
    hashed = id_hash(document_id)
    bucket = hashed >> (64 - bits) if bits else 0
    hashes, ordinals = self._bucket(bucket)
    first, last = np.searchsorted(hashes, np.uint64(hashed), 'left'), np.searchsorted(
        hashes, np.uint64(hashed), 'right')
    for place in range(int(first), int(last)):
      if self.document_info(int(ordinals[place]))['id'] == document_id:
        return int(ordinals[place])
    return None

  @property
  def document_ids(self) -> Sequence[str]:
    """Id of every document, by ordinal; for stores that fit in memory."""
    return self._document_ids

  @functools.cached_property
  def _document_ids(self) -> list[str]:
    return [self.document_info(i)['id'] for i in range(self.num_documents)]

  @functools.cached_property
  def document_starts(self) -> np.ndarray:
    """First chunk of each document and, last, the number of chunks: int64 [documents + 1]."""
    starts = [self._in_shard(i, 'document_chunk')[:-1] + self.chunk_starts[i]
              for i in range(len(self.shards))]
    return np.concatenate([*starts, [self.num_chunks]]).astype(np.int64)

  @functools.lru_cache(maxsize=16)  # pylint: disable=method-cache-max-size-none
  def _column(self, name: str) -> ShardedRows:
    return ShardedRows([s.chunks_folder(self.folder) / f'{name}.npy' for s in self.shards],
                       [s.chunks for s in self.shards])

  @functools.lru_cache(maxsize=_OPEN_COLUMNS)  # pylint: disable=method-cache-max-size-none
  def _in_shard(self, shard: int, name: str) -> np.ndarray:
    return open_column(self.shards[shard].chunks_folder(self.folder) / f'{name}.npy')

  @functools.lru_cache(maxsize=64)  # pylint: disable=method-cache-max-size-none
  def _bucket(self, bucket: int) -> tuple[np.ndarray, np.ndarray]:
    folder = self.folder / 'ids'
    return tuple(open_column(folder / f'{name}-{bucket:02d}.npy') for name in ('hash', 'ordinal'))


def read_removed(folder: str | os.PathLike) -> list[str]:
  """Ids of the documents removed from a store and not yet compacted away, sorted.

  Raises:
    UserError: the list was damaged.
  """
  path = Path(folder) / REMOVED
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return []
  except ValueError:
    content = {}
  if not storage.manifest_is_whole(content):
    raise UserError(f'{path}: was changed or cut short (its checksum is wrong); write it again '
                    'by removing the documents once more')
  return content['documents']


@stages.resident(8)
def _opened(folder: str, fingerprint: str) -> ChunkDatabase:
  database = ChunkDatabase.open(folder)
  if database.fingerprint != fingerprint:
    raise UserError(f'{folder}: changed while it was being used; run the command again')
  return database


def resident(folder: str | os.PathLike, fingerprint: str) -> ChunkDatabase:
  """The store of this content, opened once a process; for tasks.

  Raises:
    UserError: the store is another by now.
  """
  return _opened(str(folder), fingerprint)


def describe(database: ChunkDatabase) -> str:
  """One line about a store, for a person."""
  counts = database.manifest['counts']
  gone = f', {len(database.removed):,} documents removed' if len(database.removed) else ''
  return (f'{counts["documents"]:,} documents, {counts["chunks"]:,} chunks of '
          f'{database.chunk_length}, {counts["tokens"]:,} tokens, '
          f'{counts["text_bytes"] / 1e6:,.1f} MB of text in {len(database.shards):,} shards{gone}')
