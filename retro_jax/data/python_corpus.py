"""The quickstart's corpus: source and docs of the Python that is running, split by file.

Text that every machine with this project has: the standard library and the installed
packages. Which of their files are taken, and which of those are train, valid or test,
depends on nothing but their relative paths; near_duplicates.py finds the copies of
held-out files that are kept out of train.
"""

import dataclasses
import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retro_jax.data import corpus
from retro_jax.data.corpus import Document
from retro_jax.data.near_duplicates import near_duplicates, shingles
from retro_jax.errors import UserError
from retro_jax.storage import fingerprint

SPLITS = ('train', 'valid', 'test')
STDLIB = 'stdlib'
# Folders whose files resemble each other, so that there is something to retrieve: class after
# class on one pattern, a package and its copy of another time, an interface and its asynchronous
# twin. Chosen for that: a gain measured here says nothing about text at large. Folders that a
# machine lacks are left out.
FAMILIES = (
    'keras/src/applications', 'keras/src/layers', 'keras/src/metrics', 'keras/src/optimizers',
    'pymongo', 'setuptools/_distutils', 'stdlib/distutils', 'stdlib/email',
    'stdlib/unittest', 'tensorflow/python/keras/layers', 'tensorflow/python/layers')
# Caches, package metadata, and the project itself (its text would change while it is worked on).
_SKIPPED_FOLDERS = ('__pycache__', 'site-packages', 'node_modules', 'retro_jax')
_SKIPPED_SUFFIXES = ('.dist-info', '.egg-info')
# Written at installation, with paths of the machine in it.
_SKIPPED_FILES = ('_sysconfigdata',)
_LONGEST_MEAN_LINE = 200  # characters; beyond it a file is data or minified, not prose or code


@dataclasses.dataclass
class Report(corpus.Report):
  """One split's documents, and what was left out of all splits."""

  unsuitable: int = 0  # binary, minified or empty files
  not_sampled: int = 0  # beyond max_bytes
  dropped: int = 0  # train documents near-identical to a held-out one
  dropped_bytes: int = 0

  def __str__(self) -> str:
    return (f'{super().__str__()}; left out: {self.dropped:,} train documents '
            f'({self.dropped_bytes:,} bytes) near-identical to a held-out one, '
            f'{self.unsuitable:,} unsuitable files, {self.not_sampled:,} beyond max_bytes')


@dataclasses.dataclass(frozen=True)
class PythonLibrary:
  """Files of the standard library and the installed packages, one document each.

  A document's id and title are its relative path ('stdlib/json/decoder.py',
  'jax/_src/core.py'), its source is 'stdlib' or the name of the package.

  Attributes:
    split: 'train', 'valid' or 'test'.
    max_bytes: at most so much text in the three splits together. Whole folders are taken,
      in the order of a hash of their path: files of one folder often are a family, and what
      there is to retrieve for one is in its siblings.
    folders: relative paths to take ('keras', 'stdlib/test'); () means everything, None means
      FAMILIES, or everything when `roots` are given.
    suffixes: kinds of files to take.
    smallest_file: bytes below which a file is left out (licence headers and nothing else).
    largest_file: bytes above which a file is left out.
    held_out: share of the files in valid, and in test.
    similarity: Jaccard similarity of 13-word shingles from which a train document counts
      as a copy of a held-out one and is dropped.
    roots: folders to read instead of the running Python's; ids begin with a folder's name.
  """

  split: str = 'train'
  max_bytes: int = 12_000_000
  folders: tuple[str, ...] | None = None
  suffixes: tuple[str, ...] = ('.py', '.rst', '.md', '.txt')
  smallest_file: int = 1_000
  largest_file: int = 200_000
  held_out: float = 0.04
  similarity: float = 0.8
  roots: tuple[str, ...] = ()
  report: Report = dataclasses.field(
      default_factory=Report, init=False, compare=False, repr=False)

  def __post_init__(self):
    if self.split not in SPLITS:
      raise UserError(f'PythonLibrary: split is {self.split!r}, expected one of '
                      f'{", ".join(SPLITS)}')
    if not 0 < self.held_out < 0.5:
      raise UserError(f'PythonLibrary: held_out is {self.held_out}, expected a share of the '
                      'files between 0 and 0.5')

  def shards(self) -> list['PythonLibrary']:
    """Itself: which files a split has is decided by looking at all of them."""
    return [self]

  @property
  def name(self) -> str:
    """Of the one shard."""
    return f'python-library/{self.split}'

  @property
  def weight(self) -> int:
    """Bytes of the split's text."""
    return sum(len(d.text.encode()) for d, _ in self._chosen().documents[self.split])

  def documents(self) -> Iterator[Document]:
    """The split's documents in order of path.

    Raises:
      UserError: a root that is no folder, or no suitable file.
    """
    chosen = self._chosen()
    corpus.reset(self.report)
    self.report.unsuitable, self.report.not_sampled = chosen.unsuitable, chosen.not_sampled
    self.report.dropped, self.report.dropped_bytes = len(chosen.dropped), chosen.dropped_bytes
    for document, replaced in chosen.documents[self.split]:
      self.report.count(document.text, replaced)
      yield document
    corpus.require_text(self.report, f'PythonLibrary {self.split}')

  def dropped(self) -> dict[str, str]:
    """The train documents left out, each with the held-out document it is a copy of."""
    return dict(self._chosen().dropped)

  def describe(self) -> dict[str, Any]:
    """Settings and a fingerprint of the split's paths and content."""
    documents = self._chosen().documents[self.split]
    settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                if f.name not in ('report', 'roots')}
    content = [[d.id, hashlib.sha256(d.text.encode()).hexdigest()] for d, _ in documents]
    return {'kind': 'python-library', **settings, 'folders': list(self._folders()),
            'suffixes': list(self.suffixes), 'documents': len(documents),
            'content': fingerprint(content)}

  def _folders(self) -> tuple[str, ...]:
    if self.folders is None:
      return () if self.roots else FAMILIES
    return tuple(self.folders)

  def _chosen(self) -> '_Chosen':
    folders = self._folders()
    roots = self.roots or _running_python()
    files = tuple(f for f in _listing(roots, bool(self.roots), folders, self.suffixes)
                  if self.smallest_file <= f[2] <= self.largest_file)
    if not files:
      raise UserError(f'PythonLibrary: no {", ".join(self.suffixes)} file of '
                      f'{self.smallest_file} to {self.largest_file} bytes in '
                      f'{", ".join(folders) or "any folder"} of {", ".join(roots)}')
    return _choose(files, self.max_bytes, self.held_out, self.similarity)


