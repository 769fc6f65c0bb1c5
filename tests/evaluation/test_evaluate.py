"""`retro_jax.evaluate` as a whole, on models that learnt in seconds to copy, or not to.

Every text of the training database stands there twice, so that a chunk's neighbour is the
other copy and goes on as the text does. Half of the held-out texts are in the database, too.
"""

import json

import numpy as np
import pytest
import safetensors.numpy

from retro_jax import evaluate
from retro_jax.data.corpus import Document
from retro_jax.data.records import Examples
from retro_jax.data.windows import Documents
from retro_jax.evaluation import leakage, words
from retro_jax.evaluation.leakage import LeakageConfig
from retro_jax.models.config import RetroConfig
from retro_jax.retrieval import pipeline
from retro_jax.retrieval.policies import PolicyConfig
from retro_jax.training import checkpoints
from tests import trained_models, worlds

MODEL = RetroConfig(
    vocab_size=384, d_model=32, num_layers=2, num_heads=2, head_dim=16, chunk_length=8,
    num_neighbors=2, cca_layers=(2,), encoder_d_model=32, encoder_layers=1, encoder_heads=2,
    encoder_head_dim=16)
STEPS = 100


def named(prefix, texts):
  return [Document(f'{prefix}-{i}', text) for i, text in enumerate(texts)]


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """Folders: run/nearest, run/random; held, held_random, held_tenth; and the held-out texts."""
  folder = tmp_path_factory.mktemp('evaluate')
  rng = np.random.default_rng(0)
  copied, held = ([worlds.text(rng, 40) for _ in range(count)] for count in (40, 12))
  database = worlds.store(
      folder / 'db', named('a', copied) + named('b', copied) + named('leak', held[::2]))
  queries = worlds.store(folder / 'queries', named('held', held))
  pipeline.build_index(folder / 'index', database)

  def build(name, store, kind='nearest', policy=PolicyConfig()):
    pipeline.build_examples(
        folder / name, store, database, folder / 'index',
        pipeline.ExamplesConfig(32, 3, margin=4, kind=kind, policy=policy))

  train = trained_models.trainer(MODEL, STEPS)
  for kind in ('nearest', 'random'):
    build(f'train_{kind}', database, kind)
    exported = folder / 'run' / kind
    checkpoints.write_model_description(exported, MODEL, database.manifest['vocabulary'])
    safetensors.numpy.save_file(train(folder / f'train_{kind}'),
                                exported / checkpoints.SAFETENSORS)
  build('held', queries)
  build('held_random', queries, 'random')
  build('held_tenth', queries, policy=PolicyConfig(database_fraction=0.1))
  return folder, held


def run(folder, kind, monkeypatch, *more, file='evaluate'):
  """The command; returns its exit code and its results."""
  output = folder / 'out' / kind
  monkeypatch.setattr('sys.argv', ['evaluate', *[
      f'--gin_file=gin/runs/{file}.gin', f'--gin.OUTPUT={output}',
      f'--gin.RETRO={folder}/run/{kind}', f'--gin.EXAMPLES={folder}/held',
      f'--gin.RANDOM_EXAMPLES={folder}/held_random', '--gin.MeshConfig.data=1', *more]])
  code = 0
  try:
    evaluate.main()
  except SystemExit as stop:
    code = stop.code
  return code, json.loads((output / 'results.json').read_text())


def test_the_gate_tells_a_model_that_reads_from_one_that_does_not(world, monkeypatch, capsys):
  folder, _ = world
  code, passed = run(folder, 'nearest', monkeypatch, '--gate', '--gin.GateConfig.margin=0.02')
  assert code == 0 and passed['gate']['passed']
  assert passed['gains']['over_retro_random']['low'] > 0.02
  capsys.readouterr()
  code, failed = run(folder, 'random', monkeypatch, '--gate', '--gin.GateConfig.margin=0.02')
  assert code == 3 and not failed['gate']['passed']
  assert 'fewer bits than retro_random' in capsys.readouterr().err
  code, ungated = run(folder, 'random', monkeypatch)
  assert code == 0 and 'gate' not in ungated
  assert ungated['bits_per_byte'] == failed['bits_per_byte']


