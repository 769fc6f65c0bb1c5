"""seqio tasks and mixtures over folders of retrieval examples, registered on request.

The source joins the two sets of records; the one preprocessor derives targets and keeps
the k neighbours that training wants. Importing this module registers nothing. Order and
batching are in batches.py.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from retro_jax.data.records import EXAMPLES, NEIGHBORS, ArraySpec, Examples
from retro_jax.errors import UserError, nearest

# dtype and rank of what `Examples.read` yields, as seqio and TensorFlow shall see it.
_TYPES = {
    'tokens': tf.int32, 'next_token': tf.int32, 'documents': tf.int32, 'text_bytes': tf.int32,
    'scored': tf.int32, 'chunk_ids': tf.int64, 'neighbor_ids': tf.int64,
    'neighbor_distances': tf.float32, 'neighbor_tokens': tf.int32}
_RAW_TYPES = {'|u1': tf.uint8, '<u2': tf.uint16, '<u4': tf.uint32, '<i4': tf.int32,
              '<i8': tf.int64, '<f4': tf.float32}


class RetrievalExamplesSource(seqio.DataSource):
  """Joined records of one folder a split, in file order or by example number."""

  def __init__(self, folders: Mapping[str, str | os.PathLike]):
    """Opens the folder of each split.

    Raises:
      UserError: a folder is missing or damaged, or two splits disagree in shape or vocabulary.
    """
    self.examples = {split: Examples(folder) for split, folder in folders.items()}
    first = next(iter(self.examples.values()))
    for other in self.examples.values():
      for what in ('sequence_length', 'chunk_length', 'vocabulary'):
        if first.manifest[what] != other.manifest[what]:
          raise UserError(f'{first.folder} has {what} {first.manifest[what]} but {other.folder} '
                          f'has {other.manifest[what]}; build both with the same {what}')
    super().__init__(splits=tuple(folders), num_input_examples={
        split: len(examples) for split, examples in self.examples.items()})

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  def list_shards(self, split: str) -> Sequence[str]:
    return [str(path) for path in self.examples[split].paths(EXAMPLES)]

  def get_dataset(
      self,
      split: str = 'train',
      shuffle: bool = True,
      seed: int | None = None,
      shard_info: seqio.ShardInfo | None = None,
      **unused,
  ) -> tf.data.Dataset:
    """Ordinary seqio reading, file by file; the trainer uses `by_number` instead."""
    examples = self.examples[split]
    pairs = list(zip(*([str(p) for p in examples.paths(name)] for name in (EXAMPLES, NEIGHBORS))))
    if shard_info:
      pairs = pairs[shard_info.index::shard_info.num_shards]
    files = tf.data.Dataset.from_tensor_slices(np.array(pairs).reshape(-1, 2))
    if shuffle:
      files = files.shuffle(max(1, len(pairs)), seed=seed)
    specs = {name: layout.specs for name, layout in examples.layouts.items()}

    def parse(record: tf.Tensor, wanted: Mapping[str, ArraySpec]) -> dict[str, tf.Tensor]:
      raw = tf.io.parse_single_example(
          record, {name: tf.io.FixedLenFeature((), tf.string) for name in wanted})
      return {name: tf.reshape(tf.io.decode_raw(raw[name], _RAW_TYPES[spec.dtype]), spec.shape)
              for name, spec in wanted.items()}

    def join(example: tf.Tensor, neighbors: tf.Tensor) -> dict[str, tf.Tensor]:
      joined = parse(example, specs[EXAMPLES])
      joined |= {f'neighbor_{k}': v for k, v in parse(neighbors, specs[NEIGHBORS]).items()}
      return {name: tf.cast(value, _TYPES[name]) for name, value in joined.items()}

    def read(pair: tf.Tensor) -> tf.data.Dataset:
      return tf.data.Dataset.zip(tf.data.TFRecordDataset(pair[0]), tf.data.TFRecordDataset(pair[1]))

    return files.flat_map(read).map(join, num_parallel_calls=tf.data.AUTOTUNE)

  def by_number(self, split: str, indices: tf.data.Dataset) -> tf.data.Dataset:
    """Examples by number, one by one.

    Args:
      split: of this source.
      indices: int64 vectors; each is read in one go. -1 asks for an empty example.

    Returns:
      the elements of `get_dataset` for every entry of every vector, in order.
    """
    examples = self.examples[split]
    shapes = {}
    for name, layout in examples.layouts.items():
      prefix = 'neighbor_' if name == NEIGHBORS else ''
      shapes |= {prefix + feature: spec.shape for feature, spec in layout.specs.items()}
    names = sorted(shapes)

    def read(numbers: np.ndarray) -> list[np.ndarray]:
      values = examples.read(numbers)
      return [values[name].astype(_TYPES[name].as_numpy_dtype) for name in names]

    def fetch(numbers: tf.Tensor) -> dict[str, tf.Tensor]:
      values = tf.numpy_function(read, [numbers], [_TYPES[name] for name in names])
      return {name: tf.ensure_shape(value, (None,) + shapes[name])
              for name, value in zip(names, values)}

    return indices.map(fetch, num_parallel_calls=2, deterministic=True).unbatch()


@dataclasses.dataclass(frozen=True)
class AddTargets:
  """Preprocessor: next-token targets, and the nearest `num_neighbors` neighbours only."""

  num_neighbors: int

  def __call__(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(self._convert, num_parallel_calls=tf.data.AUTOTUNE)

  def _convert(self, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    # Chunks hold one document each, so a successor in another chunk counts when the two
    # chunks are of one document. Padding ends a document's last chunk and is followed by more
    # or by another document, so its target is 0 too. The token after the sequence is stored,
    # as 0 unless the document goes on.
    features = dict(features)
    tokens, documents = features['tokens'], features['documents']
    of_token = tf.repeat(documents, tokens.shape[0] // documents.shape[0])
    following = tf.concat([tokens[1:], features.pop('next_token')], 0)
    same = tf.concat([of_token[1:] == of_token[:-1], [True]], 0)
    if 'scored' in features:
      same &= features.pop('scored') != 0
    features['targets'] = tf.where(same, following, 0)
    del features['neighbor_distances']
    for name in ('neighbor_ids', 'neighbor_tokens'):
      features[name] = features[name][:, :self.num_neighbors]
    return features


def register_task(
    name: str,
    folder: str | os.PathLike | Mapping[str, str | os.PathLike],
    num_neighbors: int,
) -> seqio.Task:
  """Registers a seqio task over a folder of records (or one folder a split).

  Registering the same again replaces it.

  Args:
    name: of the task.
    folder: a folder, which becomes split 'train', or a mapping from split to folder.
    num_neighbors: k; at most what the records hold.

  Raises:
    UserError: a folder is missing or damaged, or holds fewer neighbours.
  """
  folders = dict(folder) if isinstance(folder, Mapping) else {'train': folder}
  source = RetrievalExamplesSource(folders)
  for examples in source.examples.values():
    if not 1 <= num_neighbors <= examples.shape.num_neighbors:
      raise UserError(
          f'{examples.folder}: holds {examples.shape.num_neighbors} neighbours a chunk, '
          f'{num_neighbors} asked for; retrieve more or lower num_neighbors')
  size = next(iter(source.examples.values())).manifest['vocabulary']['size']
  vocabulary = seqio.PassThroughVocabulary(size=size)
  numbers = seqio.PassThroughVocabulary(size=0)

  def feature(which: seqio.Vocabulary, rank: int, dtype: tf.DType = tf.int32) -> seqio.Feature:
    return seqio.Feature(which, add_eos=False, rank=rank, dtype=dtype)

  if name in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(name)
  return seqio.TaskRegistry.add(
      name,
      source=source,
      preprocessors=[AddTargets(num_neighbors)],
      output_features={
          'tokens': feature(vocabulary, 1),
          'targets': feature(vocabulary, 1),
          'chunk_ids': feature(numbers, 1, tf.int64),
          'documents': feature(numbers, 1),
          'text_bytes': feature(numbers, 1),
          'neighbor_ids': feature(numbers, 2, tf.int64),
          'neighbor_tokens': feature(vocabulary, 3),
      })


def register_mixture(name: str, rates: Mapping[str, float]) -> seqio.Mixture:
  """Registers a mixture of registered tasks; `rates` need not add up to 1.

  Raises:
    UserError: an unknown task, a rate that is not positive, or tasks whose records differ in
      sequence length, chunk length or vocabulary.
  """
  if not rates or min(rates.values()) <= 0:
    raise UserError(f'mixture {name!r}: rates are {dict(rates)}, expected one above 0 a task')
  tasks = [get(task) for task in rates]
  first = next(iter(tasks[0].source.examples.values()))
  for task in tasks[1:]:
    other = next(iter(task.source.examples.values()))
    for what in ('sequence_length', 'chunk_length', 'vocabulary'):
      if first.manifest[what] != other.manifest[what]:
        raise UserError(f'{first.folder} has {what} {first.manifest[what]} but {other.folder} has '
                        f'{other.manifest[what]}; a mixture needs the same {what}')
    if task.preprocessors != tasks[0].preprocessors:
      raise UserError(f'mixture {name!r}: {tasks[0].name} and {task.name} keep different numbers '
                      'of neighbours; register both with the same num_neighbors')
  if name in seqio.MixtureRegistry.names():
    seqio.MixtureRegistry.remove(name)
  return seqio.MixtureRegistry.add(name, [(task, float(rate)) for task, rate in rates.items()])


def get(name: str) -> seqio.Task | seqio.Mixture:
  """The registered task or mixture of this name.

  Raises:
    UserError: there is none; names the nearest.
  """
  for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
    if name in registry.names():
      return registry.get(name)
  known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
  raise UserError(f'no task or mixture {name!r}{nearest(name, known)}; register it first')


def parts(name: str, split: str) -> tuple[list[seqio.Task], list[float]]:
  """The tasks behind a name, itself or those of a mixture, and their rates.

  Raises:
    UserError: no such task, or one has no such split.
  """
  provider = get(name)
  if isinstance(provider, seqio.Mixture):
    tasks = list(provider.tasks)
    rates = [provider.get_rate(task) for task in tasks]
  else:
    tasks, rates = [provider], [1.0]
  for task in tasks:
    if split not in task.source.examples:
      raise UserError(f'task {task.name!r} has no split {split!r}, only '
                      f'{list(task.source.examples)}; register a folder for it')
  return tasks, rates


@dataclasses.dataclass(frozen=True)
class TaskInfo:
  """What a task or mixture feeds to a model."""

  sequence_length: int
  chunk_length: int
  retrieved_length: int
  num_neighbors: int
  vocabulary_size: int
  vocabulary_fingerprint: str
  num_examples: Mapping[str, int]


def info(name: str) -> TaskInfo:
  """The sizes behind a registered task or mixture.

  Raises:
    UserError: no such task.
  """
  provider = get(name)
  tasks = provider.tasks if isinstance(provider, seqio.Mixture) else [provider]
  num_examples: dict[str, int] = {}
  for task in tasks:
    for split, examples in task.source.examples.items():
      num_examples[split] = num_examples.get(split, 0) + len(examples)
  first = next(iter(tasks[0].source.examples.values()))
  return TaskInfo(
      sequence_length=first.shape.sequence_length,
      chunk_length=first.shape.chunk_length,
      retrieved_length=first.shape.retrieved_length,
      num_neighbors=tasks[0].preprocessors[-1].num_neighbors,
      vocabulary_size=first.manifest['vocabulary']['size'],
      vocabulary_fingerprint=first.manifest['vocabulary']['fingerprint'],
      num_examples=num_examples)
