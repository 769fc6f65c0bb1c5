"""The chunk store: documents cut into chunks of m tokens, column by column, memory-mapped.

One class serves the database that is searched and the splits that query it. Building one
lives here too; embedding models, the index and the search do not. Layout of a store:

  manifest.json               kind 'chunk-database'
  documents.jsonl             one line a document: id, title, source, bytes, metadata, chunks
  shard-00000/tokens.npy      [C, m] uint16, or uint32 when the vocabulary needs it
  shard-00000/valid_length.npy  [C] int32, tokens that are not padding
  shard-00000/text_bytes.npy  [C] int32, UTF-8 bytes the chunk stands for
  shard-00000/document.npy    [C] int32, ordinal of the document (its line in documents.jsonl)
  shard-00000/embedding.npy   [C, d0] float16, where an embedder was given

Chunks are numbered through all shards in order, a document's chunks are consecutive, and
no chunk holds text of two documents.
"""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax import storage
from retro_jax.data.chunking import chunk_documents
from retro_jax.errors import UserError
from retro_jax.progress import Progress

KIND = 'chunk-database'
FORMAT_VERSION = 1
PAD_ID = 0
_COLUMNS = ('tokens', 'valid_length', 'text_bytes', 'document')
# An embedder sorts these by length; each block is on disk before the next.
_EMBED_AT_ONCE = 16384


def token_dtype(vocabulary_size: int) -> np.dtype:
  """The smallest little-endian unsigned type that holds every id."""
  return np.dtype('<u2' if vocabulary_size <= 1 << 16 else '<u4')


