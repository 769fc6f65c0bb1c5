"""Readers of questions: each format gives what it says, and a bad record says where it stands."""

import dataclasses
import gzip
import json

import pytest

from retro_jax.data.questions import Passage, Question, QuestionFiles
from retro_jax.errors import UserError

PARAGRAPHS = [
    {'title': 'Oil_crisis', 'context': 'It began in 1973.', 'qas': [
        {'id': 'a', 'question': 'When?', 'answers': ['1973', 'in 1973', '1973']},
        {'id': 'b', 'question': 'What began?', 'answers': ['It']}]},
    {'title': 'Tea', 'context': 'Tea is a drink.', 'qas': [
        {'id': 'c', 'question': 'What is tea?', 'answers': ['a drink']}]}]
SQUAD = [
    Question('a', 'When?', ('1973', 'in 1973'), '', (Passage('Oil crisis', 'It began in 1973.'),)),
    Question('b', 'What began?', ('It',), '', (Passage('Oil crisis', 'It began in 1973.'),)),
    Question('c', 'What is tea?', ('a drink',), '', (Passage('Tea', 'Tea is a drink.'),))]
FID = {'id': 7, 'question': 'who?', 'target': 'Bob', 'answers': ['Bob', 'Robert'], 'ctxs': [
    {'id': '1', 'title': 'T', 'text': 'Bob did.', 'score': '9.1'}, {'title': 'U', 'text': 'No.'}]}
FID_QUESTION = Question('7', 'who?', ('Bob', 'Robert'), 'Bob',
                        (Passage('T', 'Bob did.'), Passage('U', 'No.')))


def official(indent=None):
  """The paragraphs as SQuAD's own file has them; one more question without an answer."""
  answers = lambda qas: [{**q, 'answers': [{'text': t, 'answer_start': 0} for t in q['answers']]}
                         for q in qas]
  articles = [{'title': p['title'], 'paragraphs': [
      {'context': p['context'], 'qas': answers(p['qas'])}]} for p in PARAGRAPHS]
  articles[1]['paragraphs'][0]['qas'].append(
      {'id': 'd', 'question': 'Why?', 'answers': [], 'is_impossible': True})
  return json.dumps({'version': '2.0', 'data': articles}, indent=indent)


def lines(*records):
  return ''.join(json.dumps(record) + '\n' for record in records)


@pytest.mark.parametrize('content, expected', [
    (lines(*PARAGRAPHS), SQUAD), (official(), SQUAD), (official(indent=1), SQUAD),
    (lines({'question': 'who?', 'answer': ['Bob', 'Bob ']}, {'question': 'x', 'answer': 'y'}),
     [Question('FILE:1', 'who?', ('Bob', 'Bob ')), Question('FILE:2', 'x', ('y',))]),
    (json.dumps([FID, FID]), [FID_QUESTION] * 2), (json.dumps([FID], indent=2), [FID_QUESTION]),
    ('\n' + lines(FID), [FID_QUESTION]),
    (lines({'question': 'who?', 'target': 'Bob'}), [Question('FILE:1', 'who?', ('Bob',), 'Bob')])],
    ids=['squad', 'official', 'indented', 'open', 'fid', 'fid-indented', 'fid-lines', 'target'])
@pytest.mark.parametrize('zipped', [False, True])
def test_formats(tmp_path, content, expected, zipped):
  path = tmp_path / ('q.json.gz' if zipped else 'q.json')
  path.write_bytes(gzip.compress(content.encode()) if zipped else content.encode())
  found = list(QuestionFiles(str(path)).questions())
  assert [dataclasses.replace(question, id=question.id.replace(path.name, 'FILE'))
          for question in found] == expected


@pytest.mark.parametrize('content, message', [
    ('{"question": "who?"}\n', 'q.json:1: .*list of texts in field \'answer\''),
    (lines(FID) + '{"question": "who?", "answers": []}\n', 'q.json:2: no answer'),
    (lines({'question': 'who?', 'answers': [3]}), 'expected texts in field \'answers\''),
    (lines({'question': ' ', 'answer': 'x'}), 'expected text in field \'question\''),
    (lines({'query': 'who?', 'answer': 'x'}), '"question".*found .*query'),
    (lines({**FID, 'ctxs': [{'title': 'T', 'txt': 'x'}]}), 'field \'text\'.*txt'),
    (lines({**FID, 'ctxs': ['x']}), 'list of objects in field \'ctxs\''),
    (lines({**PARAGRAPHS[0], 'qas': [{'question': 'x', 'answers': []}]}), 'question 1 has no'),
    (lines({'title': 'x', 'qas': []}), 'field \'context\''),
    ('[{"question": "who?", "answer": "x"}, 3]', 'record 2 is no JSON object'),
    ('[{"question": }]', 'not valid JSON'), ('{"question": \n', 'q.json:1: not valid JSON'),
    ('', 'not one question')])
def test_mistakes_are_one_line(tmp_path, content, message):
  path = tmp_path / 'q.json'
  path.write_text(content, encoding='utf-8')
  with pytest.raises(UserError, match=message) as error:
    list(QuestionFiles(str(path)).questions())
  assert '\n' not in str(error.value) and 'q.json' in str(error.value)


def test_no_such_file(tmp_path):
  with pytest.raises(UserError, match='no file of that name'):
    list(QuestionFiles(str(tmp_path / 'q.json')).questions())


def test_description_follows_the_content(tmp_path):
  path, source = tmp_path / 'q.json', QuestionFiles(str(tmp_path / '*.json'))
  path.write_text(lines(FID), encoding='utf-8')
  before = source.describe()
  assert before == source.describe()
  path.write_text(lines(FID, FID), encoding='utf-8')
  assert before != source.describe()