@dataclasses.dataclass(frozen=True)
class _Chosen:
  """The three splits, (document, whether UTF-8 was replaced), and what was left out."""

  documents: dict[str, list[tuple[Document, bool]]]
  unsuitable: int
  not_sampled: int
  dropped: tuple[tuple[str, str], ...]
  dropped_bytes: int


def _running_python() -> tuple[str, ...]:
  """Folders of the standard library and of the environment's packages, the former first."""
  paths = sysconfig.get_paths()
  return tuple(dict.fromkeys(paths[name] for name in ('stdlib', 'purelib', 'platlib')))


def _listing(roots: tuple[str, ...], named: bool, folders: tuple[str, ...],
             suffixes: tuple[str, ...]) -> Iterator[tuple[str, str, int, int]]:
  """(relative path, path, size, time) of every file that may be taken, in order of path."""
  found = {}
  for position, root in enumerate(roots):
    if not os.path.isdir(root):
      raise UserError(f'{root}: no such folder; check roots')
    prefix = Path(root).name if named else '' if position else STDLIB
    for folder, below, names in os.walk(root):
      relative = os.path.normpath(os.path.join(prefix, os.path.relpath(folder, root)))
      below[:] = [b for b in below if not _skipped(b)
                  and _wanted(os.path.normpath(os.path.join(relative, b)), folders, partly=True)]
      for name in names:
        file = os.path.normpath(os.path.join(relative, name)).replace(os.sep, '/')
        if (not name.endswith(suffixes) or name.startswith(_SKIPPED_FILES)
            or not _wanted(file, folders)):
          continue
        path = os.path.join(folder, name)
        if os.path.isfile(path):
          status = os.stat(path)
          found.setdefault(file, (file, path, status.st_size, status.st_mtime_ns))
  yield from (found[file] for file in sorted(found))


def _skipped(folder: str) -> bool:
  return folder in _SKIPPED_FOLDERS or folder.endswith(_SKIPPED_SUFFIXES)


def _wanted(path: str, folders: tuple[str, ...], partly: bool = False) -> bool:
  """Whether `path` lies in one of `folders`; `partly`: or may contain one of them."""
  path = path.replace(os.sep, '/')
  return not folders or any(
      path == folder or path.startswith(folder + '/')
      or partly and folder.startswith(path + '/') for folder in folders)


def _share(path: str, purpose: str) -> float:
  """A number in [0, 1) that depends on nothing but `path` and `purpose`."""
  digest = hashlib.blake2b(f'{purpose}:{path}'.encode('utf-8', 'replace'), digest_size=7)
  return int.from_bytes(digest.digest(), 'big') / 2**56


@functools.lru_cache(maxsize=2)  # the three splits of one corpus are asked for in turn
def _choose(files: tuple[tuple[str, str, int, int], ...], max_bytes: int, held_out: float,
            similarity: float) -> _Chosen:
  documents: dict[str, list[tuple[Document, bool]]] = {split: [] for split in SPLITS}
  unsuitable = not_sampled = total = 0
  order = lambda f: (_share(os.path.dirname(f[0]), 'sample'), _share(f[0], 'sample'))
  full = False
  for name, path, size, _ in sorted(files, key=order):
    full = full or total + size > max_bytes
    if full:
      not_sampled += 1
      continue
    text, replaced = corpus.decode_utf8(Path(path).read_bytes())
    if not text.strip() or '\0' in text or len(text) > _LONGEST_MEAN_LINE * (
        text.count('\n') + 1):
      unsuitable += 1
      continue
    total += size
    share = _share(name, 'split')
    split = 'valid' if share < held_out else 'test' if share < 2 * held_out else 'train'
    document = Document(id=name, text=text, title=name, source=name.split('/')[0], place=name)
    documents[split].append((document, replaced))
  for rows in documents.values():
    rows.sort(key=lambda row: row[0].id)
  held = [d for split in SPLITS[1:] for d, _ in documents[split]]
  train = [d for d, _ in documents['train']]
  sets = shingles([d.text for d in train + held])
  copy_of = near_duplicates(sets[:len(train)], sets[len(train):], similarity)
  dropped = [(d, held[j]) for d, j in zip(train, copy_of) if j >= 0]
  documents['train'] = [row for row, j in zip(documents['train'], copy_of) if j < 0]
  return _Chosen(documents, unsuitable, not_sampled,
                 tuple((d.id, h.id) for d, h in dropped),
                 sum(len(d.text.encode()) for d, _ in dropped))
