"""Questions as training examples, as in the paper's C.4: what stands where, to the token.

  chunk 1          padding [bos]question: ... \\n answer:      (its last token is that of 'answer:')
  chunk 2 and on    an answer[eos] padding
  RET(chunk 1)     title: ..., source: ...                   (up to K passages of r tokens)

So the last token of chunk 1, which predicts the first of the answer, is the first position that
reads the passages, and all of an answer that ends in chunk 2 is predicted from them. Only the
answer and [eos] are targets. The records are those of data/records.py with `scored`; what no
tensor holds, the texts of questions and answers, stands beside them in `questions.jsonl`. Reading
questions is in data/questions.py, finding passages in question_passages.py.
"""

import dataclasses
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from retro_jax import files, storage
from retro_jax.data import records
from retro_jax.data.permutation import key
from retro_jax.data.questions import Passage, Question, QuestionFiles
from retro_jax.data.vocabulary import PAD_ID, Vocabulary
from retro_jax.errors import UserError
from retro_jax.progress import Progress
from retro_jax.retrieval.database import VOCABULARY, token_dtype

QUESTIONS = 'questions.jsonl'
_HEAD, _TAIL = 'question:', ' \n answer:'
_CHOICE = 4
# Questions whose passages are looked for together.
_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class QuestionConfig:
  """How questions become examples.

  Attributes:
    sequence_length: n tokens, a multiple of m: a chunk for the question, the others for the answer.
    chunk_length: m, that of the model.
    num_passages: K stored with a question.
    split_passages: a passage of more than r tokens becomes several, each under its title; else it
      is cut. For passages that came as whole paragraphs.
    max_questions: take only the first so many; 0 for all.
    examples_per_shard: of each pair of record files.
    seed: chooses the answer to train on, where there are several.
  """

  sequence_length: int = 128
  chunk_length: int = 64
  num_passages: int = 20
  split_passages: bool = False
  max_questions: int = 0
  examples_per_shard: int = 4096
  seed: int = 0

  def __post_init__(self):
    records.check_multiple(self.sequence_length, self.chunk_length)
    if self.sequence_length < 2 * self.chunk_length:
      raise UserError(f'sequence_length is {self.sequence_length}, expected at least 2 chunks of '
                      f'{self.chunk_length}: one for the question, one for the answer')
    for name in ('num_passages', 'examples_per_shard'):
      if getattr(self, name) < 1:
        raise UserError(f'QuestionConfig.{name} is {getattr(self, name)}, expected at least 1')


class Passages(Protocol):
  """Where the passages of questions come from."""

  def find(self, questions: Sequence[Question]) -> list[Sequence[Passage]]:
    """The passages of each question, best first."""

  def describe(self) -> dict[str, Any]:
    """JSON-able; equal only while the same questions get the same passages."""


@dataclasses.dataclass(frozen=True)
class OwnPassages:
  """Those that came with the questions: SQuAD's paragraph, FiD's contexts."""

  def find(self, questions: Sequence[Question]) -> list[Sequence[Passage]]:
    return [question.passages for question in questions]

  def describe(self) -> dict[str, Any]:
    return {'kind': 'own'}


