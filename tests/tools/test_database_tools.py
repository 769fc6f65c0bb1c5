"""The two tools as a person calls them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import retro_jax
from retro_jax.data.records import Examples
from retro_jax.retrieval.database import ChunkDatabase
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


def test_a_database_lives(built, tmp_path):
  """verify finds a flipped byte, build makes that part anew; remove, compact and add."""
  folder = tmp_path / 'copy'
  shutil.copytree(built[0], folder)
  arguments = [a.replace(str(built[0]), str(folder)) if 'PATTERN' not in a else a
               for a in built[1]]
  whole = call('build_database', 'verify', f'{folder}/db', f'{folder}/index')
  assert whole.returncode == 0 and 'every byte is as it was written' in whole.stdout
  victim = next((folder / 'db' / 'chunks').rglob('*.npy'))
  before = victim.read_bytes()
  victim.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
  damaged = call('build_database', 'verify', f'{folder}/db')
  assert damaged.returncode == 1 and victim.name in damaged.stdout, damaged.stdout
  again = call('build_database', *arguments)
  assert again.returncode == 0 and victim.read_bytes() == before, again.stderr

  database = ChunkDatabase.open(folder / 'db')
  name = database.document_info(0)['id']
  (folder / 'ids').write_text(f'{name}\n')
  removed = call('build_database', 'remove', f'{folder}/db', f'@{folder}/ids')
  assert removed.returncode == 0 and '1 documents removed' in removed.stdout
  compacted = call('build_database', 'compact', f'{folder}/db', f'{folder}/index')
  assert compacted.returncode == 0 and '1 documents taken out' in compacted.stdout
  unknown = call('build_database', 'remove', f'{folder}/db', 'nobody')
  assert unknown.returncode == 2 and unknown.stderr.count('error: ') == 1

  worlds.write_source(folder / 'more.jsonl', worlds.documents(7, 4, prefix='more'))
  added = call('build_database', 'add', *[
      f'--gin.PATTERN={folder}/more.jsonl' if 'PATTERN' in a else a for a in arguments])
  assert added.returncode == 0, added.stderr
  assert ChunkDatabase.open(folder / 'db').num_documents == database.num_documents - 1 + 4
