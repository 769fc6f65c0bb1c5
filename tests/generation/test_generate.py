"""The command: python -m retro_jax.generate over a model, a database and an index on disk."""

import json

import jax
import pytest

from retro_jax import configuration
from retro_jax import generate as entry
from retro_jax.retrieval import pipeline
from retro_jax.retrieval.embedders import LexicalEmbedder
from retro_jax.training import checkpoints, state
from tests import worlds
from tests.generation.test_decode import PROMPT, make_config, random_parameters
from tools import measure_generation


@pytest.fixture(scope='module')
def arguments(tmp_path_factory) -> dict[str, str]:
  """A model that was never trained, saved as a run, and a database."""
  folder = tmp_path_factory.mktemp('run')
  database = worlds.store(folder / 'db', worlds.documents(0, 8))
  pipeline.build_index(folder / 'index', database)
  for name, config in (('retro', make_config()), ('baseline', make_config().baseline())):
    checkpoints.write_model_description(folder / name, config, {
        'size': worlds.vocabulary().size, 'fingerprint': worlds.vocabulary().fingerprint})
    saved = checkpoints.Checkpoints(folder / name / 'checkpoints', checkpoints.CheckpointConfig())
    parameters = random_parameters(config)
    saved.save(state.TrainState(jax.numpy.zeros((), int), parameters, {}), 1, {})
    saved.close()
  return {'RUN_DIR': str(folder / 'retro'), 'VOCABULARY': worlds.vocabulary().path,
          'DATABASE': str(database.folder), 'INDEX': str(folder / 'index'), 'PROMPT': PROMPT,
          'EMBEDDER': '@LexicalEmbedder()', 'LexicalEmbedder.dimension': '16',
          'MAX_NEW_TOKENS': '20'}


def run(arguments):
  argv = ['--gin_file=gin/runs/generate.gin',
          *(f'--gin.{name}={value}' for name, value in arguments.items())]
  classes = (entry.BertEmbedder, LexicalEmbedder, entry.RandomEmbedder)
  configuration.main(entry.GenerateJob, entry.run, classes, argv)


def test_prints_continuation_and_neighbors(arguments, capsys):
  run(arguments)
  printed = capsys.readouterr().out
  assert 'continuation (' in printed and 'chunk 1 ' in printed and 'chunk 2 read:' in printed
  assert any(f'Title {i}' in printed for i in range(8))
  assert '\n'.join('  ' + line for line in PROMPT.split('\n')) in printed
  run(arguments)
  assert capsys.readouterr().out == printed


def test_all_settings_and_the_files(arguments, capsys, tmp_path):
  changes = {'OUTPUT': str(tmp_path / 'made.json'), 'STOP': "('zzz',)", 'RETRIEVAL_STEP': '5',
             'LEFT_PAD': 'True', 'COLOR': 'always', 'SEQUENCE_LENGTH': '32'}
  run(arguments | changes)
  printed = capsys.readouterr().out
  assert 'written to' in printed
  made = json.loads((tmp_path / 'made.json').read_text())
  lengths = [len(chunk['tokens']) for chunk in made['chunks']]
  assert {5, 3} <= set(lengths[1:-1]) <= {8, 5, 3}  # of the prompt, and written: cut after 5
  assert all(chunk['neighbors'] for chunk in made['chunks'][:-1])
  assert made['measures']['tokens'] == len(made['tokens'])


def test_measures_of_many_prompts(arguments, capsys, tmp_path):
  given = {name: arguments[name] for name in (
      'RUN_DIR', 'VOCABULARY', 'DATABASE', 'INDEX', 'EMBEDDER', 'LexicalEmbedder.dimension')}
  worlds.write_source(tmp_path / 'prompts.jsonl', worlds.documents(5, 4))
  given |= {'PROMPTS': str(tmp_path / 'prompts.jsonl'), 'OUTPUT': str(tmp_path), 'COUNT': '3',
            'PROMPT_TOKENS': '12', 'MAX_NEW_TOKENS': '10', 'SLOTS': '2', 'SEQUENCE_LENGTH': '32'}
  argv = ['--gin_file=gin/runs/measure_generation.gin',
          *(f'--gin.{name}={value}' for name, value in given.items())]
  configuration.main(measure_generation.MeasureGenerationJob, measure_generation.run,
                     measure_generation.CONFIGURABLES, argv)
  assert 'means over 3 prompts' in capsys.readouterr().out
  body = json.loads((tmp_path / 'results.json').read_text())
  assert [row['retrieval'] for row in body['rows']] == ['on', 'off'] * 3
  for setting, means in body['means'].items():
    values = [row['repetition'] for row in body['rows'] if row['retrieval'] == setting]
    assert means['repetition'] == pytest.approx(sum(values) / 3)


def test_without_retrieval_no_database_is_needed(arguments, capsys):
  run(arguments | {'RETRIEVAL': 'False', 'DATABASE': "''", 'INDEX': "''"})
  printed = capsys.readouterr().out
  assert 'continuation (' in printed and 'neighbours' not in printed
  run(arguments | {'RUN_DIR': arguments['RUN_DIR'].replace('retro', 'baseline')})
  assert 'a baseline' in capsys.readouterr().out


@pytest.mark.parametrize('name, value, words', [
    ('RUN_DIR', '/nowhere', 'no trained model'), ('VOCABULARY', '/nowhere', '/nowhere'),
    ('DATABASE', '/nowhere', 'no chunk-database there'), ('INDEX', "''", 'GenerateJob.index'),
    ('LexicalEmbedder.dimension', '32', 'embedder'), ('TOP_P', '7', 'top_p'),
    ('OUTPUT', 'made.pdf', 'endings'), ('RETRIEVAL_STEP', '9', 'retrieval_step'),
    ('NUM_NEIGHBOURS', '2', 'NUM_NEIGHBORS')])
def test_mistakes_end_with_one_line_and_code_2(arguments, capsys, name, value, words):
  with pytest.raises(SystemExit) as caught:
    run(arguments | {name: value})
  printed = capsys.readouterr().err
  assert caught.value.code == 2
  assert words in printed and printed.count('\n') == 1 and printed.startswith('error: ')
