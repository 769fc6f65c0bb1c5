"""The two tools as a person calls them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import retro_jax
from retro_jax.data.records import Examples
from tests import worlds

ROOT = Path(retro_jax.__file__).parents[1]


def call(tool, *arguments):
  return subprocess.run(
      [sys.executable, f'tools/{tool}.py', *arguments], cwd=ROOT, text=True, capture_output=True,
      check=False, env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'})


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tools')
  worlds.write_source(folder / 'in.jsonl', worlds.documents(1, 30))
  arguments = [
      '--gin_file=gin/data/json_lines.gin', f'--gin.PATTERN={folder}/in.jsonl',
      f'--gin.DATABASE={folder}/db', f'--gin.INDEX={folder}/index',
      f'--gin.VOCABULARY={folder}/v.model', '--gin.VOCABULARY_SIZE=384',
      '--gin.EMBEDDER=@LexicalEmbedder()', '--gin.CHUNK_LENGTH=8']
  return folder, arguments, call('build_database', *arguments)


def test_documents_to_records(built):
  folder, arguments, first = built
  assert first.returncode == 0, first.stderr
  assert 'skipped' not in first.stdout
  again = call('build_database', *arguments)
  assert again.returncode == 0 and again.stdout.count('current, skipped') == 3, again.stdout
  result = call(
      'retrieve_neighbors', '--gin_file=gin/data/neighbors.gin', f'--gin.EXAMPLES={folder}/x',
      f'--gin.QUERIES={folder}/db', f'--gin.DATABASE={folder}/db', f'--gin.INDEX={folder}/index',
      '--gin.SEQUENCE_LENGTH=32', '--gin.NUM_NEIGHBORS=2')
  assert result.returncode == 0, result.stderr
  examples = Examples(folder / 'x')
  assert examples.shape.sequence_length == 32 and examples.shape.num_neighbors == 2


@pytest.mark.parametrize('setting, words', [
    ('SEQUENCE_LENGTH=30', 'sequence_length is 30, no multiple of chunk_length 8'),
    ('SEQUENCE_LENGHT=32', "did you mean 'SEQUENCE_LENGTH'"),
])
def test_mistakes_are_one_line_and_exit_code_2(built, setting, words):
  folder = built[0]
  result = call(
      'retrieve_neighbors', '--gin_file=gin/data/neighbors.gin', f'--gin.EXAMPLES={folder}/none',
      f'--gin.QUERIES={folder}/db', f'--gin.DATABASE={folder}/db', f'--gin.INDEX={folder}/index',
      f'--gin.{setting}')
  errors = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
  assert result.returncode == 2 and len(errors) == 1 and words in errors[0], result.stderr
  assert 'Traceback' not in result.stderr and not (folder / 'none').exists()