class ChunkDatabase:
  """Read access to a finished store; any array of chunk ids, of any shape, in one call."""

  def __init__(self, folder: str | os.PathLike, manifest: dict[str, Any]):
    """Use `ChunkDatabase.open`."""
    self.folder = Path(folder)
    self.manifest = manifest
    self.chunk_length: int = manifest['chunk_length']
    self.num_chunks: int = manifest['counts']['chunks']
    self.num_documents: int = manifest['counts']['documents']
    self.vocabulary_fingerprint: str = manifest['vocabulary']['fingerprint']
    embedder = manifest['embedder']
    self.embedding_dimension: int = embedder['dimension'] if embedder else 0
    self.embedder_fingerprint: str | None = embedder['fingerprint'] if embedder else None
    # Of the content of all files, and of the embeddings alone, which is what an index needs.
    checksums = {name: facts['sha256'] for name, facts in manifest['files'].items()}
    self.fingerprint: str = storage.fingerprint(
        [checksums, self.chunk_length, manifest['vocabulary'], self.embedder_fingerprint])
    self.embedding_fingerprint: str = storage.fingerprint(
        [sha for name, sha in sorted(checksums.items()) if name.endswith('embedding.npy')])
    self._starts = np.cumsum([0] + manifest['counts']['chunks_by_shard'])

  @classmethod
  def open(cls, folder: str | os.PathLike) -> 'ChunkDatabase':
    """Opens a finished store.

    Raises:
      UserError: nothing there, something else, another format version, or files missing.
    """
    manifest = storage.read_manifest(folder, KIND)
    if manifest['format_version'] != FORMAT_VERSION:
      raise UserError(f'{folder}: format version {manifest["format_version"]}, '
                      f'expected {FORMAT_VERSION}; rebuild the {KIND}')
    return cls(folder, manifest)

  def tokens(self, ids: Any) -> np.ndarray:
    """Tokens of chunks `ids` [...]: int32 [..., m]; padding is 0."""
    return self._gather('tokens', ids).astype(np.int32)

  def valid_length(self, ids: Any) -> np.ndarray:
    """How many tokens of each chunk are not padding: int32 [...]."""
    return self._gather('valid_length', ids)

  def text_bytes(self, ids: Any) -> np.ndarray:
    """UTF-8 bytes that each chunk stands for: int32 [...]."""
    return self._gather('text_bytes', ids)

  def document(self, ids: Any) -> np.ndarray:
    """Ordinal of the document of each chunk: int32 [...]."""
    return self._gather('document', ids)

  def embedding(self, ids: Any) -> np.ndarray:
    """Embeddings of chunks: float32 [..., d0]."""
    self._needs_embeddings()
    return self._gather('embedding', ids).astype(np.float32)

  def embedding_blocks(self, rows: int = 65536) -> Iterator[tuple[int, np.ndarray]]:
    """All embeddings in order, as (first chunk id, float32 [at most `rows`, d0])."""
    self._needs_embeddings()
    for start, column in zip(self._starts, self._column('embedding')):
      for first in range(0, len(column), rows):
        yield int(start) + first, np.asarray(column[first:first + rows], np.float32)

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
    """One document: id, title, source, bytes, metadata, first_chunk, num_chunks."""
    if not 0 <= ordinal < self.num_documents:
      raise IndexError(f'document {ordinal} of {self.num_documents}')
    with open(self.folder / 'documents.jsonl', 'rb') as f:
      f.seek(self._document_offsets[ordinal])
      return json.loads(f.readline())

  def ordinal_of(self, document_id: str) -> int | None:
    """The ordinal of the document with this id, None when there is none."""
    return self._ordinals.get(document_id)

  @functools.cached_property
  def document_ids(self) -> Sequence[str]:
    """Id of every document, by ordinal."""
    return list(self._ordinals)

  @functools.cached_property
  def document_starts(self) -> np.ndarray:
    """First chunk of each document and, last, the number of chunks: int64 [documents + 1]."""
    counts = np.zeros(self.num_documents, np.int64)
    for column in self._column('document'):
      present, times = np.unique(column, return_counts=True)
      counts[present] += times
    return np.concatenate([[0], np.cumsum(counts)])

  @functools.cached_property
  def _ordinals(self) -> dict[str, int]:
    with open(self.folder / 'documents.jsonl', encoding='utf-8', newline='\n') as f:
      return {json.loads(line)['id']: i for i, line in enumerate(f)}

  @functools.cached_property
  def _document_offsets(self) -> np.ndarray:
    with open(self.folder / 'documents.jsonl', 'rb') as f:
      return np.cumsum([0] + [len(line) for line in f])

  @functools.cache  # pylint: disable=method-cache-max-size-none
  def _column(self, name: str) -> list[np.ndarray]:
    return [np.load(shard_folder(self.folder, i) / f'{name}.npy', mmap_mode='r')
            for i in range(len(self._starts) - 1)]

  def _gather(self, name: str, ids: Any) -> np.ndarray:
    ids = np.asarray(ids, np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= self.num_chunks):
      raise IndexError(f'{self.folder}: chunk ids {ids.min()}..{ids.max()} asked for, '
                       f'the store holds 0..{self.num_chunks - 1}')
    columns = self._column(name)
    if len(columns) == 1:
      return np.asarray(columns[0][ids])
    result = np.empty(ids.shape + columns[0].shape[1:], columns[0].dtype)
    shards = np.searchsorted(self._starts, ids, 'right') - 1
    for shard in np.unique(shards):
      here = shards == shard
      result[here] = columns[shard][ids[here] - self._starts[shard]]
    return result

  def _needs_embeddings(self) -> None:
    if not self.embedding_dimension:
      raise UserError(f'{self.folder}: was built without embeddings; '
                      'rebuild it with an embedder to search with or in it')


def shard_folder(folder: str | os.PathLike, shard: int) -> Path:
  """Where the columns of one shard lie."""
  return Path(folder) / f'shard-{shard:05d}'


