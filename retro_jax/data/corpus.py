"""Where documents come from: what a source is, and the sources that are text and JSON files.

Datasets of TFDS and seqio are in dataset_corpus.py, the Python library that the quickstart
reads is in python_corpus.py; cutting documents into chunks is in chunking.py. A source is
a frozen dataclass made of shards, each of which one worker reads: ids and order do not
depend on how it is split. docs/corpus.md says what becomes of malformed input.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from retro_jax import files
from retro_jax.data import json_records
from retro_jax.data.input_files import BadContent, InputFile, find_files
from retro_jax.data.vocabulary import clean_text
from retro_jax.errors import UserError
from retro_jax.storage import fingerprint

# Text files that make one shard.
_SHARD_FILES = 1024
_SHARD_BYTES = 64 << 20
# One file in so many ends a shard early, chosen by its name: a file that is added or removed
# then moves the borders of its own shard only.
_FILES_TO_BORDER = 256
PLACES_KEPT = 5


@dataclasses.dataclass(frozen=True)
class Document:
  """One text, with an id that is unique in its corpus.

  Attributes:
    id, text: the id and the text; both can be written as UTF-8.
    title: for a person; may be empty.
    source: what kind of text, or where from.
    metadata: whatever else is kept, as JSON has it.
    place: where it stands in the corpus ('file.jsonl:17'), for messages.
  """

  id: str
  text: str
  title: str = ''
  source: str = ''
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  place: str = ''


@dataclasses.dataclass
class Report:
  """What one pass found; `bytes` counts UTF-8 bytes of text."""

  documents: int = 0
  bytes: int = 0
  empty: int = 0
  replaced: int = 0  # documents in which invalid UTF-8 was replaced by U+FFFD
  skipped: int = 0  # bad lines or files that were left out because the settings say so
  skipped_places: list[str] = dataclasses.field(default_factory=list)  # of the first few, why

  def count(self, text: str, replaced: bool = False) -> None:
    """Takes note of one document."""
    size = len(text) if text.isascii() else len(text.encode())
    self.documents += 1
    self.bytes += size
    self.empty += not size
    self.replaced += replaced

  def skip(self, why: str) -> None:
    """Takes note of something left out; `why` begins with its place."""
    self.skipped += 1
    if len(self.skipped_places) < PLACES_KEPT:
      self.skipped_places.append(why)

  def add(self, other: 'Report') -> None:
    """Takes over what another pass found."""
    for field in dataclasses.fields(Report):
      setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
    del self.skipped_places[PLACES_KEPT:]

  def __str__(self) -> str:
    text = (f'{self.documents:,} documents, {self.bytes:,} bytes, {self.empty:,} empty, '
            f'{self.replaced:,} with invalid UTF-8 replaced')
    if self.skipped:
      text += f', {self.skipped:,} bad ones skipped'
    if self.skipped_places:
      more = ' ...' if self.skipped > len(self.skipped_places) else ''
      text += f' ({"; ".join(self.skipped_places)}{more})'
    return text


def report_field() -> Any:
  """A dataclass field that is no setting: what the latest pass found."""
  return dataclasses.field(default_factory=Report, init=False, compare=False, repr=False)


class SourceShard(Protocol):
  """A part of a source that one worker reads; a frozen dataclass that can be pickled."""

  report: Report

  @property
  def name(self) -> str:
    """For a person; no two shards of a source have the same."""

  @property
  def weight(self) -> int:
    """How much there is to read, about its bytes."""

  def documents(self) -> Iterator[Document]:
    """Its documents in a fixed order; none at all is no error here.

    Raises:
      UserError: something cannot be read, or is bad and not to be skipped.
    """

  def describe(self) -> dict[str, Any]:
    """JSON-able; equal only while the settings and this shard's input are the same."""


class Source(Protocol):
  """What every source of documents offers."""

  report: Report

  def shards(self) -> Sequence[SourceShard]:
    """Its parts in order, as they are now."""

  def documents(self) -> Iterator[Document]:
    """The documents of all shards; raises UserError when there is no text at all."""

  def describe(self) -> dict[str, Any]:
    """JSON-able; equal only while settings and inputs are the same."""


@dataclasses.dataclass(frozen=True)
class TextFiles:
  """One document a file, plain or gzip; its id is the path below the pattern's fixed folder.

  Attributes:
    pattern: which files, see `files.glob`.
    skip_bad_files: leave out and count files that are damaged gzip or not UTF-8, instead of
      stopping at the first. (Single bytes that are no UTF-8 are always replaced.)
  """

  pattern: str
  skip_bad_files: bool = False
  report: Report = report_field()

  def shards(self) -> list['TextFilesShard']:
    """Files in order of path, up to 64 MiB or 1,024 of them together."""
    groups, size, closed = [], 0, True
    for file in find_files(self.pattern):
      if closed or size + file.bytes > _SHARD_BYTES or len(groups[-1]) == _SHARD_FILES:
        groups.append([])
        size = 0
      groups[-1].append(file)
      size += file.bytes
      closed = _is_border(file.name)
    return [TextFilesShard(tuple(group), self.skip_bad_files) for group in groups]

  def documents(self) -> Iterator[Document]:
    """Files in order of path.

    Raises:
      UserError: the pattern names no file, a file cannot be read, or no file has text.
    """
    return chain(self.shards(), self.report, self.pattern)

  def describe(self) -> dict[str, Any]:
    return describe_shards('text-files', self.shards())


