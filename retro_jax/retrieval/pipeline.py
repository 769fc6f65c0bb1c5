"""The offline stages in order: vocabulary, chunks, embeddings, index, neighbours, records.

Each stage is a function of a frozen config and of what came before. It says in one line
what it does, or that it is skipped because the folder is current; changed inputs build the
folder anew, and a killed stage leaves the old one or none. What a stage writes is defined
in database.py, index.py and data/records.py.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax import storage
from retro_jax.data import records
from retro_jax.data.vocabulary import Vocabulary, train_vocabulary
from retro_jax.errors import UserError
from retro_jax.progress import Progress
from retro_jax.retrieval import database as database_lib
from retro_jax.retrieval import index as index_lib
from retro_jax.retrieval import search
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.index import Index, IndexConfig
from retro_jax.retrieval.policies import Policy, PolicyConfig

# Chunks searched together: bounds memory, and how often progress is shown.
_CHUNKS_AT_ONCE = 2048


@dataclasses.dataclass(frozen=True)
class DatabaseConfig:
  """How documents become a chunk store.

  Attributes:
    chunk_length: m (paper: 64).
    documents_per_shard: documents that share a set of files.
    shuffle_seed: permutes the documents; None keeps their order.
  """

  chunk_length: int = 64
  documents_per_shard: int = 4096
  shuffle_seed: int | None = 0


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
  """How a chunk store becomes training examples.

  Attributes:
    sequence_length: n, a multiple of the chunk length (paper: 2048).
    num_neighbors: K stored a chunk, at least the k of training.
    margin: candidates beyond K asked for before the policy filters.
    kind: 'nearest', or 'random' for the control.
    seed: of the random neighbours.
    examples_per_shard: records in a file.
    policy: which neighbours are allowed.
  """

  sequence_length: int = 2048
  num_neighbors: int = 10
  margin: int = 32
  kind: str = 'nearest'
  seed: int = 0
  examples_per_shard: int = 4096
  policy: PolicyConfig = PolicyConfig()


def build_vocabulary(path: str | os.PathLike, source: Any, size: int, seed: int = 0) -> Vocabulary:
  """Stage 0: a vocabulary trained on a sample of a source.

  What it was trained on stands beside it in `path`.inputs. A model without that file is someone
  else's: it is loaded, never replaced.

  Args:
    path: the SentencePiece model.
    source: of documents.
    size: number of pieces; 0 only loads.
    seed: of the sample.

  Raises:
    UserError: nothing to load, a model that is unfit, or too little text for the size.
  """
  facts = Path(f'{path}.inputs')
  if not size or (Path(path).exists() and not facts.exists()):
    vocabulary = Vocabulary.load(path)
    print(f'vocabulary {path}: loaded, {vocabulary.size:,} pieces', flush=True)
    return vocabulary
  inputs = {'source': source.describe(), 'size': size, 'seed': seed}
  if Path(path).exists() and facts.read_text(encoding='utf-8') == storage.fingerprint(inputs):
    vocabulary = Vocabulary.load(path)
    print(f'vocabulary {path}: current, skipped; {vocabulary.size:,} pieces', flush=True)
    return vocabulary
  # In this order no kill can leave a model beside inputs that are not its own.
  Path(path).unlink(missing_ok=True)
  with storage.atomic_file(facts) as file:
    file.write(storage.fingerprint(inputs))
  vocabulary = train_vocabulary(
      (document.text for document in source.documents()), path, size, seed)
  print(f'vocabulary {path}: trained, {vocabulary.size:,} pieces', flush=True)
  return vocabulary


def build_database(
    folder: str | os.PathLike, source: Any, vocabulary: Any, embedder: Any | None,
    config: DatabaseConfig = DatabaseConfig()) -> ChunkDatabase:
  """Stage 1: a chunk store from a source of documents.

  Raises:
    UserError: no text, or two documents with one id.
  """
  before = _identity(folder)
  database = database_lib.build_chunk_database(
      folder, source, vocabulary, config.chunk_length, embedder,
      documents_per_shard=config.documents_per_shard, shuffle_seed=config.shuffle_seed)
  said = 'current, skipped' if _identity(folder) == before else 'built'
  print(f'database {folder}: {said}; {database_lib.describe(database)}', flush=True)
  report = getattr(source, 'report', None)
  if said == 'built' and report is not None:
    print(f'database {folder}: {report}', flush=True)
  return database


def build_index(
    folder: str | os.PathLike, database: ChunkDatabase, config: IndexConfig = IndexConfig()
) -> Index:
  """Stage 2: an index over the embeddings of a store.

  Raises:
    UserError: the store has no embeddings, or the settings are wrong.
  """
  before = _identity(folder)
  if storage.is_current(folder, index_lib.KIND, index_lib.index_inputs(
      config, database.embedding_fingerprint)):
    index = index_lib.load_index(folder, database.embedding_fingerprint)
  else:
    dimension = database.embedding_dimension
    vectors = np.empty((database.num_chunks, dimension), np.float16)
    for first, block in database.embedding_blocks():
      vectors[first:first + len(block)] = block
    index = index_lib.build_index(
        folder, vectors, config, fingerprint=database.embedding_fingerprint)
  said = 'current, skipped' if _identity(folder) == before else 'built'
  recall = storage.read_manifest(folder, index_lib.KIND)['recall']
  print(f'index {folder}: {said}; {index.kind}, {index.size:,} vectors, '
        f'recall@{recall["at"]} {recall["recall"]:.4f}', flush=True)
  return index


def build_examples(
    folder: str | os.PathLike,
    queries: ChunkDatabase,
    database: ChunkDatabase,
    index_folder: str | os.PathLike | None,
    config: ExamplesConfig = ExamplesConfig(),
) -> records.Examples:
  """Stage 3: the sequences of a store, with neighbours from a database, as TFRecords.

  Args:
    folder: where the records are to lie.
    queries: the store whose chunks make up the sequences.
    database: the store that is searched; may be the same.
    index_folder: an index over `database`; random neighbours need none.
    config: the settings.

  Raises:
    UserError: stores that do not fit each other or the index, or wrong settings.
  """
  records.check_multiple(config.sequence_length, queries.chunk_length)
  search.check_same_space(queries, database)
  if config.kind not in ('nearest', 'random'):
    raise UserError(f"neighbour kind {config.kind!r} is unknown; expected 'nearest' or 'random'")
  if config.num_neighbors < 1 or config.examples_per_shard < 1 or config.margin < 0:
    raise UserError(
        f'num_neighbors is {config.num_neighbors}, examples_per_shard {config.examples_per_shard}, '
        f'margin {config.margin}; expected at least 1, 1 and 0')
  policy = Policy(config.policy, queries, database)
  index_manifest = None
  if config.kind == 'nearest':
    if index_folder is None:
      raise UserError(
          f'{folder}: nearest neighbours need an index; build one over {database.folder}')
    index_manifest = storage.read_manifest(index_folder, index_lib.KIND)
  inputs = {
      'format_version': records.FORMAT_VERSION,
      'config': {**dataclasses.asdict(config), 'policy': policy.description},
      'queries': queries.fingerprint,
      'database': database.fingerprint,
      'index': index_manifest and storage.fingerprint(index_manifest['files']),
  }
  if storage.is_current(folder, records.KIND, inputs):
    examples = records.Examples(folder)
    print(f'examples {folder}: current, skipped; {len(examples):,} sequences', flush=True)
    return examples
  index = None
  if config.kind == 'nearest':
    index = index_lib.load_index(index_folder, database.embedding_fingerprint)
  print(f'examples {folder}: {config.num_neighbors} {config.kind} neighbours for '
        f'{queries.num_chunks:,} chunks from {database.num_chunks:,}', flush=True)
  shape = records.ExampleShape(
      config.sequence_length, queries.chunk_length, config.num_neighbors,
      database_lib.token_dtype(queries.manifest['vocabulary']['size']).str)
  sequences = search.sequence_chunk_ids(queries.num_chunks, shape.num_chunks)
  manifest = {
      'kind': records.KIND, 'format_version': records.FORMAT_VERSION, 'inputs': inputs,
      **dataclasses.asdict(shape), 'retrieved_length': shape.retrieved_length,
      'num_examples': len(sequences), 'examples_per_shard': config.examples_per_shard,
      'vocabulary': queries.manifest['vocabulary'],
      'queries': {'folder': str(queries.folder), 'fingerprint': queries.fingerprint},
      'database': {'folder': str(database.folder), 'fingerprint': database.fingerprint},
      'index': index_manifest and {
          key: index_manifest.get(key) for key in ('search', 'settings', 'recall')},
      'neighbors': config.kind, 'policy': policy.description}
  with storage.building(folder, manifest) as temporary:
    _write(temporary, shape, queries, database, index, policy, sequences, config)
    manifest['policy'] = {**policy.description, 'denied_documents': policy.num_denied,
                          'counts': dict(policy.drops)}
  drops = policy.drops
  print(f'examples {folder}: {len(sequences):,} sequences; of {drops["chunks"]:,} chunks '
        f'{drops["chunks_with_fewer"]:,} have fewer than {config.num_neighbors} neighbours; '
        f'turned away {drops["same_document"]:,} of the same document, '
        f'{drops["deny_list"]:,} denied', flush=True)
  return records.Examples(folder)


def _write(
    folder: Any, shape: records.ExampleShape, queries: ChunkDatabase, database: ChunkDatabase,
    index: Index | None, policy: Policy, sequences: np.ndarray, config: ExamplesConfig) -> None:
  """Searches and writes block after block of sequences."""
  progress = Progress('neighbours', queries.num_chunks, 'chunks')
  writer = records.RecordWriter(folder, shape, len(sequences), config.examples_per_shard)
  at_once = max(1, _CHUNKS_AT_ONCE // shape.num_chunks)
  try:
    for first in range(0, len(sequences), at_once):
      block = sequences[first:first + at_once]
      if index is None:
        found = search.random_neighbors(
            queries, database, policy, block, config.num_neighbors, config.seed)
      else:
        found = search.neighbors_of_sequences(
            queries, database, index, policy, block, config.num_neighbors, config.margin)
      columns = sequence_columns(queries, block)
      retrieved, _ = database.with_continuation(found.ids)
      for i in range(len(block)):
        writer.write({name: column[i] for name, column in columns.items()},
                     {'ids': found.ids[i], 'distances': found.distances[i],
                      'tokens': retrieved[i]})
      progress.update(int((block >= 0).sum()))
  finally:
    writer.close()
  progress.close()


def sequence_columns(queries: ChunkDatabase, chunk_ids: np.ndarray) -> dict[str, np.ndarray]:
  """What `examples-*` records hold, for sequences of chunks [s, l]; -1 is padding."""
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


def _identity(folder: str | os.PathLike) -> tuple[int, int] | None:
  """Tells a folder from the one that replaces it."""
  try:
    stat = os.stat(folder)
  except FileNotFoundError:
    return None
  return stat.st_ino, stat.st_mtime_ns