def build_chunk_database(
    folder: str | os.PathLike,
    source: Any,
    vocabulary: Any,
    chunk_length: int,
    embedder: Any | None,
    *,
    documents_per_shard: int = 4096,
    shuffle_seed: int | None = 0,
) -> ChunkDatabase:
  """Cuts every document of `source` into chunks and embeds them; skips when current.

  The result depends on the arguments alone. Memory holds one document and one shard of
  tokens; a shuffle writes the documents to a temporary file in between.

  Args:
    folder: where the store is to lie.
    source: a source of documents (data/corpus.py).
    vocabulary: a `Vocabulary`.
    chunk_length: m.
    embedder: turns texts into vectors (retrieval/embedders.py); None stores no embeddings.
    documents_per_shard: how many documents share a set of files.
    shuffle_seed: permutes the documents before chunking, so that similar ones do not sit in
      the same training sequence; None keeps the order of the source.

  Raises:
    UserError: no text at all, or two documents with one id.
  """
  if chunk_length < 1 or documents_per_shard < 1:
    raise UserError(f'chunk_length is {chunk_length} and documents_per_shard is '
                    f'{documents_per_shard}, expected at least 1')
  inputs = {
      'format_version': FORMAT_VERSION,
      'source': source.describe(),
      'vocabulary': vocabulary.fingerprint,
      'embedder': embedder.fingerprint if embedder else None,
      'chunk_length': chunk_length,
      'documents_per_shard': documents_per_shard,
      'shuffle_seed': shuffle_seed,
  }
  if storage.is_current(folder, KIND, inputs):
    return ChunkDatabase.open(folder)
  manifest: dict[str, Any] = {
      'kind': KIND,
      'format_version': FORMAT_VERSION,
      'inputs': inputs,
      'chunk_length': chunk_length,
      'vocabulary': {'size': vocabulary.size, 'fingerprint': vocabulary.fingerprint},
      'embedder': embedder and {
          'fingerprint': embedder.fingerprint, 'dimension': embedder.dimension,
          'description': embedder.describe()},
  }
  with storage.building(folder, manifest) as temporary:
    documents = _documents(source, temporary, shuffle_seed)
    counts = _write_chunks(temporary, documents, vocabulary, chunk_length, documents_per_shard)
    if not counts['chunks']:
      raise UserError(f'{json.dumps(source.describe(), default=str)[:200]}: no text in its '
                      f'{counts["documents"]} documents; check the pattern or field names')
    manifest['counts'] = counts
    if embedder:
      _write_embeddings(temporary, counts, vocabulary, embedder)
  return ChunkDatabase.open(folder)


def _documents(source: Any, temporary: Path, shuffle_seed: int | None) -> Iterator[Any]:
  """Documents of `source`, each id once, in their order or permuted by `shuffle_seed`."""
  seen: set[str] = set()

  def unique() -> Iterator[Any]:
    for document in source.documents():
      if document.id in seen:
        raise UserError(f'document id {document.id!r} comes twice; ids must be unique: '
                        'name another id field or remove the copy')
      seen.add(document.id)
      yield document

  if shuffle_seed is None:
    yield from unique()
    return
  # A permutation has to know them all; the text waits on disk, not in memory.
  spool = temporary / 'spool'
  offsets, make = [0], None
  with open(spool, 'wb') as f:
    for document in unique():
      make = make or type(document)
      fields = {field.name: getattr(document, field.name)
                for field in dataclasses.fields(document)}
      fields['metadata'] = dict(fields['metadata'])
      offsets.append(offsets[-1] + f.write(json.dumps(fields, default=str).encode() + b'\n'))
  with open(spool, 'rb') as f:
    for i in np.random.default_rng(shuffle_seed).permutation(len(offsets) - 1):
      f.seek(offsets[i])
      yield make(**json.loads(f.readline()))
  spool.unlink()


