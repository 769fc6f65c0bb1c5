"""Documents of datasets: TFDS and seqio. Text and JSON files are corpus.py's."""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

from retro_jax import files
from retro_jax.data.corpus import (
  Document,
  Report,
  chain,
  decode_utf8,
  describe_shards,
  report_field,
  require_text,
  reset,
)
from retro_jax.data.input_files import InputFile
from retro_jax.errors import UserError, nearest
from retro_jax.storage import fingerprint


@dataclasses.dataclass(frozen=True)
class TfdsDocuments:
  """One document an example of a TFDS dataset that has already been prepared on disk.

  Attributes:
    name: of the dataset, with configuration and version where it needs them.
    split: one of its splits, or a part of them as TFDS spells it ('train[:1%]').
    text_field, id_field, title_field: features. Without `id_field` an example gets the id
      'name/split/position'.
    data_dir: where it was prepared; None for where TFDS prepares by itself.
  """

  name: str
  split: str = 'train'
  text_field: str = 'text'
  id_field: str = ''
  title_field: str = ''
  data_dir: str | None = None
  report: Report = report_field()

  def shards(self) -> list['TfdsShard']:
    """One a file of the split, or one alone for a part of a split.

    Raises:
      UserError: no such dataset, split or field; nothing is downloaded.
    """
    builder = self.builder()
    splits = builder.info.splits
    listed = tuple(_input_file(str(path)) for path in splits[self.split].filepaths)
    if self.split not in list(splits):
      return [TfdsShard(self, self.split, 0, listed)]
    starts = itertools.accumulate(splits[self.split].shard_lengths, initial=0)
    return [TfdsShard(self, f'{self.split}[{i}shard:{i + 1}shard]', start, (file,))
            for i, (file, start) in enumerate(zip(listed, starts))]

  def documents(self) -> Iterator[Document]:
    """Examples in the order they lie on disk.

    Raises:
      UserError: no such dataset, split or field; nothing is downloaded.
    """
    return chain(self.shards(), self.report, f'{self.name}/{self.split}')

  def describe(self) -> dict[str, Any]:
    return describe_shards('tfds', self.shards())

  def builder(self) -> Any:
    """The `tfds.core.DatasetBuilder`, which has the split and the fields."""
    import tensorflow_datasets as tfds
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
    for field in _fields(self):
      if field not in builder.info.features:
        raise UserError(f'{self.name}: no field {field!r} in this TFDS dataset'
                        f'{nearest(field, builder.info.features)}; it has '
                        f'{", ".join(sorted(builder.info.features))}')
    return builder


@dataclasses.dataclass(frozen=True)
class TfdsShard:
  """Some examples of a split.

  Attributes:
    source: the settings.
    part: which examples, as TFDS spells it.
    first: position of the first of them in the split.
    files: where they lie.
  """

  source: TfdsDocuments
  part: str
  first: int
  files: tuple[InputFile, ...]
  report: Report = report_field()

  @property
  def name(self) -> str:
    return f'{self.source.name}/{self.part}'

  @property
  def weight(self) -> int:
    return sum(file.bytes for file in self.files)

  def documents(self) -> Iterator[Document]:
    import tensorflow_datasets as tfds
    for file in self.files:
      file.refuse_if_changed()
    builder = self.source.builder()
    dataset = builder.as_dataset(
        split=self.part, shuffle_files=False,
        decoders=tfds.decode.PartialDecoding({field: True for field in _fields(self.source)}),
        read_config=tfds.ReadConfig(interleave_cycle_length=1))
    prefix = f'{builder.info.full_name}/{self.source.split}'
    yield from _from_examples(dataset, self.source, self.report, prefix, 'tfds', self.first)

  def describe(self) -> dict[str, Any]:
    source = self.source
    return {'kind': 'tfds', 'name': source.builder().info.full_name, 'split': source.split,
            'part': self.part, 'first': self.first, 'text_field': source.text_field,
            'id_field': source.id_field, 'title_field': source.title_field,
            'content': _content(self.files)}


