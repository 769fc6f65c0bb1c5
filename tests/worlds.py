"""Small real corpora, stores and records for the tests of retrieval and data."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np

from retro_jax.data import vocabulary as vocabulary_lib
from retro_jax.data.corpus import Document, JsonLines
from retro_jax.retrieval import database as database_lib
from retro_jax.retrieval import database_build, pipeline
from retro_jax.retrieval.database_build import DatabaseConfig
from retro_jax.retrieval.embedders import LexicalEmbedder

WORDS = ('def return self import class None True the of a model layer chunk token neighbour '
         'retro jax array shape for in range print value key 🙂 数据 text file read').split()


def text(rng: np.random.Generator, words: int) -> str:
  """Words and line ends that look a little like code."""
  chosen = rng.choice(WORDS, words)
  ends = rng.choice([' ', '  ', '\n', '\n    ', '(', ') '], words)
  return ''.join(w + e for w, e in zip(chosen, ends))


def documents(seed: int, count: int, longest: int = 120, prefix: str = 'doc') -> list[Document]:
  """Some documents; a few repeat another's text, so that distances tie."""
  rng = np.random.default_rng(seed)
  texts = [text(rng, int(rng.integers(1, longest))) for _ in range(count)]
  for i in range(3, count, 4):
    texts[i] = texts[i - 3] + texts[i - 2]
  return [Document(f'{prefix}-{i}', t, title=f'Title {i}', source='test', metadata={'n': i})
          for i, t in enumerate(texts)]


def write_source(path: Path, rows: list[Document]) -> JsonLines:
  """The documents as a JSON-lines file."""
  path.write_text(''.join(json.dumps({'id': d.id, 'text': d.text, 'title': d.title}) + '\n'
                          for d in rows), encoding='utf-8')
  return JsonLines(str(path))


@functools.cache
def vocabulary() -> vocabulary_lib.Vocabulary:
  """A small vocabulary, trained once a process."""
  folder = tempfile.mkdtemp(prefix='retro-jax-test-')
  rng = np.random.default_rng(0)
  return vocabulary_lib.train_vocabulary(
      (text(rng, 200) for _ in range(50)), Path(folder) / 'v.model', 384)


def content(folder: Path) -> dict[str, bytes]:
  """Every file under a folder."""
  return {str(p.relative_to(folder)): p.read_bytes()
          for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def embedder(dimension: int = 16) -> LexicalEmbedder:
  """A cheap embedder of text."""
  return LexicalEmbedder(dimension)


def store(folder: Path, rows: list[Document], chunk_length: int = 8, dimension: int = 16,
          chunks_per_shard: int = 40, shuffle_seed: int | None = None,
          tokenizer: vocabulary_lib.Vocabulary | None = None) -> database_lib.ChunkDatabase:
  """A chunk store of these documents, in tokens of `vocabulary()` or of another."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  source = write_source(folder.with_suffix('.jsonl'), rows)
  return database_build.build_chunk_database(
      folder, source, tokenizer or vocabulary(),
      DatabaseConfig(chunk_length, chunks_per_shard, shuffle_seed), embedder(dimension))


def examples(folder: Path, rows: list[Document], sequence_length: int = 32,
             num_neighbors: int = 3, examples_per_shard: int = 4,
             tokenizer: vocabulary_lib.Vocabulary | None = None):
  """Store, index and records of these documents, chunk length 8; returns store and records."""
  db = store(folder / 'db', rows, tokenizer=tokenizer)
  pipeline.build_index(folder / 'index', db)
  return db, pipeline.build_examples(
      folder / 'examples', db, db, folder / 'index', pipeline.ExamplesConfig(
          sequence_length, num_neighbors, margin=2, examples_per_shard=examples_per_shard))
