"""Answers: greedy ones equal a slow loop; a model that learnt in seconds to read passages needs
the right ones; `retro_jax.answer` as a whole."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from retro_jax import answer
from retro_jax.errors import UserError
from retro_jax.evaluation import answer_scores, answering, question_answering
from retro_jax.models import retro
from retro_jax.models.config import RetroConfig
from retro_jax.training import checkpoints
from tests import question_worlds, tiny_models, trained_models

MODEL = RetroConfig(
    vocab_size=460, d_model=32, num_layers=2, num_heads=2, head_dim=16, chunk_length=16,
    num_neighbors=1, cca_layers=(2,), encoder_d_model=32, encoder_layers=1, encoder_heads=2,
    encoder_head_dim=16, positions='rotary')
STEPS = 100


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """Folders: retro and baseline (models), held (40 questions nobody was trained on)."""
  folder = tmp_path_factory.mktemp('answers')
  question_worlds.examples(folder / 'train', question_worlds.records(0, 400))
  held = question_worlds.examples(folder / 'held', question_worlds.records(1, 40))
  untrained = jax.jit(lambda: retro.init_parameters(MODEL.baseline(), jax.random.key(0)))()
  trained = trained_models.trainer(MODEL, STEPS)(folder / 'train')
  for name, config, parameters in (('retro', MODEL, trained),
                                   ('baseline', MODEL.baseline(), jax.device_get(untrained))):
    checkpoints.write_model_description(folder / name, config, held.manifest['vocabulary'])
    safetensors.numpy.save_file(parameters, folder / name / checkpoints.SAFETENSORS)
  return folder, held


def run(folder, monkeypatch, *more):
  """The command; returns its results."""
  monkeypatch.setattr('sys.argv', ['answer', *[
      '--gin_file=gin/runs/answer.gin', f'--gin.OUTPUT={folder}/out',
      f'--gin.EXAMPLES={folder}/held', f'--gin.RETRO={folder}/retro', '--gin.SHOWN=3',
      '--gin.BATCH_SIZE=16', '--gin.MeshConfig.data=1', *more]])
  answer.main()
  return json.loads((folder / 'out' / 'results.json').read_text())


def test_a_model_that_reads_needs_the_right_passages(world, monkeypatch, capsys):
  folder, held = world
  results = run(folder, monkeypatch, f'--gin.BASELINE={folder}/baseline')
  rows = {row['setting']: row for row in results['rows']}
  assert list(rows) == ['baseline', 'closed_book', 'passages', 'shuffled']
  assert rows['passages']['exact_match'] > 0.8 and rows['passages']['copied'] > 0.8
  for control in ('closed_book', 'shuffled', 'baseline'):
    assert rows[control]['exact_match'] < 0.4
    assert results['gains'][f'over_{control}']['exact_match_low'] > 0.2
  assert results['questions']['answer_in_passages'] == 1 and results['questions']['k'] == 1

  # The numbers are those of the answers that were written, question by question.
  lines = [json.loads(line) for line in (folder / 'out' / 'answers.jsonl').read_text().splitlines()]
  assert [line['id'] for line in lines] == [question.id for question in held.questions]
  for setting, row in rows.items():
    assert row['exact_match'] == pytest.approx(np.mean([
        answer_scores.exact_match(line[setting], line['answers']) for line in lines]))
    assert row['f1'] == pytest.approx(np.mean([
        answer_scores.f1(line[setting], line['answers']) for line in lines]))
    for measure in ('exact_match', 'f1'):
      assert row[f'{measure}_low'] <= row[measure] <= row[f'{measure}_high']
      assert row['questions'] == 40
  said = capsys.readouterr().out
  assert f'{100 * rows["passages"]["exact_match"]:.2f}' in said and 'with passages' in said
  page = (folder / 'out' / 'answers.html').read_text()
  assert page.count('<article>') == 3 and '<mark class="both">' in page
  assert held.questions[0].text in page and "another question&#x27;s 1" in page


def test_fewer_questions_and_no_control(world, monkeypatch):
  folder, _ = world
  results = run(folder, monkeypatch, '--gin.MAX_QUESTIONS=9', '--gin.BATCH_SIZE=8',
                '--gin.AnsweringConfig.shuffled=False')
  assert [row['setting'] for row in results['rows']] == ['closed_book', 'passages']
  assert results['questions']['asked'] == 9 and results['questions']['of'] == 40


@pytest.mark.parametrize('more, words', [
    (('--gin.RETRO=FOLDER/baseline',), 'give it as the baseline'),
    (('--gin.NUM_PASSAGES=3',), 'holds 2 passages a question, 3 asked for'),
    (('--gin.RETRO=',), 'name a model'), (('--gin.BATCH_SIZE=12',), 'batch size 12')])
def test_what_does_not_fit_is_one_line(world, monkeypatch, capsys, more, words):
  folder, _ = world
  with pytest.raises(SystemExit):
    run(folder, monkeypatch, *[word.replace('FOLDER', str(folder)) for word in more])
  said = capsys.readouterr().err
  assert words in said and said.count('\n') == 1


@pytest.mark.parametrize('with_passages', [True, False])
def test_greedy_answers_equal_one_question_at_a_time(with_passages):
  """Against whole forward passes of single questions; ids that stand for nothing never come."""
  config = tiny_models.tiny(num_layers=2, cca_layers=(1,), encoder_layers=1, vocab_size=40)
  parameters = tiny_models.parameters(config, 7)
  parameters['embedding.table'][2] *= 2.5  # so that [eos] comes now and then
  m, n, known = config.chunk_length, 12, 24
  batch = tiny_models.batch(config, np.random.default_rng(1), size=5, chunks=1, documents=False)
  batch = tiny_models.pad_left(batch, [0, 1, 2, 3, 1])
  questions, passages = batch.tokens % known, batch.neighbors[:, 0] % known
  questions[:, -1] = np.maximum(questions[:, -1], 4)
  answerer = answering.Answerer(config, parameters, known, trained_models.one_device(), 4, n)
  got = answerer(questions, passages if with_passages else None)
  lengths = set()
  assert got.shape == (5, n - m) and got.max() < known and not np.isin(got, [1, 2, 3]).any()
  call = jax.jit(lambda p, tokens, found: retro.apply(
      config, p, tokens, (tokens != 0).astype(np.int32), found))
  for row in range(5):
    tokens = np.zeros((1, n), np.int32)
    tokens[0, :m] = questions[row]
    read = np.zeros((1, n // m, *passages.shape[1:]), np.int32)
    read[0, 0] = passages[row]
    expected = []
    for position in range(m, n):
      found = retro.Retrieval(read, read != 0) if with_passages else None
      logits = np.array(call(parameters, tokens, found))
      logits[..., [0, 1, 3]] = logits[..., known:] = -np.inf
      token = int(logits[0, position - 1].argmax())
      if token == 2:
        break
      expected.append(token)
      tokens[0, position] = token
    assert got[row].tolist() == expected + [0] * (n - m - len(expected))
    lengths.add(len(expected))
  assert len(lengths) > 1


@given(seed=st.integers(0, 10**6), count=st.integers(4, 40), kinds=st.integers(4, 12))
def test_others_have_no_passage_in_common(seed, count, kinds):
  rng = np.random.default_rng(seed)
  ids = np.sort(rng.integers(0, kinds, (count, 1)) * 2, 0) + [[0, 1]]  # as of one paragraph
  ids[rng.random(ids.shape) < 0.2] = -1
  sets = [set(row.tolist()) - {-1} for row in ids]
  try:
    chosen = question_answering.others(ids, seed)
  except UserError:
    assert any(all(sets[i] & other for j, other in enumerate(sets) if j != i)
               for i in range(count))
    return
  assert all(i != j and not sets[i] & sets[j] for i, j in enumerate(chosen.tolist()))
  np.testing.assert_array_equal(chosen, question_answering.others(ids, seed))
