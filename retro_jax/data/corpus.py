"""Where documents come from: text files, JSON lines, a TFDS dataset, a seqio task.

The Python library that the quickstart reads is in python_corpus.py; cutting documents into
chunks is in chunking.py. Each source is a frozen dataclass with `documents()`, an iterator
that can be started again, `describe()`, which changes when any input changes, and `report`,
what the latest pass over the documents found.
"""

import dataclasses
import glob
import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from retro_jax.data.vocabulary import clean_text
from retro_jax.errors import UserError, nearest
from retro_jax.storage import file_checksum, fingerprint

# Files up to this size are described by their content, larger ones by size and time.
_CHECKSUM_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Document:
  """One text, with an id that is unique in its corpus."""

  id: str
  text: str
  title: str = ''
  source: str = ''
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Report:
  """What one pass over a source found; `bytes` counts UTF-8 bytes of text."""

  documents: int = 0
  bytes: int = 0
  empty: int = 0
  replaced: int = 0  # documents in which invalid UTF-8 was replaced by U+FFFD

  def count(self, text: str, replaced: bool = False) -> None:
    size = len(text.encode())
    self.documents += 1
    self.bytes += size
    self.empty += not size
    self.replaced += replaced

  def __str__(self) -> str:
    return (f'{self.documents:,} documents, {self.bytes:,} bytes, {self.empty:,} empty, '
            f'{self.replaced:,} with invalid UTF-8 replaced')


class Source(Protocol):
  """What every source of documents offers."""

  report: Report

  def documents(self) -> Iterator[Document]:
    """All documents, in a fixed order; raises UserError when there is no text at all."""

  def describe(self) -> dict[str, Any]:
    """JSON-able; equal only while settings and inputs are the same."""


