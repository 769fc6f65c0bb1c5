"""Questions with their answers, and passages where the file has some: one reader, three formats.

  SQuAD     a line a paragraph: {"title", "context", "qas": [{"id", "question", "answers"}]};
            or the official file: {"data": [{"title", "paragraphs": [{"context", "qas"}]}]}
  NQ-open   a line a question: {"question", "answer": [...]}
  FiD       a list, or a line a question:
            {"question", "answers": [...], "target", "ctxs": [{"title", "text"}, ...]}

Files are plain or gzip. Nothing is tokenised or retrieved here: see question_examples.py and
question_passages.py in retrieval/.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from retro_jax import files
from retro_jax.data import json_records
from retro_jax.data.input_files import InputFile, find_files
from retro_jax.data.json_records import BadRecord
from retro_jax.data.vocabulary import clean_text
from retro_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Passage:
  """A text that may hold the answer, and the title of where it comes from."""

  title: str
  text: str


@dataclasses.dataclass(frozen=True)
class Question:
  """One question.

  Attributes:
    id: from the file, else 'file:line'.
    text: the question.
    answers: all that are right; at least one.
    target: the one to train on, where the file says which; else ''.
    passages: that came with it, best first.
  """

  id: str
  text: str
  answers: tuple[str, ...]
  target: str = ''
  passages: tuple[Passage, ...] = ()


@dataclasses.dataclass(frozen=True)
class QuestionFiles:
  """Files in any of the three formats, told apart record by record by their fields.

  A SQuAD question's passage is its paragraph; one of SQuAD 2 without an answer is left out. An
  answer is a text, or an object with a "text". FiD's "target" is the answer to train on; it may
  be missing. A list is read whole: several gigabytes are better made into lines.

  Attributes:
    pattern: of the files.
  """

  pattern: str

  def questions(self) -> Iterator[Question]:
    """All questions in the order of the files.

    Raises:
      UserError: no files, a bad record, or not one question.
    """
    there = False
    for file in find_files(self.pattern):
      for number, record in _records(file):
        try:
          for question in _of_record(record, f'{file.name}:{number}'):
            there = True
            yield question
        except BadRecord as error:
          raise UserError(f'{files.shown(file.path)}:{number}: {error}') from None
    if not there:
      raise UserError(f'{files.shown(self.pattern)}: not one question in it; check the file')

  def describe(self) -> list[Any]:
    """JSON-able; equal only while the files are the same."""
    return [[file.name, file.checksum()] for file in find_files(self.pattern)]


def _of_record(record: dict[str, Any], place: str) -> Iterator[Question]:
  """Its questions; those without an id are named after their place."""
  if 'data' in record:
    for article in _objects(record, 'data'):
      for number, paragraph in enumerate(_objects(article, 'paragraphs'), start=1):
        title = json_records.title_of(article, 'title')
        yield from _of_paragraph({'title': title, **paragraph}, f'{place}:{title}:{number}')
  elif 'qas' in record:
    yield from _of_paragraph(record, place)
  elif 'question' in record:
    yield _of_question(record, place)
  else:
    raise BadRecord('expected a field "question" (NQ-open, FiD), "qas" (SQuAD, a paragraph) or '
                    f'"data" (SQuAD, the official file), found {sorted(record)[:6]}; is it one of '
                    'these formats?')


def _of_paragraph(record: dict[str, Any], place: str) -> Iterator[Question]:
  passage = Passage(json_records.title_of(record, 'title').replace('_', ' '),
                    _text(record, 'context'))
  for number, asked in enumerate(_objects(record, 'qas'), start=1):
    answers = _answers(asked, 'answers')
    if answers:
      yield Question(_id(asked, f'{place}:{number}'), _text(asked, 'question'), answers,
                     passages=(passage,))
    elif not asked.get('is_impossible'):
      raise BadRecord(f"question {number} has no answer in field 'answers'; add one or remove it")


def _of_question(record: dict[str, Any], place: str) -> Question:
  target = _text(record, 'target') if record.get('target') is not None else ''
  field = 'answers' if 'answers' in record else 'answer'
  answers = (target,) if target and field not in record else _answers(record, field)
  if not answers:
    raise BadRecord(f'no answer in field {field!r}; add one or remove the record')
  passages = tuple(Passage(json_records.title_of(found, 'title'), _text(found, 'text'))
                   for found in (_objects(record, 'ctxs') if 'ctxs' in record else ()))
  return Question(_id(record, place), _text(record, 'question'), answers, target, passages)


def _records(file: InputFile) -> Iterator[tuple[str, dict[str, Any]]]:
  """(line, object) of every line, or ('record 1', object) and so on of the one value it is."""
  for number, line in enumerate(file.lines(), start=1):
    text = line.decode('utf-8', 'replace').strip()
    if number == 1 and text in ('[', '{') or text.startswith('['):
      yield from _whole(file)
      return
    if text:
      try:
        yield str(number), json_records.parse(text)
      except BadRecord as error:
        raise UserError(f'{files.shown(file.path)}:{number}: {error}') from None


def _whole(file: InputFile) -> Iterator[tuple[str, dict[str, Any]]]:
  """The objects of a file that is one JSON value over several lines, or a list."""
  shown = files.shown(file.path)
  try:
    value = json.loads(file.read())
  except (ValueError, RecursionError) as error:
    raise UserError(f'{shown}: not valid JSON ({error}); correct it, or put one object a '
                    'line') from None
  for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
    if not isinstance(record, dict):
      raise UserError(f'{shown}: record {number} is no JSON object; expected one a question')
    yield f'record {number}', record


def _objects(record: dict[str, Any], field: str) -> list[dict[str, Any]]:
  value = record.get(field)
  if not isinstance(value, list) or any(not isinstance(one, dict) for one in value):
    hint = '' if field in record else nearest(field, record)
    raise BadRecord(f'expected a list of objects in field {field!r}{hint}; is it the right format?')
  return value


def _text(record: dict[str, Any], field: str) -> str:
  value = record.get(field)
  if not isinstance(value, str) or not value.strip():
    hint = '' if field in record else nearest(field, record)
    raise BadRecord(f'expected text in field {field!r}{hint}; correct or remove the record')
  return clean_text(value)


def _id(record: dict[str, Any], otherwise: str) -> str:
  return json_records.id_of(record, 'id') or otherwise


def _answers(record: dict[str, Any], field: str) -> tuple[str, ...]:
  """The different answers in their order; may be none."""
  value = record.get(field)
  several = [value] if isinstance(value, str) else value
  if not isinstance(several, list):
    hint = '' if field in record else nearest(field, record)
    raise BadRecord(f'expected a text or a list of texts in field {field!r}{hint}; correct or '
                    'remove the record')
  texts = [one.get('text') if isinstance(one, dict) else one for one in several]
  if any(not isinstance(one, str) for one in texts):
    raise BadRecord(f'expected texts in field {field!r}; correct or remove the record')
  return tuple(dict.fromkeys(clean_text(one) for one in texts if one.strip()))
