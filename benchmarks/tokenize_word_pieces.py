"""Word pieces of real text: tensorflow_text behind word_pieces.py against the tokenizers library.

  python benchmarks/tokenize_word_pieces.py --texts=train.jsonl.gz [--megabytes=10] [--output=F]

Cuts the field "text" of a JSON-lines file into pieces of about --bytes bytes, as chunks are,
and lets both tokenize the same pieces in turn; prints MB per CPU-second (all threads), their
ratio (median over --rounds) and how many pieces got other ids (expected: none).
"""

import argparse
import gzip
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')


def pieces(path: Path, length: int) -> Iterator[str]:
  """Consecutive pieces of every text, `length` characters each, the last shorter."""
  with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8') as file:
    for line in file:
      text = json.loads(line)['text']
      yield from (text[i:i + length] for i in range(0, len(text), length))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--texts', type=Path, required=True, help='JSON lines, .gz or not')
  parser.add_argument('--model', default='', help="BERT folder; '' for the installed MiniLM")
  parser.add_argument('--megabytes', type=float, default=10, help='of text to tokenize')
  parser.add_argument('--bytes', type=int, default=300, help='length of a piece')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--output', type=Path, help='JSON file for the numbers')
  args = parser.parse_args()

  from retro_jax import storage
  from retro_jax.retrieval.embedders import BertEmbedder
  from retro_jax.retrieval.word_pieces import WordPieces

  texts, size = [], 0
  for text in pieces(args.texts, args.bytes):
    texts.append(text)
    size += len(text.encode('utf-8', 'replace'))
    if size >= args.megabytes * 1e6:
      break
  library = BertEmbedder(args.model)._tokenizer  # as embedders.py sets it up
  fast = WordPieces(library, library.truncation['max_length'])
  encode = {'library': lambda: [e.ids for e in library.encode_batch(texts)],
            'fast': lambda: fast.encode(texts)}

  rates: dict[str, list[float]] = {name: [] for name in encode}
  for _ in range(args.rounds):
    rows = {}
    for name, run in encode.items():
      begin = time.process_time()
      rows[name] = run()
      rates[name].append(size / 1e6 / (time.process_time() - begin))
  differing = sum(a != b.tolist() for a, b in zip(rows['library'], rows['fast']))
  result = {
      'megabytes': size / 1e6, 'pieces': len(texts), 'ids': sum(map(len, rows['library'])),
      'library_mb_per_cpu_second': statistics.median(rates['library']),
      'fast_mb_per_cpu_second': statistics.median(rates['fast']),
      'ratio': statistics.median(f / l for f, l in zip(rates['fast'], rates['library'])),
      'pieces_for_the_library': len(fast.may_differ(texts)),
      'pieces_with_other_ids': differing,
  }
  for name, value in result.items():
    print(f'{name:27s} {value:.2f}' if isinstance(value, float) else f'{name:27s} {value:,}')
  if args.output:
    storage.write_json(args.output, result)


if __name__ == '__main__':
  main()
