"""A full disk, a limit on sizes, a place nobody may write to: one line, nothing half-written."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import retro_jax
from tests import worlds

ROOT = Path(retro_jax.__file__).parents[1]


def build(folder, source, limit=None):
  """The database tool with everything in `folder`; files no larger than `limit` bytes."""
  def prepare():
    if limit:
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
  return subprocess.run(
      [sys.executable, 'tools/build_database.py', '--gin_file=gin/data/json_lines.gin',
       f'--gin.PATTERN={source}', f'--gin.DATABASE={folder}/db', f'--gin.INDEX={folder}/index',
       f'--gin.VOCABULARY={worlds.vocabulary().path}', '--gin.EMBEDDER=@LexicalEmbedder()',
       '--gin.CHUNK_LENGTH=8', '--gin.LocalRunner.workers=0'],
      cwd=ROOT, preexec_fn=prepare, text=True, capture_output=True, check=False,
      env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'})


def said(result):
  """The one line of error of a build that could not write."""
  errors = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
  assert result.returncode == 2 and len(errors) == 1, result.stderr
  assert 'Traceback' not in result.stderr
  return errors[0]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp('source')
  worlds.write_source(folder / 'in.jsonl', worlds.documents(1, 60))
  return folder / 'in.jsonl'


def half_written(folder):
  return [p for p in folder.rglob('.*') if p.name != '.lock']


@pytest.mark.parametrize('limit', [3_000, 12_000, 120_000])
def test_files_that_may_not_grow(tmp_path, source, limit):
  error = said(build(tmp_path, source, limit))
  assert 'too large for this file system' in error and str(tmp_path) in error
  assert not half_written(tmp_path)
  # With room, it goes on from what was finished.
  assert build(tmp_path, source).returncode == 0


def test_a_full_disk(tmp_path, source):
  disk = tmp_path / 'disk'
  disk.mkdir()
  mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', disk],
                           capture_output=True, check=False)
  if mounted.returncode:
    pytest.skip(f'no small file system can be mounted here: {mounted.stderr.decode().strip()}')
  try:
    error = said(build(disk, source))
    assert 'disk full: free space or choose another folder' in error
    assert not half_written(disk)
    subprocess.run(['mount', '-o', 'remount,size=100m', disk], check=True)
    assert build(disk, source).returncode == 0
    subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
    worlds.write_source(source.with_name('other.jsonl'), worlds.documents(2, 5))
    before = worlds.content(disk)
    error = said(build(disk, source.with_name('other.jsonl')))
    assert 'read-only file system' in error and worlds.content(disk) == before
  finally:
    subprocess.run(['umount', disk], check=True)


def test_a_place_where_nobody_may_write(source):
  """Of the kernel: not even root may make folders there."""
  error = said(build(Path('/sys/kernel'), source))
  assert '/sys/kernel/db' in error and 'choose another' in error