class Layout:
  """Texts to the tokens of one example.

  Attributes:
    counts: what had to be shortened: 'questions_cut', 'answers_cut', 'passages_cut', and
      'without_passages'.
    question_room: tokens that a question may have.
    token_bytes: of the vocabulary.
  """

  def __init__(self, vocabulary: Vocabulary, config: QuestionConfig):
    """
    Raises:
      UserError: a chunk too short for any question.
    """
    self.counts: Counter[str] = Counter()
    self._vocabulary, self._config = vocabulary, config
    self.token_bytes = vocabulary.token_bytes
    self._encoded: dict[str, list[int]] = {}
    self._head = [vocabulary.bos_id, *vocabulary.encode(_HEAD)]
    self._tail = vocabulary.encode(_TAIL)
    around = len(self._head) + len(self._tail)
    self.question_room = config.chunk_length - around
    if self.question_room < 1:
      raise UserError(f'chunk_length is {config.chunk_length}, but what stands around a question '
                      f'has {around} tokens in {vocabulary.path}; use longer chunks')

  def prepare(self, questions: Sequence[Question], answers: Sequence[str],
              found: Sequence[Sequence[Passage]]) -> None:
    """Encodes the texts of some questions together, which is faster than one by one."""
    passages = [passage for some in found for passage in some]
    texts = list(dict.fromkeys([
        *(_word(question.text) for question in questions), *map(_word, answers),
        *map(_title, passages), *(_word(passage.text) for passage in passages)]))
    self._encoded = dict(zip(texts, self._vocabulary.encode_batch(texts)))

  def _encode(self, text: str) -> list[int]:
    return self._encoded[text] if text in self._encoded else self._vocabulary.encode(text)

  def question(self, text: str) -> np.ndarray:
    """int32 [m]: the first chunk; of a long question the beginning is left out."""
    ids = self._encode(_word(text))
    self.counts['questions_cut'] += len(ids) > self.question_room
    ids = self._head + ids[-self.question_room:] + self._tail
    return np.pad(np.array(ids, np.int32), (self._config.chunk_length - len(ids), 0))

  def answer(self, text: str) -> np.ndarray:
    """int32 [at most n - m]: the answer and [eos]; of a long one the beginning, without."""
    room = self._config.sequence_length - self._config.chunk_length
    ids = [*self._encode(_word(text)), self._vocabulary.eos_id]
    self.counts['answers_cut'] += len(ids) > room
    return np.array(ids[:room], np.int32)

  def passages(self, found: Sequence[Passage]) -> np.ndarray:
    """int32 [at most K, r], padded on the right."""
    rows: list[list[int]] = []
    r, most = 2 * self._config.chunk_length, self._config.num_passages
    for passage in found:
      if len(rows) >= most:
        break
      title = self._encode(_title(passage))[:r // 2]
      body, room = self._encode(_word(passage.text)), r - len(title)
      pieces = [body[i:i + room] for i in range(0, len(body), room)] or [[]]
      if not self._config.split_passages:
        self.counts['passages_cut'] += len(pieces) > 1
        pieces = pieces[:1]
      rows += [title + piece for piece in pieces]
    result = np.full((min(len(rows), most), r), PAD_ID, np.int32)
    for i, row in enumerate(rows[:most]):
      result[i, :len(row)] = row
    self.counts['without_passages'] += not len(result)
    return result


def _word(text: str) -> str:
  """How a text follows a colon."""
  return ' ' + text.strip()


def _title(passage: Passage) -> str:
  return f'title: {passage.title}, source:'


def build(
    folder: str | os.PathLike, source: QuestionFiles, passages: Passages, vocabulary: Vocabulary,
    config: QuestionConfig = QuestionConfig()) -> 'QuestionExamples':
  """Writes the examples, unless they are there already.

  Args:
    folder: of the records.
    source: the questions.
    passages: where passages come from.
    vocabulary: that of the model.
    config: the settings.

  Raises:
    UserError: bad questions, or lengths that do not fit.
  """
  inputs = {'format_version': records.FORMAT_VERSION, 'questions': source.describe(),
            'passages': passages.describe(), 'vocabulary': vocabulary.fingerprint,
            'config': dataclasses.asdict(config)}
  if storage.is_current(folder, records.KIND, inputs):
    print(f'{folder}: done already', flush=True)
    return QuestionExamples(folder)
  layout = Layout(vocabulary, config)
  shape = records.ExampleShape(config.sequence_length, config.chunk_length, config.num_passages,
                               token_dtype(vocabulary.size).str, scored=True)
  manifest: dict[str, Any] = {
      'kind': records.KIND, 'format_version': records.FORMAT_VERSION, 'inputs': inputs,
      **dataclasses.asdict(shape), 'retrieved_length': shape.retrieved_length,
      'examples_per_shard': config.examples_per_shard,
      'vocabulary': {'size': vocabulary.size, 'fingerprint': vocabulary.fingerprint}}
  with storage.building(folder, manifest) as temporary:
    number = _write(temporary, source.questions(), passages, layout, shape, config)
    files.write_bytes(temporary / VOCABULARY, files.read_bytes(vocabulary.path))
    manifest |= {'num_examples': number, 'counts': dict(sorted(layout.counts.items())),
                 'content': storage.fingerprint([
                     storage.file_checksum(path) for path in sorted(temporary.rglob('*'))
                     if path.is_file()])}
  told = ', '.join(f'{name.replace("_", " ")} {n:,}' for name, n in manifest['counts'].items())
  print(f'{folder}: {number:,} questions; {told}', flush=True)
  return QuestionExamples(folder)


def _write(folder: Path, questions: Iterator[Question], passages: Passages, layout: Layout,
           shape: records.ExampleShape, config: QuestionConfig) -> int:
  """Records and texts of all questions; returns how many there are."""
  writer, number = None, 0
  known: dict[bytes, int] = {}
  progress = Progress('questions', config.max_questions or None, 'questions')
  limited = itertools.islice(questions, config.max_questions or None)
  try:
    with open(folder / QUESTIONS, 'w', encoding='utf-8') as texts:
      while some := list(itertools.islice(limited, _AT_ONCE)):
        answers = [chosen_answer(question, number + i, config.seed)
                   for i, question in enumerate(some)]
        retrieved = passages.find(some)
        layout.prepare(some, answers, retrieved)
        for question, answer, found in zip(some, answers, retrieved):
          shard, within = divmod(number, config.examples_per_shard)
          if within == 0:
            if writer:
              writer.close()
            place = records.shard_folder(folder, shard)
            place.mkdir(parents=True)
            writer = records.RecordWriter(place, shape)
          writer.write(*arrays(number, layout.question(question.text), layout.answer(answer),
                               layout.passages(found), shape, layout.token_bytes, known))
          texts.write(json.dumps({'id': question.id, 'question': question.text,
                                  'answers': question.answers}, ensure_ascii=False) + '\n')
          number += 1
        progress.update(len(some))
  finally:
    if writer:
      writer.close()
  progress.close()
  return number


def chosen_answer(question: Question, number: int, seed: int) -> str:
  """The answer to train on: the file's, else one of several by chance."""
  several = question.answers
  return question.target or several[int(key(seed, _CHOICE, number) % np.uint64(len(several)))]


def arrays(number: int, question: np.ndarray, answer: np.ndarray, passages: np.ndarray,
           shape: records.ExampleShape, token_bytes: np.ndarray, known: dict[bytes, int]
           ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """The two records of question `number`, from the parts that `Layout` makes.

  Args:
    number: of the question; its "document".
    question, answer, passages: tokens.
    shape: of the records.
    token_bytes: of the vocabulary.
    known: numbers of the passages so far, by their tokens; gets those that are new.
  """
  m, l, k = shape.chunk_length, shape.num_chunks, shape.num_neighbors
  tokens = np.zeros(shape.sequence_length, np.int32)
  tokens[:m], tokens[m:m + len(answer)] = question, answer
  scored = np.zeros(shape.sequence_length, np.uint8)
  scored[m - 1:m - 1 + len(answer)] = 1  # a position is scored by the token after it
  there = tokens.reshape(l, m).any(-1)
  text_bytes = token_bytes[tokens].reshape(l, m).sum(-1)
  text_bytes[0] = 0  # of what is scored
  ids = np.full((l, k), -1, np.int64)
  ids[0, :len(passages)] = [known.setdefault(row.tobytes(), len(known)) for row in passages]
  distances = np.full((l, k), np.inf, np.float32)
  distances[0, :len(passages)] = np.arange(len(passages))  # their order is all that is known
  retrieved = np.zeros((l, k, shape.retrieved_length), np.int32)
  retrieved[0, :len(passages)] = passages
  example = {'tokens': tokens, 'next_token': np.zeros(1, np.int32), 'scored': scored,
             'documents': np.where(there, number, -1), 'text_bytes': text_bytes,
             'chunk_ids': np.where(there, number * l + np.arange(l), -1)}
  return example, {'ids': ids, 'distances': distances, 'tokens': retrieved}


class QuestionExamples(records.Examples):
  """Records of questions, with the texts that belong to them.

  Attributes:
    vocabulary: of the tokens.
    questions: ids, texts and answers, in the order of the records; without passages, which are
      in the records.
  """

  def __init__(self, folder: str | os.PathLike):
    """Opens the folder.

    Raises:
      UserError: nothing there, damaged, or records that are no questions.
    """
    super().__init__(folder)
    if not self.shape.scored:
      raise UserError(f'{folder}: holds no questions; build some by tools/build_qa_examples.py')
    self.vocabulary = Vocabulary.load(self.folder / VOCABULARY)
    with open(self.folder / QUESTIONS, encoding='utf-8') as lines:
      rows = [json.loads(line) for line in lines]
    self.questions = [Question(row['id'], row['question'], tuple(row['answers'])) for row in rows]
