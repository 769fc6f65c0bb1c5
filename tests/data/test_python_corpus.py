"""The Python library corpus on a small tree, and a glance at the running one."""

import json
import random
import subprocess
import sys

import pytest

from retro_jax.data.python_corpus import FAMILIES, PythonLibrary
from retro_jax.errors import UserError

SETTINGS = dict(held_out=0.1, smallest_file=20)


def program(seed, lines=30):
  rng = random.Random(seed)
  return ''.join(f'name_{rng.randrange(10**6)} = call_{rng.randrange(10**6)}({i})\n'
                 for i in range(lines))


@pytest.fixture
def tree(tmp_path):
  """`lib/` with 60 programs, copies of all of them with one line added, and unsuitable files."""
  root = tmp_path / 'lib'
  for i in range(60):
    for folder, extra in (('one', ''), ('copy', 'print("a copy")\n')):
      path = root / folder / f'module_{i}.py'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(program(i) + extra)
  for name, content in {
      'binary.py': b'\0' * 100, 'minified.py': b'x=1;' * 1000, 'small.py': b'x = 1\n',
      'blank.py': b'\n' * 100, 'large.py': b'x = 1\n' * 40_000, 'data.json': b'[1]\n' * 100,
      '__pycache__/cached.py': b'cached = 1\n' * 10, 'retro_jax/own.py': b'own = 1\n' * 10,
      'x-1.0.dist-info/NOTES.txt': b'metadata\n' * 10, '_sysconfigdata_x.py': b'path = 1\n' * 10,
      'docs/bad.rst': b'bad \xff byte in a text of words\n' * 3}.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)
  return root


def ids(root, split='train', **settings):
  return [d.id for d in PythonLibrary(
      split=split, roots=(str(root),), **(SETTINGS | settings)).documents()]


def test_documents_are_split_by_path(tree):
  splits = {s: ids(tree, s) for s in ('train', 'valid', 'test')}
  dropped = PythonLibrary(roots=(str(tree),), **SETTINGS).dropped()
  everything = sum(splits.values(), []) + list(dropped)
  assert sorted(everything) == sorted(
      [f'lib/{f}/module_{i}.py' for f in ('one', 'copy') for i in range(60)]
      + ['lib/docs/bad.rst'])
  assert len(set(everything)) == len(everything)
  assert splits['train'] == sorted(splits['train'])
  assert 2 <= len(splits['valid']) <= 30 and 2 <= len(splits['test']) <= 30


def test_copies_of_held_out_files_leave_train(tree):
  library = PythonLibrary(roots=(str(tree),), **SETTINGS)
  held = set(ids(tree, 'valid') + ids(tree, 'test'))
  twin = lambda name: (name.replace('/copy/', '/one/') if '/copy/' in name
                       else name.replace('/one/', '/copy/'))
  expected = {twin(name) for name in held if '/module_' in name} - held
  assert expected and set(library.dropped()) == expected
  for copy, original in library.dropped().items():
    assert original == twin(copy)
  list(library.documents())
  assert library.report.dropped == len(expected)
  assert library.report.dropped_bytes == sum(
      (tree.parent / name).stat().st_size for name in expected)
  assert f'{len(expected)} train documents' in str(library.report)
  # A threshold no pair reaches drops nothing.
  assert not PythonLibrary(roots=(str(tree),), similarity=1.0, **SETTINGS).dropped()


def test_document_fields_and_report(tree):
  library = PythonLibrary(roots=(str(tree / 'docs'),), **SETTINGS | dict(held_out=1e-9))
  (document,) = library.documents()
  assert (document.id, document.title, document.source) == ('docs/bad.rst', 'docs/bad.rst', 'docs')
  assert '\ufffd' in document.text
  assert (library.report.documents, library.report.replaced) == (1, 1)
  library = PythonLibrary(roots=(str(tree),), **SETTINGS)
  list(library.documents())
  assert library.report.unsuitable == 3  # binary, minified, blank