def _report_field() -> Any:
  return dataclasses.field(default_factory=Report, init=False, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class TextFiles:
  """One document a file; its id is the path below the pattern's fixed folder."""

  pattern: str
  report: Report = _report_field()

  def documents(self) -> Iterator[Document]:
    """Files in order of path.

    Raises:
      UserError: the pattern names no file, a file cannot be read, or no file has text.
    """
    paths = matching_files(self.pattern)
    base = _fixed_folder(self.pattern)
    reset(self.report)
    for path in paths:
      text, replaced = decode_utf8(_read(path))
      self.report.count(text, replaced)
      name = os.path.relpath(path, base)
      yield Document(id=name, text=text, title=name, source='text')
    require_text(self.report, self.pattern)

  def describe(self) -> dict[str, Any]:
    return {'kind': 'text-files', 'pattern': self.pattern,
            **describe_files(matching_files(self.pattern))}


@dataclasses.dataclass(frozen=True)
class JsonLines:
  """One document a line of `.jsonl` or `.jsonl.gz` files.

  A record without `id_field` gets the id 'file:line'; without `title_field`, no title. The
  fields named in `metadata_fields` are kept where a record has them.
  """

  pattern: str
  text_field: str = 'text'
  id_field: str = 'id'
  title_field: str = 'title'
  metadata_fields: Sequence[str] = ()
  report: Report = _report_field()

  def documents(self) -> Iterator[Document]:
    """Records in order of path and line; blank lines are skipped.

    Raises:
      UserError: the pattern names no file, a line is no JSON object or has no text (file and
        line number are given), or no record has text.
    """
    paths = matching_files(self.pattern)
    base = _fixed_folder(self.pattern)
    reset(self.report)
    for path in paths:
      name = os.path.relpath(path, base)
      for number, line in enumerate(_lines(path), start=1):
        decoded, replaced = decode_utf8(line)
        if decoded.strip():
          document = self._parse(decoded, f'{path}:{number}', f'{name}:{number}')
          # JSON may spell a lone surrogate ('\\ud800'), which is no UTF-8 either.
          text = clean_text(document.text)
          self.report.count(text, replaced or text != document.text)
          yield dataclasses.replace(document, text=text)
    require_text(self.report, self.pattern)

  def _parse(self, line: str, place: str, default_id: str) -> Document:
    try:
      record = json.loads(line)
    except ValueError as error:
      raise UserError(f'{place}: not valid JSON ({error}); correct or remove the line') from None
    if not isinstance(record, dict):
      raise UserError(f'{place}: expected a JSON object, found {type(record).__name__}; '
                      'correct or remove the line')
    text = record.get(self.text_field)
    if not isinstance(text, str):
      found = 'no such field' if text is None else type(text).__name__
      raise UserError(f'{place}: expected text in field {self.text_field!r}, found {found}'
                      f'{nearest(self.text_field, record)}; set text_field')
    title = record.get(self.title_field)
    identity = record.get(self.id_field)
    return Document(
        id=default_id if identity is None else str(identity), text=text,
        title='' if title is None else str(title), source='jsonl',
        metadata={k: record[k] for k in self.metadata_fields if k in record})

  def describe(self) -> dict[str, Any]:
    return {'kind': 'json-lines', 'pattern': self.pattern, 'text_field': self.text_field,
            'id_field': self.id_field, 'title_field': self.title_field,
            'metadata_fields': list(self.metadata_fields),
            **describe_files(matching_files(self.pattern))}


@dataclasses.dataclass(frozen=True)
class TfdsDocuments:
  """One document an example of a TFDS dataset that has already been prepared on disk."""

  name: str
  split: str = 'train'
  text_field: str = 'text'
  id_field: str = ''
  title_field: str = ''
  data_dir: str | None = None
  report: Report = _report_field()

  def documents(self) -> Iterator[Document]:
    """Examples in the order they lie on disk; id 'name/split/position' unless `id_field`.

    Raises:
      UserError: no such dataset, split or field; nothing is downloaded.
    """
    import tensorflow_datasets as tfds  # pylint: disable=import-outside-toplevel
    builder = self._builder()
    wanted = [f for f in (self.text_field, self.id_field, self.title_field) if f]
    for field in wanted:
      if field not in builder.info.features:
        raise UserError(f'{self.name}: no field {field!r} in this TFDS dataset'
                        f'{nearest(field, builder.info.features)}; it has '
                        f'{", ".join(sorted(builder.info.features))}')
    dataset = builder.as_dataset(
        split=self.split, shuffle_files=False,
        decoders=tfds.decode.PartialDecoding({field: True for field in wanted}),
        read_config=tfds.ReadConfig(interleave_cycle_length=1))
    prefix = f'{builder.info.full_name}/{self.split}'
    yield from _from_examples(dataset, self, prefix, 'tfds')

  def describe(self) -> dict[str, Any]:
    builder = self._builder()
    paths = builder.info.splits[self.split].filepaths
    return {'kind': 'tfds', 'name': builder.info.full_name, 'split': self.split,
            'text_field': self.text_field, 'id_field': self.id_field,
            'title_field': self.title_field, **describe_files([str(p) for p in paths])}

  def _builder(self) -> Any:
    import tensorflow_datasets as tfds  # pylint: disable=import-outside-toplevel
    try:
      builder = tfds.builder(self.name, data_dir=self.data_dir)
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
      reason = str(error).strip().splitlines() or ['?']
      raise UserError(f'{self.name}: no such TFDS dataset ({reason[0]}); check name and '
                      'data_dir') from None
    if not builder.info.splits:
      raise UserError(f'{self.name}: not prepared under {builder.data_dir}; '
                      f'run `tfds build {self.name}` first')
    try:
      builder.info.splits[self.split]
    except (KeyError, ValueError):
      raise UserError(f'{self.name}: no split {self.split!r}'
                      f'{nearest(self.split, builder.info.splits)}; it has '
                      f'{", ".join(builder.info.splits)}') from None
    return builder


@dataclasses.dataclass(frozen=True)
class SeqioDocuments:
  """One document an example of a registered seqio task, after its preprocessors.

  A task that tokenises still has its text, in 'targets_pretokenized' for instance.
  """

  task: str
  split: str = 'train'
  text_field: str = 'text'
  id_field: str = ''
  title_field: str = ''
  report: Report = _report_field()

  def documents(self) -> Iterator[Document]:
    """Examples in the task's unshuffled order; id 'task/split/position' unless `id_field`.

    Raises:
      UserError: no such task, split or text field.
    """
    task = self._task()
    dataset = task.get_dataset(
        sequence_length=None, split=self.split, shuffle=False, use_cached=False)
    for field in (self.text_field, self.id_field, self.title_field):
      if field and field not in dataset.element_spec:
        raise UserError(f'{self.task}: no field {field!r} in this seqio task'
                        f'{nearest(field, dataset.element_spec)}; it has '
                        f'{", ".join(sorted(dataset.element_spec))}')
    yield from _from_examples(dataset, self, f'{self.task}/{self.split}', 'seqio')

  def describe(self) -> dict[str, Any]:
    """Described by the files its source lists, or, where it lists none, by all its text."""
    described = {'kind': 'seqio', 'task': self.task, 'split': self.split,
                 'text_field': self.text_field, 'id_field': self.id_field,
                 'title_field': self.title_field}
    shards = [str(s) for s in self._task().source.list_shards(self.split)]
    if shards and all(os.path.isfile(s) for s in shards):
      return {**described, **describe_files(shards)}
    digest = hashlib.sha256()
    kept = dataclasses.replace(self)  # leaves this source's report alone
    for document in kept.documents():
      digest.update(json.dumps([document.id, document.title, document.text]).encode())
    return {**described, 'content': digest.hexdigest()[:16]}

  def _task(self) -> Any:
    import seqio  # pylint: disable=import-outside-toplevel
    names = list(seqio.TaskRegistry.names())
    if self.task not in names:
      raise UserError(f'{self.task}: no such seqio task{nearest(self.task, names)}; '
                      'import the module that registers it')
    task = seqio.TaskRegistry.get(self.task)
    if self.split not in task.splits:
      raise UserError(f'{self.task}: no split {self.split!r}; it has {", ".join(task.splits)}')
    return task


def matching_files(pattern: str) -> list[str]:
  """The files `pattern` names ('**' for any depth), sorted.

  Raises:
    UserError: there are none.
  """
  paths = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
  if not paths:
    raise UserError(f'{pattern}: no file of that name or pattern; check the path')
  return paths


def describe_files(paths: Iterable[str]) -> dict[str, Any]:
  """Number, size and a fingerprint of files: of content, or size and time of large ones."""
  facts, total = [], 0
  for path in paths:
    try:
      status = os.stat(path)
      total += status.st_size
      large = status.st_size > _CHECKSUM_BYTES
      facts.append([path, status.st_size,
                    status.st_mtime_ns if large else file_checksum(path)])
    except OSError as error:
      raise UserError(f'{path}: cannot be read ({error.strerror}); check the corpus') from None
  return {'files': len(facts), 'file_bytes': total, 'content': fingerprint(facts)}


def decode_utf8(data: bytes) -> tuple[str, bool]:
  """Text of `data`, invalid UTF-8 replaced by U+FFFD, and whether any was."""
  try:
    return data.decode(), False
  except UnicodeDecodeError:
    return data.decode('utf-8', 'replace'), True


def reset(report: Report) -> None:
  """Makes `report` that of a new pass."""
  for field in dataclasses.fields(report):
    setattr(report, field.name, field.default)


def require_text(report: Report, name: str) -> None:
  """Raises UserError when a whole pass found no text."""
  if not report.bytes:
    raise UserError(f'{name}: no text in it ({report.documents} documents, all empty); '
                    'name another corpus')


def _from_examples(dataset: Any, source: Any, prefix: str, kind: str) -> Iterator[Document]:
  """Documents of a tf.data dataset of feature dictionaries."""
  reset(source.report)
  for position, example in enumerate(dataset.as_numpy_iterator()):
    value = example[source.text_field]
    if not isinstance(value, bytes):
      raise UserError(f'{prefix}: field {source.text_field!r} holds no text; set text_field')
    text, replaced = decode_utf8(value)
    source.report.count(text, replaced)
    field = lambda name: decode_utf8(v)[0] if isinstance(v := example[name], bytes) else str(v)
    yield Document(
        id=field(source.id_field) if source.id_field else f'{prefix}/{position}', text=text,
        title=field(source.title_field) if source.title_field else '', source=kind)
  require_text(source.report, prefix)


def _fixed_folder(pattern: str) -> str:
  """The part of `pattern` before its first wildcard, as a folder."""
  if not glob.has_magic(pattern):
    return os.path.dirname(pattern) or '.'
  parts = Path(pattern).parts
  first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
  return os.path.join(*parts[:first]) if first else '.'


def _read(path: str) -> bytes:
  try:
    return Path(path).read_bytes()
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}); check the corpus') from None


def _lines(path: str) -> Iterator[bytes]:
  try:
    with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as f:
      yield from f
  except (OSError, EOFError) as error:
    raise UserError(f'{path}: cannot be read ({error}); check the corpus') from None