@dataclasses.dataclass(frozen=True)
class TextFilesShard:
  """Some of the files."""

  files: tuple[InputFile, ...]
  skip_bad_files: bool
  report: Report = report_field()

  @property
  def name(self) -> str:
    return self.files[0].name

  @property
  def weight(self) -> int:
    return sum(file.bytes for file in self.files)

  def documents(self) -> Iterator[Document]:
    reset(self.report)
    for file in self.files:
      try:
        text, replaced = decode_utf8(file.read())
      except BadContent as error:
        if not self.skip_bad_files:
          raise
        self.report.skip(str(error))
        continue
      self.report.count(text, replaced)
      yield Document(id=file.name, text=text, title=file.name, source='text', place=file.name)

  def describe(self) -> dict[str, Any]:
    return {'kind': 'text-files', 'skip_bad_files': self.skip_bad_files,
            'files': len(self.files), 'file_bytes': self.weight,
            'content': fingerprint([[file.name, file.checksum()] for file in self.files])}


@dataclasses.dataclass(frozen=True)
class JsonLines:
  """One document a line of JSON-lines files, plain or gzip; a shard is a file.

  Attributes:
    pattern: which files, see `files.glob`.
    text_field, id_field, title_field: where these stand in a record. Without an id a record
      gets 'file:line', without a title none.
    metadata_fields: kept where a record has them.
    skip_bad_lines: leave out and count bad lines, and what comes after damage in a gzip file,
      instead of stopping at the first.
  """

  pattern: str
  text_field: str = 'text'
  id_field: str = 'id'
  title_field: str = 'title'
  metadata_fields: Sequence[str] = ()
  skip_bad_lines: bool = False
  report: Report = report_field()

  def shards(self) -> list['JsonLinesShard']:
    """One a file, in order of path."""
    return [JsonLinesShard(file, self.text_field, self.id_field, self.title_field,
                           tuple(self.metadata_fields), self.skip_bad_lines)
            for file in find_files(self.pattern)]

  def documents(self) -> Iterator[Document]:
    """Records in order of path and line; blank lines are passed over.

    Raises:
      UserError: the pattern names no file, a line is bad (file and line number are given), or
        no record has text.
    """
    return chain(self.shards(), self.report, self.pattern)

  def describe(self) -> dict[str, Any]:
    return describe_shards('json-lines', self.shards())


@dataclasses.dataclass(frozen=True)
class FileShard:
  """A shard that is one file; how it is read is for the source to say."""

  file: InputFile
  report: Report = report_field()

  @property
  def name(self) -> str:
    return self.file.name

  @property
  def weight(self) -> int:
    return self.file.bytes


@dataclasses.dataclass(frozen=True)
class JsonLinesShard(FileShard):
  """One file."""

  text_field: str
  id_field: str
  title_field: str
  metadata_fields: tuple[str, ...]
  skip_bad_lines: bool

  def documents(self) -> Iterator[Document]:
    reset(self.report)
    try:
      for number, line in enumerate(self.file.lines(), start=1):
        try:
          document = self._document(line, f'{self.name}:{number}')
        except json_records.BadRecord as error:
          message = f'{files.shown(self.file.path)}:{number}: {error}'
          if not self.skip_bad_lines:
            raise UserError(message) from None
          self.report.skip(message)
          continue
        if document is not None:
          yield document
    except BadContent as error:
      if not self.skip_bad_lines:
        raise
      self.report.skip(str(error))

  def _document(self, line: bytes, place: str) -> Document | None:
    """None for a blank line."""
    if line.isspace():
      return None
    decoded, replaced = decode_utf8(line)
    record = json_records.parse(decoded)
    spelt = json_records.text_of(record, self.text_field)
    # JSON may spell a lone surrogate ('\\ud800'), which is no UTF-8 either.
    text = clean_text(spelt)
    document = Document(
        id=json_records.id_of(record, self.id_field) or place, text=text,
        title=json_records.title_of(record, self.title_field), source='jsonl',
        metadata=json_records.metadata_of(record, self.metadata_fields), place=place)
    self.report.count(text, replaced or text != spelt)
    return document

  def describe(self) -> dict[str, Any]:
    return {'kind': 'json-lines', 'text_field': self.text_field, 'id_field': self.id_field,
            'title_field': self.title_field, 'metadata_fields': list(self.metadata_fields),
            'skip_bad_lines': self.skip_bad_lines, 'file': self.name,
            'file_bytes': self.file.bytes, 'content': self.file.checksum()}


def chain(shards: Sequence[SourceShard], report: Report, name: str) -> Iterator[Document]:
  """The documents of `shards`, with `report` of all of them.

  Raises:
    UserError: no text at all in what `name` stands for.
  """
  reset(report)
  for shard in shards:
    yield from shard.documents()
    report.add(shard.report)
  require_text(report, name)


def describe_shards(kind: str, shards: Sequence[SourceShard]) -> dict[str, Any]:
  """The description of a source that its shards describe."""
  return {'kind': kind, 'shards': len(shards),
          'content': fingerprint([[shard.name, shard.describe()] for shard in shards])}


def decode_utf8(data: bytes) -> tuple[str, bool]:
  """Text of `data`, invalid UTF-8 replaced by U+FFFD, and whether any was."""
  try:
    return data.decode(), False
  except UnicodeDecodeError:
    return data.decode('utf-8', 'replace'), True


def reset(report: Report) -> None:
  """Makes `report` that of a new pass."""
  vars(report).update(vars(type(report)()))


def require_text(report: Report, name: str) -> None:
  """Raises UserError when a whole pass found no text."""
  if not report.bytes:
    raise UserError(f'{files.shown(name)}: no text in it ({report.documents} documents, all '
                    f'empty; {report.skipped} skipped); name another corpus')


def _is_border(name: str) -> bool:
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'big') % _FILES_TO_BORDER == 0
