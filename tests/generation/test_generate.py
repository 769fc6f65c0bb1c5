"""The command: python -m retro_jax.generate over a model, a database and an index on disk."""

import jax
import pytest

from retro_jax import configuration
from retro_jax import generate as entry
from retro_jax.retrieval import pipeline
from retro_jax.retrieval.embedders import LexicalEmbedder
from retro_jax.training import checkpoints, state
from tests import worlds
from tests.generation.test_decode import PROMPT, make_config, random_parameters


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
    ('NUM_NEIGHBOURS', '2', 'NUM_NEIGHBORS')])
def test_mistakes_end_with_one_line_and_code_2(arguments, capsys, name, value, words):
  with pytest.raises(SystemExit) as caught:
    run(arguments | {name: value})
  printed = capsys.readouterr().err
  assert caught.value.code == 2
  assert words in printed and printed.count('\n') == 1 and printed.startswith('error: ')
