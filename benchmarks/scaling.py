"""What each stage costs as the database grows: CPU seconds, peak memory, bytes on disk.

  python benchmarks/scaling.py --pattern='corpus/train-*.jsonl.gz' --output=scaling.json \\
      --picture=scaling.png

Builds databases of growing size from the same text, one process at a time, every stage in a
process of its own. Chunks are short (m = 16), so that a small corpus gives a million of them;
the embedder is the lexical one. Prints a table with the growth exponent of each stage between
neighbouring sizes, and extrapolates to the paper's 28 billion chunks.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax import storage
from retro_jax.data.corpus import JsonLines
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.retrieval import database_build, neighbor_build, pipeline, search, stages
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.database_build import DatabaseConfig
from retro_jax.retrieval.hashing_embedders import LexicalEmbedder
from retro_jax.retrieval.index import IndexConfig
from retro_jax.retrieval.policies import Policy, PolicyConfig
from retro_jax.retrieval.sharded_index import Index

SIZES = (10_000, 100_000, 300_000, 1_000_000)
QUERIES = 4096
CHUNK_LENGTH, DIMENSION = 16, 384
PAPER_CHUNKS = 28e9
CONFIG = DatabaseConfig(CHUNK_LENGTH, 65536)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--pattern', required=True, help='JSON lines of the corpus')
  parser.add_argument('--folder', default='runs/scaling', help='for everything made')
  parser.add_argument('--sizes', default=','.join(map(str, SIZES)), help='numbers of chunks')
  parser.add_argument('--output', default='', help='JSON file for the numbers')
  parser.add_argument('--picture', default='', help='PNG file')
  arguments = parser.parse_args()
  folder = Path(arguments.folder)
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  source = JsonLines(arguments.pattern)
  vocabulary = pipeline.build_vocabulary(folder / 'v.model', source, 8000)
  rows = []
  for size in map(int, arguments.sizes.split(',')):
    rows.append(measure(folder, source, vocabulary, size))
    print(table(rows), flush=True)
  result = {'pattern': arguments.pattern, 'chunk_length': CHUNK_LENGTH, 'dimension': DIMENSION,
            'queries': QUERIES, 'vectors_per_part': IndexConfig().vectors_per_part, 'rows': rows,
            'extrapolated': extrapolated(rows)}
  print('\n'.join(f'{k}: {v}' for k, v in result['extrapolated'].items()))
  if arguments.output:
    storage.write_json(arguments.output, result)
  if arguments.picture:
    picture(arguments.picture, rows)


def measure(folder: Path, source: Any, vocabulary: Vocabulary, size: int) -> dict[str, Any]:
  """One database of about `size` chunks, stage by stage."""
  corpus = folder / f'corpus-{size}'
  corpus.mkdir()
  cut(source, vocabulary, corpus, size)
  database, index = folder / f'db-{size}', folder / f'index-{size}'
  cost = {
      'chunk': in_process(chunk, corpus, database, vocabulary.path),
      'embed': in_process(embed, corpus, database, vocabulary.path),
      'index': in_process(build_index, database, index),
      'search': in_process(find, database, index),
      'records': in_process(write, database, index, folder / f'examples-{size}'),
  }
  opened = ChunkDatabase.open(database)
  cost['search']['queries'] = QUERIES
  on_disk = {'chunk': bytes_under(database / 'chunks'),
             'embed': bytes_under(database / 'embeddings'),
             'index': bytes_under(index), 'search': 0,
             'records': bytes_under(folder / f'examples-{size}')}
  for stage, number in on_disk.items():
    cost[stage]['disk_bytes'] = number
  return {'chunks': opened.num_chunks, 'text_bytes': opened.manifest['counts']['text_bytes'],
          'parts': len(Index.open(index, opened).ranges()), 'stages': cost}


def cut(source: Any, vocabulary: Vocabulary, corpus: Path, size: int) -> None:
  """Documents of the corpus until they make `size` chunks, in files of about 5 MB."""
  chunks = files = written = 0
  out = None
  for document in source.documents():
    if out is None or written > 5_000_000:
      out, written, files = open(corpus / f'{files:05d}.jsonl', 'w', encoding='utf-8'), 0, files + 1
    count = math.ceil((len(vocabulary.encode(document.text)) + 2) / CHUNK_LENGTH)
    written += out.write(json.dumps({'id': document.id, 'text': document.text}) + '\n')
    chunks += count
    if chunks >= size:
      break
  out.close()


def in_process(stage: Callable[..., None], *arguments: Any) -> dict[str, float]:
  """CPU and wall seconds and peak memory of a stage in a fresh process, its imports not counted."""
  context = multiprocessing.get_context('spawn')
  receive, send = context.Pipe(duplex=False)
  process = context.Process(target=_child, args=(send, stage, arguments))
  process.start()
  send.close()
  peak = 0
  while not receive.poll(0.02):
    peak = max(peak, anonymous_bytes(process.pid))
  cost = receive.recv()
  process.join()
  return {**cost, 'peak_bytes': peak}


def anonymous_bytes(pid: int) -> int:
  """Memory that a process holds now; pages of mapped files, which the system takes back, not."""
  try:
    lines = Path(f'/proc/{pid}/status').read_text(encoding='ascii').splitlines()
  except OSError:
    return 0
  return sum(int(line.split()[1]) * 1024 for line in lines
             if line.startswith(('RssAnon:', 'RssShmem:')))


def _child(send: Any, stage: Callable[..., None], arguments: tuple[Any, ...]) -> None:
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  cpu, wall = time.process_time(), time.monotonic()
  stage(*arguments)
  send.send({'cpu_seconds': time.process_time() - cpu, 'seconds': time.monotonic() - wall})


def chunk(corpus: Path, database: Path, vocabulary_path: str) -> None:
  source, vocabulary = JsonLines(f'{corpus}/*.jsonl'), Vocabulary.load(vocabulary_path)
  stages.HERE.run('chunks', database_build.chunk_tasks(
      database, source.shards(), vocabulary, CONFIG), 'bytes')


def embed(corpus: Path, database: Path, vocabulary_path: str) -> None:
  """Embeddings; the document ids and the manifest come with them."""
  database_build.build_chunk_database(
      database, JsonLines(f'{corpus}/*.jsonl'), Vocabulary.load(vocabulary_path), CONFIG,
      LexicalEmbedder(DIMENSION))


def build_index(database: Path, index: Path) -> None:
  pipeline.build_index(index, ChunkDatabase.open(database), IndexConfig(recall_at=2))


def sequences(database: ChunkDatabase) -> np.ndarray:
  """Whole sequences spread over the database, QUERIES chunks in all."""
  every = search.sequence_chunk_ids(database.num_chunks, 32)
  return every[np.linspace(0, len(every) - 2, QUERIES // 32).astype(int)]


def find(folder: Path, index: Path) -> None:
  """Neighbours of a fixed number of chunks."""
  database = ChunkDatabase.open(folder)
  search.neighbors_of_sequences(
      database, database, Index.open(index, database), Policy(PolicyConfig(), database, database),
      sequences(database), 2)


def write(folder: Path, index: Path, examples: Path) -> None:
  """Records of all sequences; random neighbours, so that no search is in it."""
  database = ChunkDatabase.open(folder)
  neighbor_build.build_examples(examples, database, database, None, neighbor_build.ExamplesConfig(
      32 * CHUNK_LENGTH, 2, kind='random'))


def bytes_under(folder: Path) -> int:
  return sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())


def exponent(before: dict[str, Any], after: dict[str, Any], stage: str) -> float:
  """p of cost ~ N^p between two sizes (of a search: per query)."""
  ratio = after['stages'][stage]['cpu_seconds'] / before['stages'][stage]['cpu_seconds']
  return math.log(ratio) / math.log(after['chunks'] / before['chunks'])


def table(rows: list[dict[str, Any]]) -> str:
  lines = [f'{"chunks":>10} {"parts":>5} {"stage":>8} {"CPU s":>8} {"growth":>7} {"per chunk":>11} '
           f'{"peak MiB":>9} {"disk B/chunk":>12}']
  for before, row in zip([None, *rows], rows):
    for stage, cost in row['stages'].items():
      grown = f'N^{exponent(before, row, stage):.2f}' if before else ''
      per = cost['cpu_seconds'] / (QUERIES if stage == 'search' else row['chunks'])
      lines.append(f'{row["chunks"]:>10,} {row["parts"]:>5} {stage:>8} {cost["cpu_seconds"]:>8.1f} '
                   f'{grown:>7} {per * 1e6:>8.1f} us {cost["peak_bytes"] / 2**20:>9,.0f} '
                   f'{cost["disk_bytes"] / row["chunks"]:>12.0f}')
  return '\n'.join(lines)


def extrapolated(rows: list[dict[str, Any]]) -> dict[str, str]:
  """From the largest size to the paper's, each stage by its last exponent, at least linear."""
  result = {}
  last = rows[-1]
  for stage, cost in last['stages'].items():
    grown = exponent(rows[-2], last, stage) if len(rows) > 1 else 1.0
    if stage == 'search':
      # A part costs the same whatever is beside it, and there are N / vectors_per_part of them.
      parts = PAPER_CHUNKS / IndexConfig().vectors_per_part
      per_query = cost['cpu_seconds'] / QUERIES / last['parts'] * parts
      result['search'] = (
          f'{per_query:,.1f} CPU seconds a query over {parts:,.0f} parts of today\'s size')
      continue
    seconds = cost['cpu_seconds'] * (PAPER_CHUNKS / last['chunks']) ** max(1.0, grown)
    size = cost['disk_bytes'] / last['chunks'] * PAPER_CHUNKS
    result[stage] = (f'{seconds / 3600:,.0f} CPU hours (N^{max(1.0, grown):.2f}), '
                     f'{size / 1e12:,.1f} TB on disk')
  return result


def picture(path: str, rows: list[dict[str, Any]]) -> None:
  """CPU seconds and peak memory by size."""
  import matplotlib
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
  sizes = [row['chunks'] for row in rows]
  for stage in rows[0]['stages']:
    cost = [row['stages'][stage] for row in rows]
    label = f'search of {QUERIES:,} chunks' if stage == 'search' else stage
    left.loglog(sizes, [c['cpu_seconds'] for c in cost], 'o-', label=label)
    right.semilogx(sizes, [c['peak_bytes'] / 2**30 for c in cost], 'o-', label=label)
  left.loglog(sizes, [rows[0]['stages']['embed']['cpu_seconds'] * s / sizes[0] for s in sizes],
              'k:', label='linear')
  left.set(xlabel='chunks', ylabel='CPU seconds', title='Time')
  right.set(xlabel='chunks', ylabel='GiB', title='Peak memory of the process', ylim=(0, None))
  left.legend(loc='lower right')
  figure.savefig(path, dpi=120)


if __name__ == '__main__':
  main()
