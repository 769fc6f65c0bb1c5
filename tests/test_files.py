"""Local paths and TensorFlow's in-memory file system through one layer."""

import errno
import json
import os
import subprocess
import sys
import uuid

import pytest

from retro_jax import files, storage
from retro_jax.errors import UserError


@pytest.fixture(params=['local', 'ram'])
def root(request, tmp_path):
  """An empty folder of either kind."""
  return str(tmp_path) if request.param == 'local' else f'ram://{uuid.uuid4().hex}'


@pytest.fixture
def remote():
  return f'ram://{uuid.uuid4().hex}/deep/artefact'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('RETRO_JAX_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


def tree(folder):
  """Relative path to bytes."""
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def artefact(folder, **content):
  with storage.building(folder, {'kind': 'thing'}) as temporary:
    (temporary / 'deep').mkdir()
    for name, text in content.items():
      (temporary / 'deep' / name).write_text(text)
  return folder


def test_write_read_list_remove(root):
  path = files.join(root, 'a', 'b', 'x.bin')
  assert not files.exists(path) and files.list_folder(files.join(root, 'a')) == []
  files.write_bytes(path, b'one\n\0two')
  files.write_bytes(files.join(root, 'a', 'y'), b'')
  assert files.exists(path) and files.size(path) == 8 and files.read_bytes(path) == b'one\n\0two'
  with files.open_read(path) as f:
    assert (f.readline(), f.read(2), f.read(), f.read()) == (b'one\n', b'\0t', b'wo', b'')
  files.write_bytes(path, b'new')
  assert files.read_bytes(path) == b'new'
  assert files.list_folder(files.join(root, 'a')) == ['b', 'y']
  assert files.is_folder(files.join(root, 'a')) and not files.is_folder(path)
  files.remove_tree(files.join(root, 'a', 'y'))
  files.remove_tree(files.join(root, 'a', 'y'))
  assert files.list_folder(files.join(root, 'a')) == ['b']
  files.remove_tree(files.join(root, 'a'))
  assert not files.exists(path)


def test_lines_longer_than_a_block(root):
  path = files.join(root, 'a', 'x')
  line = b'x' * (9 << 20) + b'\n'
  files.write_bytes(path, line + b'end')
  with files.open_read(path) as f:
    assert list(f) == [line, b'end']


def test_glob(root):
  for name in ('b.txt', 'a.txt', 'c.md', 'deep/d.txt', '.hidden.txt', 'deep/e[1].txt'):
    files.write_bytes(files.join(root, name), b'x')
  under = lambda pattern: [p.removeprefix(root + '/') for p in files.glob(f'{root}/{pattern}')]
  assert under('*.txt') == ['a.txt', 'b.txt']
  assert under('*') == ['a.txt', 'b.txt', 'c.md']
  assert under('*/*.txt') == ['deep/d.txt', 'deep/e[1].txt']
  assert under('[ab].txt') == ['a.txt', 'b.txt']
  assert under('deep/e[1].txt') == ['deep/e[1].txt']  # literally
  assert under('a.txt') == ['a.txt'] and under('none*') == under('none') == under('deep') == []


def test_local_glob(tmp_path, monkeypatch):
  for name in ('a.txt', 'x/b.txt', 'x/y/c.txt', '.git/d.txt'):
    files.write_bytes(tmp_path / name, b'x')
  (tmp_path / 'x' / 'one').symlink_to(tmp_path / 'x')
  (tmp_path / 'x' / 'two').symlink_to(tmp_path / 'x')  # two circles: endless when followed
  found = [str(tmp_path / n) for n in ('a.txt', 'x/b.txt', 'x/y/c.txt')]
  assert files.glob(f'{tmp_path}/**/*.txt') == files.glob(f'{tmp_path}/**') == found
  monkeypatch.chdir(tmp_path)
  assert files.glob('**/*.txt') == ['a.txt', 'x/b.txt', 'x/y/c.txt']
  assert files.glob('*.txt') == files.glob('a.txt') == ['a.txt']
  assert [files.fixed_folder(p) for p in ('*.txt', 'a.txt', 'x/*', '/*', '/a/b*/c', '/a/b')] == [
      '.', '.', 'x', '/', '/a', '/a']
  with pytest.raises(UserError, match='no pattern of files'):
    files.glob('**x/*.txt')
  with pytest.raises(UserError, match='for paths on a disk'):
    files.glob('ram://x/**/*.txt')


@pytest.mark.parametrize('action', [files.size, files.read_bytes, files.open_read])
def test_a_missing_file_is_named(root, action):
  path = files.join(root, 'none.txt')
  with pytest.raises(UserError, match='no such file') as error:
    action(path)
  assert str(error.value).startswith(f'{path}: ') and '\n' not in str(error.value)


def test_other_refusals(tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(UserError, match='is a file, expected a folder'):
    files.read_bytes(tmp_path / 'file' / 'below')
  with pytest.raises(UserError, match='is a folder, expected a file'):
    files.read_bytes(tmp_path)
  with pytest.raises(UserError, match=r'^nosuch://x/y: cannot be read \(Unimplemented'):
    files.read_bytes('nosuch://x/y')


@pytest.mark.parametrize('number, message', [
    (errno.ENOSPC, 'disk full'), (errno.EROFS, 'read-only'), (errno.EACCES, 'permission denied'),
    (errno.EDQUOT, 'quota'), (errno.ENAMETOOLONG, 'name too long'), (errno.EBADF, 'Bad file')])
def test_errors_of_the_disk(number, message):
  error = files.explain(OSError(number, os.strerror(number)), 'line\nend')
  assert message in str(error) and str(error).startswith('line\\nend: ')
  assert isinstance(error, UserError)


def test_local_paths_need_no_tensorflow(tmp_path):
  script = ('import sys; from retro_jax import files; p = sys.argv[1]; '
            'files.write_bytes(files.join(p, "x"), b"x"); files.glob(p + "/*"); '
            'files.fetch_tree(p); assert "tensorflow" not in sys.modules')
  subprocess.run([sys.executable, '-c', script, str(tmp_path)], check=True)


def test_copy_tree_replaces_and_writes_the_manifest_last(tmp_path, remote, monkeypatch):
  import tensorflow as tf
  first = artefact(tmp_path / 'first', a='1', b='2')
  files.copy_tree(first, remote)
  second = artefact(tmp_path / 'second', a='3', c='4')
  steps = []
  copy, remove = tf.io.gfile.copy, tf.io.gfile.remove
  monkeypatch.setattr(tf.io.gfile, 'copy', lambda s, t, overwrite: (
      steps.append(os.path.basename(t)), copy(s, t, overwrite)))
  monkeypatch.setattr(tf.io.gfile, 'remove', lambda t: (
      steps.append('-' + os.path.basename(t)), remove(t)))
  files.copy_tree(second, remote)
  assert steps == ['-manifest.json', '-b', '-a', 'a', 'c', 'manifest.json']  # -a: ram appends
  assert tree(files.Path(files.fetch_tree(remote))) == tree(second)


def test_fetch_tree_is_kept_by_content(tmp_path, remote, cache):
  local = artefact(tmp_path / 'thing', a='1')
  files.copy_tree(local, remote)
  fetched = files.fetch_tree(remote)
  assert tree(files.Path(fetched)) == tree(local)
  assert files.fetch_tree(remote) == fetched and files.fetch_tree(local) == str(local)
  files.copy_tree(local, 'ram://moved/to/artefact')
  assert files.fetch_tree('ram://moved/to/artefact') == fetched
  files.copy_tree(artefact(tmp_path / 'thing', a='2'), remote)
  again = files.fetch_tree(remote)
  assert again != fetched and tree(files.Path(again)) == tree(local)
  assert sorted(os.listdir(cache / 'folders')) == sorted(map(os.path.basename, (fetched, again)))


def test_fetch_tree_checks_artefacts_inside_artefacts(tmp_path, remote, cache):
  (tmp_path / 'outer').mkdir()
  artefact(tmp_path / 'outer' / 'inner', a='1')
  (tmp_path / 'outer' / 'manifest.json').write_text(json.dumps({'files': {}}))
  (tmp_path / 'outer' / 'free.txt').write_text('in no manifest')
  files.copy_tree(tmp_path / 'outer', remote)
  files.fetch_tree(remote)
  files.write_bytes(remote + '/free.txt', b'changed')
  assert (files.Path(files.fetch_tree(remote)) / 'free.txt').read_bytes() == b'changed'
  files.write_bytes(remote + '/inner/deep/a', b'flipped')
  with pytest.raises(UserError, match='inner/deep/a: is not what manifest.json says'):
    files.fetch_tree(remote)
  assert not [name for name in os.listdir(cache / 'folders') if name.startswith('.')]
  with pytest.raises(UserError, match='no such file or folder'):
    files.fetch_tree(remote + '-none')
