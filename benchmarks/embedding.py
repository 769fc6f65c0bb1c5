"""Chunks embedded for a CPU-second: BertEmbedder against sentence-transformers.

  python benchmarks/embedding.py --texts=train.jsonl.gz --peer_python=peer/bin/python

Both embed the same --count pieces of about 300 bytes (64 SentencePiece tokens) of real text
with the same checkpoint and number of threads, in turn, --rounds times; one warms up at a
time. Tokenising counts. Prints CPU-seconds, the ratio of chunks a CPU-second (median over the
rounds) and the largest difference of two vectors. --peer_python is an interpreter that has
sentence-transformers; it may be this one. `pip install torch sentence-transformers`, say,
into an environment of their own.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from contenders import ratio

# Reads the model, then one path of texts a line; writes vectors beside it and says the time.
PEER = """
import json, sys, time
import numpy, torch
from sentence_transformers import SentenceTransformer
folder, threads, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
model = SentenceTransformer(folder, device='cpu')
for line in sys.stdin:
  path = line.strip()
  with open(path) as file:
    texts = json.load(file)
  begin = time.process_time()
  vectors = model.encode(texts, batch_size=batch, show_progress_bar=False)
  seconds = time.process_time() - begin
  numpy.save(path + '.npy', vectors)
  print(seconds, flush=True)
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--texts', type=Path, required=True, help='JSON lines, .gz or not')
  parser.add_argument('--peer_python', default=sys.executable)
  parser.add_argument('--peer_batch', type=int, nargs='+', default=[32, 128],
                      help='batch sizes of the peer; the fastest counts (its default is 32)')
  parser.add_argument('--model', default='', help="BERT folder; '' for the installed MiniLM")
  parser.add_argument('--count', type=int, default=2000)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--threads', type=int, default=os.cpu_count())
  parser.add_argument('--output', type=Path, help='JSON file for the numbers')
  args = parser.parse_args()

  # Both pools of threads have as many as there are cores to run on; nobody spins.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.threads])
  os.environ.update(OMP_WAIT_POLICY='passive', OMP_NUM_THREADS=str(args.threads),
                    JAX_PLATFORMS='cpu', TF_CPP_MIN_LOG_LEVEL='3', TOKENIZERS_PARALLELISM='true')
  sys.path.insert(0, str(Path(__file__).parent))
  from tokenize_word_pieces import pieces

  from retro_jax import storage
  from retro_jax.retrieval.embedders import BertEmbedder

  # A sample of a stretch of the file that is a good deal longer.
  texts = [text for _, text in zip(range(20 * args.count), pieces(args.texts, 300))]
  texts = random.Random(0).sample(texts, args.count)
  embedder = BertEmbedder(args.model)

  def ours(some: list[str]) -> tuple[float, np.ndarray]:
    begin = time.process_time()
    vectors = embedder.embed(some)
    return time.process_time() - begin, vectors

  with tempfile.TemporaryDirectory() as folder:
    ways = {'ours': ours} | {
        f'peer, batch {size}': start_peer(args.peer_python, str(embedder._folder), args.threads,
                                          size, Path(folder)) for size in args.peer_batch}
    for embed in ways.values():
      embed(texts)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
      vectors = {}
      for name, embed in ways.items():
        spent, vectors[name] = embed(texts)
        seconds[name].append(spent)
        print(f'{name:20s} {spent:7.1f} CPU-s {len(texts) / spent:7.1f} chunks/CPU-s', flush=True)
  peers = {name: values for name, values in seconds.items() if name != 'ours'}
  best = min(peers, key=lambda name: statistics.median(peers[name]))
  result = {
      'chunks': len(texts), 'threads': args.threads, 'peer': best,
      'chunks_per_cpu_second': len(texts) / statistics.median(seconds['ours']),
      'peer_chunks_per_cpu_second': len(texts) / statistics.median(seconds[best]),
      'ratio': ratio(seconds[best], seconds['ours']),
      'largest_difference': float(np.abs(vectors['ours'] - vectors[best]).max()),
  }
  print(json.dumps(result, indent=2))
  if args.output:
    storage.write_json(args.output, result)


def start_peer(python: str, model: str, threads: int, batch: int,
               folder: Path) -> Callable[[list[str]], tuple[float, np.ndarray]]:
  """A process that embeds with sentence-transformers whenever it is asked."""
  process = subprocess.Popen([python, '-c', PEER, model, str(threads), str(batch)], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)

  def embed(texts: list[str]) -> tuple[float, np.ndarray]:
    path = folder / f'batch-{batch}.json'
    path.write_text(json.dumps(texts))
    process.stdin.write(f'{path}\n')
    process.stdin.flush()
    spent = process.stdout.readline()
    if not spent:
      raise SystemExit(f'{python}: cannot run sentence-transformers, see above')
    return float(spent), np.load(f'{path}.npy')

  return embed


if __name__ == '__main__':
  main()