@dataclasses.dataclass(frozen=True)
class SeqioDocuments:
  """One document an example of a registered seqio task, after its preprocessors; one shard.

  A task that tokenises still has its text, in 'targets_pretokenized' for instance.
  """

  task: str
  split: str = 'train'
  text_field: str = 'text'
  id_field: str = ''
  title_field: str = ''
  report: Report = report_field()

  def shards(self) -> list['SeqioDocuments']:
    """Itself: preprocessors may move examples across files."""
    return [self]

  @property
  def name(self) -> str:
    """Of the one shard."""
    return f'{self.task}/{self.split}'

  @property
  def weight(self) -> int:
    """Bytes of the files that the source lists; 1 when it lists none."""
    return sum(file.bytes for file in self._files()) or 1

  def documents(self) -> Iterator[Document]:
    """Examples in the task's unshuffled order; id 'task/split/position' unless `id_field`.

    Raises:
      UserError: no such task, split or text field, or no text.
    """
    dataset = self._task().get_dataset(
        sequence_length=None, split=self.split, shuffle=False, use_cached=False)
    for field in _fields(self):
      if field not in dataset.element_spec:
        raise UserError(f'{self.task}: no field {field!r} in this seqio task'
                        f'{nearest(field, dataset.element_spec)}; it has '
                        f'{", ".join(sorted(dataset.element_spec))}')
    yield from _from_examples(dataset, self, self.report, self.name, 'seqio', 0)
    require_text(self.report, self.name)

  def describe(self) -> dict[str, Any]:
    """Described by the files its source lists, or, where it lists none, by all its text."""
    described = {'kind': 'seqio', 'task': self.task, 'split': self.split,
                 'text_field': self.text_field, 'id_field': self.id_field,
                 'title_field': self.title_field}
    if listed := self._files():
      return {**described, 'content': _content(listed)}
    digest = hashlib.sha256()
    kept = dataclasses.replace(self)  # leaves this source's report alone
    for document in kept.documents():
      digest.update(json.dumps([document.id, document.title, document.text]).encode())
    return {**described, 'content': digest.hexdigest()[:16]}

  def _files(self) -> tuple[InputFile, ...]:
    paths = [str(path) for path in self._task().source.list_shards(self.split)]
    if not all(files.exists(path) for path in paths):  # names of something else than files
      return ()
    return tuple(_input_file(path) for path in paths)

  def _task(self) -> Any:
    import seqio
    names = list(seqio.TaskRegistry.names())
    if self.task not in names:
      raise UserError(f'{self.task}: no such seqio task{nearest(self.task, names)}; '
                      'import the module that registers it')
    task = seqio.TaskRegistry.get(self.task)
    if self.split not in task.splits:
      raise UserError(f'{self.task}: no split {self.split!r}; it has {", ".join(task.splits)}')
    return task


def _fields(source: TfdsDocuments | SeqioDocuments) -> list[str]:
  return [f for f in (source.text_field, source.id_field, source.title_field) if f]


def _input_file(path: str) -> InputFile:
  return InputFile(path, os.path.basename(path), *files.size_and_time(path))


def _content(listed: tuple[InputFile, ...]) -> str:
  return fingerprint([[file.name, file.checksum()] for file in listed])


def _from_examples(
    dataset: Any, source: TfdsDocuments | SeqioDocuments, report: Report, prefix: str,
    kind: str, first: int) -> Iterator[Document]:
  """Documents of a tf.data dataset of feature dictionaries, the first at position `first`."""
  reset(report)
  for position, example in enumerate(dataset.as_numpy_iterator(), start=first):
    place = f'{prefix}/{position}'
    value = example[source.text_field]
    if not isinstance(value, bytes):
      raise UserError(f'{prefix}: field {source.text_field!r} holds no text; set text_field')
    text, replaced = decode_utf8(value)
    report.count(text, replaced)
    field = lambda name: decode_utf8(v)[0] if isinstance(v := example[name], bytes) else str(v)
    yield Document(
        id=field(source.id_field) if source.id_field else place, text=text,
        title=field(source.title_field) if source.title_field else '', source=kind, place=place)