def _write_chunks(
    folder: Path, documents: Iterator[Any], vocabulary: Any, chunk_length: int,
    documents_per_shard: int) -> dict[str, Any]:
  """Writes all columns but the embeddings, and documents.jsonl; returns the counts."""
  progress = Progress('chunks', None, 'documents')
  dtype = token_dtype(vocabulary.size)
  by_shard: list[int] = []
  pending: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
  ordinal = num_chunks = num_bytes = num_tokens = in_shard = 0

  def write_shard() -> None:
    nonlocal in_shard
    shard = shard_folder(folder, len(by_shard))
    shard.mkdir()
    rows = 0
    for name, parts in pending.items():
      empty = np.zeros((0, chunk_length) if name == 'tokens' else (0,), np.int32)
      column = np.concatenate([empty, *parts])
      np.save(shard / f'{name}.npy', column.astype(dtype if name == 'tokens' else '<i4'))
      rows = len(column)
      parts.clear()
    by_shard.append(rows)
    in_shard = 0

  with open(folder / 'documents.jsonl', 'w', encoding='utf-8', newline='\n') as table:
    # The cutter reads a batch of texts ahead; tee keeps their documents for so long.
    documents, texts = itertools.tee(documents)
    cut = chunk_documents((document.text for document in texts), vocabulary, chunk_length)
    for document, chunks in zip(documents, cut, strict=True):
      count, size = len(chunks.tokens), int(np.sum(chunks.text_bytes))
      pending['tokens'].append(chunks.tokens)
      pending['valid_length'].append(chunks.valid_length)
      pending['text_bytes'].append(chunks.text_bytes)
      pending['document'].append(np.full(count, ordinal, np.int32))
      line = {
          'id': document.id, 'title': document.title, 'source': document.source, 'bytes': size,
          'metadata': dict(document.metadata), 'first_chunk': num_chunks, 'num_chunks': count}
      table.write(json.dumps(line, default=str) + '\n')
      ordinal, num_chunks, num_bytes = ordinal + 1, num_chunks + count, num_bytes + size
      num_tokens += int(np.sum(chunks.valid_length))
      in_shard += 1
      if in_shard == documents_per_shard:
        write_shard()
      progress.update()
    if in_shard:
      write_shard()
  progress.close()
  return {'documents': ordinal, 'chunks': num_chunks, 'chunks_by_shard': by_shard,
          'tokens': num_tokens, 'text_bytes': num_bytes}


def _write_embeddings(
    folder: Path, counts: Mapping[str, Any], vocabulary: Any, embedder: Any) -> None:
  """Embeds every chunk into shard-*/embedding.npy, block after block."""
  progress = Progress('embeddings', counts['chunks'], 'chunks')
  for shard, rows in enumerate(counts['chunks_by_shard']):
    path = shard_folder(folder, shard) / 'embedding.npy'
    tokens = np.load(path.with_name('tokens.npy'), mmap_mode='r')
    column = np.lib.format.open_memmap(
        path, 'w+', dtype='<f2', shape=(rows, embedder.dimension)) if rows else np.zeros(
            (0, embedder.dimension), '<f2')
    for first in range(0, rows, _EMBED_AT_ONCE):
      block = tokens[first:first + _EMBED_AT_ONCE]
      texts = [vocabulary.decode(row.tolist()) for row in block]
      vectors = embedder.embed(texts, on_progress=progress.update)
      with np.errstate(over='ignore'):
        stored = vectors.astype('<f2')
      if not np.isfinite(stored).all():
        raise UserError(f'{embedder.describe()}: an embedding is not finite in float16; '
                        'use an embedder whose values stay below 65504')
      column[first:first + len(block)] = stored
    if rows:
      column.flush()
    else:
      np.save(path, column)
  progress.close()


def describe(database: ChunkDatabase) -> str:
  """One line about a store, for a person."""
  counts = database.manifest['counts']
  return (f'{counts["documents"]:,} documents, {counts["chunks"]:,} chunks of '
          f'{database.chunk_length}, {counts["tokens"]:,} tokens, '
          f'{counts["text_bytes"] / 1e6:,.1f} MB of text')
