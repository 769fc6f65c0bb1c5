"""The quickstart's own entry on a small tree of files the test writes; then once more."""

import json
import shutil

import numpy as np
import pytest

from retro_jax import configuration, generate, quickstart
from retro_jax.data.records import Examples
from retro_jax.evaluate import CONFIGURABLES as EVALUATE_CONFIGURABLES
from retro_jax.evaluate import EvaluateJob, evaluate
from retro_jax.training.checkpoints import export_model, load_model
from retro_jax.training.metrics import read_metrics
from tests import worlds


@pytest.fixture(scope='module')
def run_quickstart(tmp_path_factory):
  folder = tmp_path_factory.mktemp('quickstart')
  rng = np.random.default_rng(0)
  shared = worlds.text(rng, 120)
  for i in range(60):
    path = folder / 'library' / f'part{i % 6}' / f'file{i}.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(worlds.text(rng, 60) + shared + worlds.text(rng, 60), encoding='utf-8')
  arguments = [
      '--gin_file=gin/runs/quickstart.gin', f'--gin.RUN_DIR={folder}/run', '--gin.VOCABULARY=',
      '--gin.PRETRAINED=', '--gin.VOCAB_SIZE=352', '--gin.CORPUS_FOLDERS=()',
      f"--gin.PythonLibrary.roots=('{folder}/library',)", '--gin.PythonLibrary.smallest_file=100',
      '--gin.PythonLibrary.held_out=0.2',
      '--gin.QuickstartJob.embedder=@LexicalEmbedder()', '--gin.TRAIN_STEPS=4',
      '--gin.SEQUENCE_LENGTH=64', '--gin.CHUNK_LENGTH=16', '--gin.RetroConfig.d_model=16',
      '--gin.RetroConfig.encoder_d_model=16', '--gin.TrainingConfig.batch_size=8',
      '--gin.TrainingConfig.log_every=2', '--gin.TrainingConfig.evaluate_every=2',
      '--gin.TrainingConfig.evaluate_examples=8', '--gin.CheckpointConfig.every=2',
      '--gin.QuickstartJob.sample_tokens=20']

  def run(*more):
    configuration.main(quickstart.QuickstartJob, quickstart.quickstart, quickstart.CONFIGURABLES,
                       [*arguments, *more])
    return folder / 'run'
  return run


def test_the_whole_path(run_quickstart, capsys):
  run = run_quickstart()
  printed = capsys.readouterr().out
  results = json.loads((run / 'results.json').read_text())
  assert set(results['bits_per_byte']) == {'baseline', 'retro_off', 'retro_on', 'retro_random'}
  assert all(0 < value < 20 for value in results['bits_per_byte'].values())
  assert results['trained_on']['baseline'] == results['trained_on']['retro']
  assert {'command', 'config', 'seed', 'fingerprints', 'rows'} <= set(results)
  assert (run / 'results.png').read_bytes().startswith(b'\x89PNG')
  assert '<html' in (run / 'neighbors.html').read_text()
  for name in ('baseline', 'retro'):
    assert [row['step'] for row in read_metrics(run / name) if 'loss' in row] == [2, 4]
  assert 'RETRO[ON]' in printed and 'left out' in printed

  # A second call finds every stage current and the training at its end.
  before = load_model(run / 'retro')[1]
  again = run_quickstart()
  printed = capsys.readouterr().out
  assert ' built;' not in printed and printed.count('current, skipped') >= 8
  assert 'starting at step 4 of 4' in printed
  after = load_model(again / 'retro')[1]
  assert all((before[name] == after[name]).all() for name in before)
  assert json.loads((run / 'results.json').read_text())['bits_per_byte'] == results['bits_per_byte']

  _export_evaluate_generate(run, results, capsys)
  _mistakes(run, capsys)


def _export_evaluate_generate(run, results, capsys):
  export_model(run / 'retro', run / 'vocabulary.model', run / 'exported', {'trained_on': 'a test'})
  configuration.main(EvaluateJob, evaluate, EVALUATE_CONFIGURABLES, [
      '--gin_file=gin/runs/evaluate.gin', f'--gin.OUTPUT={run}/evaluated',
      f'--gin.RETRO={run}/exported',
      f'--gin.BASELINE={run}/baseline', f'--gin.EXAMPLES={run}/examples/test',
      f'--gin.RANDOM_EXAMPLES={run}/examples/test_random', '--gin.STRIDE=64'])
  again = json.loads((run / 'evaluated' / 'results.json').read_text())['bits_per_byte']
  assert again == pytest.approx(results['bits_per_byte'], rel=1e-6)
  capsys.readouterr()
  configuration.main(generate.GenerateJob, generate.run, quickstart.CONFIGURABLES, [
      '--gin_file=gin/runs/generate.gin', f'--gin.RUN_DIR={run}/exported',
      f'--gin.VOCABULARY={run}/vocabulary.model', f'--gin.DATABASE={run}/stores/train',
      f'--gin.INDEX={run}/index', '--gin.EMBEDDER=@LexicalEmbedder()', '--gin.MAX_NEW_TOKENS=20',
      f'--gin.PROMPT={worlds.text(np.random.default_rng(5), 30)}'])
  assert 'neighbours' in capsys.readouterr().out


def _refused(capsys, job, run, configurables, arguments):
  with pytest.raises(SystemExit) as stop:
    configuration.main(job, run, configurables, arguments)
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
  assert stop.value.code == 2 and len(lines) == 1
  return lines[0]


def _mistakes(run, capsys):
  """A model and records of different vocabularies; a damaged record file; no data."""
  other = run / 'exported_other'
  shutil.copytree(run / 'exported', other)
  described = json.loads((other / 'model.json').read_text())
  described['vocabulary']['fingerprint'] = 'of another vocabulary'
  (other / 'model.json').write_text(json.dumps(described))
  arguments = ['--gin_file=gin/runs/evaluate.gin', f'--gin.OUTPUT={run}/none']
  line = _refused(capsys, EvaluateJob, evaluate, EVALUATE_CONFIGURABLES, [
      *arguments, f'--gin.RETRO={other}', f'--gin.EXAMPLES={run}/examples/test'])
  assert 'of another vocabulary' in line and 'rebuild the examples' in line
  line = _refused(capsys, EvaluateJob, evaluate, EVALUATE_CONFIGURABLES, [
      *arguments, f'--gin.RETRO={run}/exported', f'--gin.EXAMPLES={run}/nowhere'])
  assert 'nowhere' in line and 'build it first' in line
  assert not (run / 'none').exists()
  assert len(Examples(run / 'examples' / 'test')) > 0


def test_an_empty_corpus_and_lengths_that_do_not_fit_are_refused(run_quickstart, tmp_path, capsys):
  (tmp_path / 'empty').mkdir()
  with pytest.raises(SystemExit) as stop:
    run_quickstart(f'--gin.RUN_DIR={tmp_path}/run',
                   f"--gin.PythonLibrary.roots=('{tmp_path}/empty',)")
  lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
  assert stop.value.code == 2 and len(lines) == 1 and 'empty' in lines[0]
  with pytest.raises(SystemExit) as stop:
    run_quickstart(f'--gin.RUN_DIR={tmp_path}/run', '--gin.SEQUENCE_LENGTH=60')
  lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
  assert stop.value.code == 2
  assert 'sequence_length is 60, no multiple of chunk_length 16' in lines[0]
  assert not (tmp_path / 'run' / 'examples').exists()
