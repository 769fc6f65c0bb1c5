"""Questions as records: what stands where, to the token, and what training makes of it."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_jax.data import batches, tasks
from retro_jax.data.questions import Passage, Question
from retro_jax.data.records import Examples
from retro_jax.data.windows import Documents
from retro_jax.errors import UserError
from retro_jax.evaluation.chunk_samples import StoredChunks
from retro_jax.retrieval import question_examples
from retro_jax.retrieval.question_examples import Layout, QuestionConfig, QuestionExamples
from tests import question_worlds, worlds
from tests.question_worlds import CONFIG

M, N, R, K = 16, 32, 32, 2


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """Records of 120 questions, in three shards."""
  rows = question_worlds.records(0, 120)
  return rows, question_worlds.examples(tmp_path_factory.mktemp('qa') / 'examples', rows)


def test_every_token_has_its_place(made):
  rows, examples = made
  vocabulary, read = examples.vocabulary, examples.read(np.arange(len(rows)))
  for i, row in enumerate(rows):
    tokens = read['tokens'][i].tolist()
    first = tokens[:M]
    begin = first.index(vocabulary.bos_id)
    assert first[:begin] == [0] * begin and 0 not in first[begin:]
    assert vocabulary.decode(first) == f'question: {row["question"]} \n answer:'
    assert first[-1] == vocabulary.encode('answer:')[-1]
    answer = vocabulary.encode(' ' + row['answers'][0]) + [vocabulary.eos_id]
    assert tokens[M:] == answer + [0] * (N - M - len(answer))
    # The token after each scored position is one of the answer, and no other is.
    assert np.flatnonzero(read['scored'][i]).tolist() == list(range(M - 1, M - 1 + len(answer)))
    [passage] = row['ctxs']
    there = vocabulary.decode(read['neighbor_tokens'][i, 0, 0].tolist())
    assert there == f'title: {passage["title"]}, source: {passage["text"]}'
    assert not read['neighbor_tokens'][i, 0, 1:].any() and not read['neighbor_tokens'][i, 1:].any()
    assert (read['neighbor_ids'][i] >= 0).tolist() == [[True, False], [False, False]]
    assert read['documents'][i].tolist() == [i, i] and read['next_token'][i] == 0
    assert read['text_bytes'][i].tolist() == [0, len(' ' + row['answers'][0])]
  assert examples.num_shards == 3
  assert [q.answers for q in examples.questions] == [tuple(row['answers']) for row in rows]


def test_what_training_sees(made):
  rows, examples = made
  tasks.register_task('questions', examples.folder, K)
  seen = list(batches.evaluation_batches('questions', 50))
  assert [len(batch['tokens']) for batch in seen] == [50, 50, 50]
  joined = {name: np.concatenate([batch[name] for batch in seen]) for name in seen[0]}
  assert not joined['loss_weights'][120:].any()
  for i, row in enumerate(rows):
    answer = examples.vocabulary.encode(' ' + row['answers'][0]) + [examples.vocabulary.eos_id]
    expected = np.zeros(N, int)
    expected[M - 1:M - 1 + len(answer)] = answer
    np.testing.assert_array_equal(joined['targets'][i], expected)
    np.testing.assert_array_equal(joined['loss_weights'][i], expected != 0)
  [by_seqio] = list(tasks.get('questions').get_dataset(
      {'tokens': N, 'targets': N}, 'train', shuffle=False).take(1).as_numpy_iterator())
  np.testing.assert_array_equal(by_seqio['targets'], joined['targets'][0])
  # Beside pretraining text of the same lengths it is one part of a mixture.
  tasks.register_task('again', examples.folder, K)
  tasks.register_mixture('both', {'questions': 1.0, 'again': 3.0})
  assert next(batches.batches('both', 4, num_steps=1))['targets'].shape == (4, N)


def test_only_what_is_missing_is_made(made, capsys, tmp_path):
  rows, examples = made
  capsys.readouterr()
  again = question_worlds.examples(examples.folder, rows)
  assert 'done already' in capsys.readouterr().out and again.fingerprint == examples.fingerprint
  fewer = dataclasses.replace(CONFIG, max_questions=7)
  first = question_worlds.examples(tmp_path / 'x', rows, fewer)
  assert len(first) == len(first.questions) == 7
  np.testing.assert_array_equal(first.read([6])['tokens'], examples.read([6])['tokens'])
  assert len(question_worlds.examples(tmp_path / 'x', rows)) == 120
  with pytest.raises(UserError, match='x.jsonl:2: no answer'):
    question_worlds.examples(tmp_path / 'x', [rows[0], {**rows[1], 'answers': []}])
  assert len(QuestionExamples(tmp_path / 'x')) == 120  # what was there stays


words = st.lists(st.sampled_from(question_worlds.KEYS + question_worlds.VALUES + ['é', '?']),
                 min_size=1, max_size=30).map(' '.join)


@given(question=words, answer=words, texts=st.lists(words, max_size=3), split=st.booleans())
def test_what_is_too_long_is_cut_and_counted(question, answer, texts, split):
  vocabulary = question_worlds.vocabulary()
  layout = Layout(vocabulary, dataclasses.replace(CONFIG, split_passages=split))
  passages = [Passage('T', text) for text in texts]
  if len(texts) % 2:  # encoded together or one by one: the same
    layout.prepare([Question('', question, (answer,))], [answer], [passages])
  head, ids = vocabulary.encode('question:'), vocabulary.encode(' ' + question)
  head, tail = [vocabulary.bos_id, *head], vocabulary.encode(' \n answer:')
  kept = ids[max(0, len(ids) - (M - len(head) - len(tail))):]  # its end, to the token
  first = layout.question(question).tolist()
  assert first == [0] * (M - len(head + kept + tail)) + head + kept + tail
  assert layout.counts['questions_cut'] == (kept != ids)
  whole = vocabulary.encode(' ' + answer) + [vocabulary.eos_id]
  assert layout.answer(answer).tolist() == whole[:N - M]
  assert layout.counts['answers_cut'] == (len(whole) > N - M)

  rows, title = [], vocabulary.encode('title: T, source:')
  for text in texts:
    body = vocabulary.encode(' ' + text)
    while body:
      rows.append((title + body[:R - len(title)] + [0] * R)[:R])
      body = body[R - len(title):] if split else []
  found = layout.passages(passages)
  assert found.shape == (min(K, len(rows)), R) and found.tolist() == rows[:K]


def test_the_answer_to_train_on():
  question = Question('', 'q', ('a', 'b', 'c'))
  chosen = [question_examples.chosen_answer(question, i, 0) for i in range(60)]
  assert set(chosen) == {'a', 'b', 'c'}
  assert chosen == [question_examples.chosen_answer(question, i, 0) for i in range(60)]
  assert chosen != [question_examples.chosen_answer(question, i, 1) for i in range(60)]
  assert question_examples.chosen_answer(dataclasses.replace(question, target='b'), 0, 0) == 'b'


def test_who_shows_and_scores_texts_refuses_questions(made, tmp_path):
  _, examples = made
  for use in (lambda: Documents(Examples(examples.folder)), lambda: StoredChunks(examples.folder)):
    with pytest.raises(UserError, match='holds questions.*retro_jax.answer'):
      use()
  _, texts = worlds.examples(tmp_path / 'texts', worlds.documents(0, 6, longest=30))
  with pytest.raises(UserError, match='holds no questions; build some'):
    QuestionExamples(texts.folder)


@pytest.mark.parametrize('changes, words', [
    ({'sequence_length': 16}, 'at least 2 chunks'), ({'sequence_length': 40}, 'no multiple'),
    ({'num_passages': 0}, 'num_passages is 0')])
def test_lengths_that_do_not_fit(changes, words):
  with pytest.raises(UserError, match=words):
    dataclasses.replace(CONFIG, **changes)


def test_a_chunk_too_short_for_any_question():
  with pytest.raises(UserError, match='use longer chunks'):
    Layout(question_worlds.vocabulary(), QuestionConfig(8, 4))


def test_texts_stand_beside_the_records(made):
  rows, examples = made
  lines = (examples.folder / question_examples.QUESTIONS).read_text().splitlines()
  assert [json.loads(line)['id'] for line in lines] == [row['id'] for row in rows]