def test_folders_suffixes_and_budget(tree):
  assert all(i.startswith('lib/one/') for i in ids(tree, folders=('lib/one',)))
  assert not PythonLibrary(roots=(str(tree),), folders=('lib/one',), **SETTINGS).dropped()
  both = ids(tree, folders=('lib/one/module_1.py', 'lib/docs'), held_out=1e-9)
  assert both == ['lib/docs/bad.rst', 'lib/one/module_1.py']
  assert ids(tree, suffixes=('.rst',), held_out=1e-9) == ['lib/docs/bad.rst']
  size = (tree / 'one' / 'module_0.py').stat().st_size
  some = PythonLibrary(roots=(str(tree),), max_bytes=20 * size, **SETTINGS)
  documents = list(some.documents())
  assert 10 <= len(documents) <= 21 and some.report.not_sampled >= 99
  # A larger budget only adds files, and no file changes its split.
  assert {d.id for d in documents} <= set(ids(tree, max_bytes=60 * size)) | set(
      PythonLibrary(roots=(str(tree),), max_bytes=60 * size, **SETTINGS).dropped())


def test_describe_changes_with_content(tree):
  library = PythonLibrary(roots=(str(tree),), **SETTINGS)
  before = library.describe()
  assert json.loads(json.dumps(before)) == json.loads(json.dumps(library.describe()))
  name = next(i for i in ids(tree) if '/module_' in i)
  path = tree.parent / name
  path.write_text(path.read_text().replace('call', 'cell'))
  assert library.describe() != before
  assert PythonLibrary(split='valid', roots=(str(tree),), **SETTINGS).describe() != before


def test_same_in_another_process(tree):
  script = ('import json, sys; from retro_jax.data.python_corpus import PythonLibrary; '
            f'l = PythonLibrary(roots=(sys.argv[1],), **{SETTINGS!r}); '
            'print(json.dumps([l.describe(), [d.id for d in l.documents()]]))')
  run = subprocess.run([sys.executable, '-c', script, str(tree)], check=True,
                       capture_output=True, text=True)
  library = PythonLibrary(roots=(str(tree),), **SETTINGS)
  assert json.loads(run.stdout) == json.loads(
      json.dumps([library.describe(), [d.id for d in library.documents()]]))


def test_running_python():
  library = PythonLibrary(folders=('stdlib/json', 'stdlib/email', 'numpy/polynomial'))
  documents = list(library.documents())
  assert {d.source for d in documents} == {'stdlib', 'numpy'}
  assert {d.id.split('/')[1] for d in documents} == {'json', 'email', 'polynomial'}
  assert all('site-packages' not in d.id for d in documents)


def test_default_folders_are_those_of_the_running_python(tree):
  everything = PythonLibrary(folders=(), roots=(str(tree),), **SETTINGS)
  assert [d.id for d in everything.documents()] == ids(tree)
  library = PythonLibrary(split='valid')
  documents = list(library.documents())
  assert documents and all(d.id.startswith(FAMILIES) for d in documents)
  assert library.describe()['folders'] == list(FAMILIES)


def test_budget_takes_whole_folders(tree):
  size = (tree / 'one' / 'module_0.py').stat().st_size
  library = PythonLibrary(roots=(str(tree),), max_bytes=50 * size, **SETTINGS)
  assert {d.id.split('/')[1] for d in library.documents()} - {'docs'} in ({'one'}, {'copy'})


def test_refusals(tree, tmp_path):
  for settings, message in [
      (dict(roots=(str(tmp_path / 'none'),)), 'no such folder'),
      (dict(roots=(str(tree),), folders=('lib/none',)), 'no .py'),
      (dict(split='dev'), 'train, valid, test'), (dict(held_out=0.6), 'held_out')]:
    with pytest.raises(UserError, match=message) as error:
      list(PythonLibrary(**settings).documents())
    assert '\n' not in str(error.value)