def test_everything_from_one_checkpoint(world, monkeypatch, capsys):
  folder, held = world
  code, results = run(
      folder, 'nearest', monkeypatch, '--gin.WORDS=True',
      f"--gin.SWEEP_EXAMPLES={{'tenth': '{folder}/held_tenth'}}", file='evaluation_sweep')
  printed = capsys.readouterr().out
  assert code == 0
  bits = results['bits_per_byte']
  assert bits['k=0'] == bits['retro_off'] and bits['k=2'] == bits['retro_on'] == bits['N and F']
  assert bits['neither'] == pytest.approx(bits['retro_off'], rel=1e-5)
  # What is copied is the continuation.
  assert bits['retro_on'] < bits['N only'] and bits['retro_on'] < bits['tenth']
  assert bits['retro_on'] < bits['shuffled']
  left = [line for line in results['left_out'] if line.startswith('k=')]
  assert len(left) == 4 and 'k=5' in left[0] and 'left out: k=40' in printed
  rows = {row['setting']: row for row in results['rows']}
  assert [rows[f'k={k}']['k'] for k in range(4)] == [0, 1, 2, 3]
  assert rows['tenth']['database_fraction'] == 0.1 and rows['k=3']['database_fraction'] == 1
  assert rows['k=3']['gain_low'] <= rows['k=3']['gain'] <= rows['k=3']['gain_high']
  assert all({'low', 'high', 'bytes', 'tokens', 'documents'} <= row.keys() for row in rows.values())
  assert rows['retro_on']['bytes'] == sum(len(text.encode()) for text in held)
  assert results['in_database']['evaluated_documents_in_it'] == 0  # they have other names there
  assert results['protocol']['stride'] == 16

  expected = sum(len(text.split()) + len(text.splitlines()) for text in held)
  assert results['words']['words'] == expected
  total = bits['retro_off'] * rows['retro_off']['bytes']
  assert results['words']['perplexity']['retro_off'] == pytest.approx(2 ** (total / expected))

  curve = {(row['setting'], row['alpha']): row for row in results['leakage']['rows']}
  assert sorted({alpha for _, alpha in curve}) == [0.125, 0.25, 0.5, 0.75, 1.0]
  for name in ('retro_off', 'retro_on', 'retro_random'):
    assert curve[name, 1.0]['bits_per_byte'] == pytest.approx(bits[name])
  gains = {(g['over'], g['alpha']): g for g in results['leakage']['gains']}
  # All that the model gains is leakage: what the database does not hold it cannot copy.
  assert gains['retro_random', 1.0]['low'] > 0.1 > gains['retro_random', 0.5]['gain']
  split = results['leakage']['tokens']
  assert split['in_retrieved']['gains'][0]['gain'] > split['not_in_retrieved']['gains'][0]['gain']
  assert sum(kind['tokens'] for kind in split.values()) == rows['retro_on']['tokens']


def test_a_planted_leak_is_found_and_leaves_the_filtered_figure(world):
  folder, held = world
  documents = Documents(Examples(folder / 'held'))
  leaks = leakage.measured(documents, LeakageConfig(), 2)
  leaked = np.isin(documents.document, np.arange(0, len(held), 2))
  leaked[documents.starts[1:] - 1] = False  # of a few last tokens there are many copies
  assert (leaks.overlap[leaked] == 1).all()
  assert leaks.num_neighbors == 3 and any('holds 3' in note for note in leaks.notes)
  # Against a loop over all pairs of places.
  for chunk in range(0, documents.num_chunks, 5):
    tokens = documents.read(np.array([chunk]))
    text = [t for t in tokens['tokens'][0].tolist() if t]
    best = max((length for length in range(len(text) + 1)
                for start in range(len(text) - length + 1) for other in tokens['neighbor_tokens'][0]
                if ' '.join(['', *map(str, text[start:start + length]), '']) in
                ' '.join(['', *map(str, other.tolist()), ''])), default=0)
    assert leaks.overlap[chunk] == pytest.approx(best / len(text))
  clean = leaks.overlap <= 0.5
  assert not clean[leaked].any()
  assert clean[np.isin(documents.document, np.arange(1, len(held), 2))].mean() > 0.5


def test_kinds_of_tokens_against_a_loop(world):
  folder, _ = world
  documents = Documents(Examples(folder / 'held'))
  kinds = leakage.measured(documents, LeakageConfig(), 1).kinds
  for chunk in range(documents.num_chunks):
    first = chunk == documents.starts[documents.document[chunk]]
    now, before = (documents.read(np.array([c])) for c in (chunk, -1 if first else chunk - 1))
    read = set(before['neighbor_tokens'][0, 0].tolist()) - {0}
    for i, token in enumerate(now['tokens'][0].tolist()):
      kind = ('not_predicted' if not token or (first and i == 0) else
              'nothing_retrieved' if first else
              'in_retrieved' if token in read else 'not_in_retrieved')
      assert leakage.TOKEN_KINDS[kinds[chunk, i]] == kind


def test_words_as_wikitext_counts_them():
  # Each line ends in <eos>, an empty one too; what has no line end is a line all the same.
  assert words.count_words(' = Title = \n \n a b <unk> . \n') == 3 + 1 + 1 + 4 + 1
  assert words.count_words('a b') == 3 and words.count_words('') == 0
  assert words.word_perplexity(10.0, 5) == 4.0


@pytest.mark.parametrize('arguments, why', [
    (['--gate', '--gin.GateConfig.over=shuffled'], 'EvaluateJob.retro and SweepConfig.shuffled'),
    (['--gin.STRIDE=12'], 'multiple of 8 up to 32'),
    (['--gin.NUM_NEIGHBORS=4'], 'holds 3 neighbours a chunk, 4 asked for'),
    (['--gin.EvaluateJob.queries={folder}/db'], 'name the store they were made of'),
    (['--gin.EvaluateJob.sweep=@SweepConfig()',
      "--gin.SweepConfig.examples={{'retro_on': '{folder}/held'}}"], 'no name for a setting'),
    (['--gin.EvaluateJob.sweep=@SweepConfig()',
      "--gin.SweepConfig.examples={{'other': '{folder}/train_random'}}"], 'same queries')])
def test_mistakes_end_before_anything_is_scored(world, monkeypatch, capsys, arguments, why):
  folder, _ = world
  monkeypatch.setattr('sys.argv', [
      'evaluate', '--gin_file=gin/runs/evaluate.gin', f'--gin.OUTPUT={folder}/bad',
      f'--gin.RETRO={folder}/run/nearest', f'--gin.EXAMPLES={folder}/held',
      *[argument.format(folder=folder) for argument in arguments]])
  with pytest.raises(SystemExit) as stop:
    evaluate.main()
  assert stop.value.code == 2 and why in capsys.readouterr().err
  assert not (folder / 'bad').exists()
