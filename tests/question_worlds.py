"""Small questions with passages, and a vocabulary in which their words are few tokens."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np

from retro_jax.data import vocabulary as vocabulary_lib
from retro_jax.data.questions import QuestionFiles
from retro_jax.retrieval import question_examples
from retro_jax.retrieval.question_examples import OwnPassages, QuestionConfig, QuestionExamples

VALUES = ('amber basil cedar delta ember fjord grove heron ivory jade kelp lotus maple north opal '
          'pearl quartz raven sable tulip').split()
KEYS = ('cat dog fox hen owl pig bee ant').split()
CONFIG = QuestionConfig(sequence_length=32, chunk_length=16, num_passages=2, examples_per_shard=50)


@functools.cache
def vocabulary() -> vocabulary_lib.Vocabulary:
  """Trained once a process."""
  rng = np.random.default_rng(0)
  word = lambda: f'{rng.choice(VALUES)}'
  texts = [f'question: who is {rng.choice(KEYS)} ? \n answer: {word()} title: {word()}, source: '
           f'{word()} {word()}' for _ in range(600)]
  folder = tempfile.mkdtemp(prefix='retro-jax-test-')
  return vocabulary_lib.train_vocabulary(texts, Path(folder) / 'v.model', 460)


def records(seed: int, count: int) -> list[dict]:
  """FiD records: who a key is says the only passage; nothing else does."""
  rng = np.random.default_rng(seed)
  result = []
  for number in range(count):
    key, value = rng.choice(KEYS), rng.choice(VALUES)
    result.append({'id': str(number), 'question': f'who is {key} ?', 'answers': [value],
                   'ctxs': [{'title': key, 'text': f'{value} {rng.choice(VALUES)} {number}'}]})
  return result


def write(path: Path, rows: list[dict]) -> QuestionFiles:
  """The records as JSON lines."""
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  return QuestionFiles(str(path))


def examples(folder: Path, rows: list[dict], config: QuestionConfig = CONFIG) -> QuestionExamples:
  """Records of these questions."""
  source = write(folder.with_suffix('.jsonl'), rows)
  return question_examples.build(folder, source, OwnPassages(), vocabulary(), config)
