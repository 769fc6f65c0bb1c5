"""Batches in an order that is a function of (seed, step), and their place on a mesh.

Which example stands in row i of step s is computed, not replayed: resuming at any step
costs nothing, and neither restarts nor the number of processes change what is seen. The
examples go through the registered seqio task's preprocessors and `RetroFeatureConverter`.
"""

import atexit
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retro_jax.data.permutation import key, permute
from retro_jax.errors import UserError

BATCH_SPEC = PartitionSpec(('data', 'fsdp'))
Batch = dict[str, np.ndarray]
# Mixtures keep their rates exactly within every so many examples.
_MIXTURE_BLOCK = 4096
_SHUFFLE, _MIX = 1, 2


class ExampleOrder:
  """Which example stands at each position of an endless stream, in O(1)."""

  def __init__(
      self, sizes: Sequence[int], rates: Sequence[float] | None = None, seed: int = 0,
      shuffle: bool = True):
    """
    Args:
      sizes: number of examples of each source.
      rates: how often to draw from each (need not add up to 1).
      seed: another seed is another order.
      shuffle: False keeps the examples of one source in order (a mixture is always mixed).

    Raises:
      UserError: a source has no examples, or too many sources for the block of a mixture.
    """
    if not sizes or min(sizes) < 1:
      raise UserError(f'sources of {list(sizes)} examples, expected at least 1 in each')
    if len(sizes) > _MIXTURE_BLOCK // 4:
      raise UserError(f'{len(sizes)} tasks in a mixture, expected at most {_MIXTURE_BLOCK // 4}')
    self._sizes = np.asarray(sizes, np.int64)
    self._seed, self._shuffle = seed, shuffle
    self._quotas = _quotas(np.asarray(rates or [1.0] * len(sizes), float), _MIXTURE_BLOCK)
    self._ends = np.cumsum(self._quotas)

  def __call__(self, positions: Any) -> tuple[np.ndarray, np.ndarray]:
    """Source and example number, int64 [p] each, at `positions` of the stream."""
    positions = np.asarray(positions, np.int64)
    if len(self._sizes) == 1:
      source, place = np.zeros_like(positions), positions
    else:
      # A permuted slot of the block says at once which source it is and which of that source's
      # places in the block, so nothing before it has to be counted.
      block, slot = np.divmod(positions, _MIXTURE_BLOCK)
      slot = permute(slot, _MIXTURE_BLOCK, key(self._seed, _MIX, block))
      source = np.searchsorted(self._ends, slot, 'right')
      place = block * self._quotas[source] + slot - (self._ends - self._quotas)[source]
    epoch, example = np.divmod(place, self._sizes[source])
    if self._shuffle:
      for i, size in enumerate(self._sizes):
        here = source == i
        example[here] = permute(example[here], int(size), key(self._seed, _SHUFFLE, i, epoch[here]))
    return source, example


def _quotas(rates: np.ndarray, total: int) -> np.ndarray:
  """`total` split by `rates`: int64, each at least 1, largest remainders first."""
  shares = rates / rates.sum() * (total - len(rates))
  result = 1 + np.floor(shares).astype(np.int64)
  order = np.argsort(-(shares - np.floor(shares)), kind='stable')
  result[order[:total - result.sum()]] += 1
  return result


def batches(
    name: str,
    batch_size: int,
    *,
    seed: int = 0,
    start_step: int = 0,
    num_steps: int | None = None,
    split: str = 'train',
    shuffle: bool = True,
    rows: slice | None = None,
    prefetch: int = 2,
) -> Iterator[Batch]:
  """Batches of a registered task or mixture from `start_step` on, without end by default.

  Args:
    name: a task or mixture registered by tasks.py.
    batch_size: of all processes together, b.
    seed: of the order.
    start_step: the first step to yield; any step costs the same.
    num_steps: how many to yield, None for no end.
    split: of the task.
    shuffle: False keeps the order of the records.
    rows: rows of each batch to yield, for a process that feeds a part (`rows_of_process`).
    prefetch: batches made ahead.

  Yields:
    the model features of `RetroFeatureConverter`, numpy, with a leading axis of `rows`.

  Raises:
    UserError: no such task or split, no examples, or a damaged record.
  """
  from retro_jax.data import tasks
  providers, rates = tasks.parts(name, split)
  sizes = [len(task.source.examples[split]) for task in providers]
  order = ExampleOrder(sizes, rates, seed, shuffle)
  wanted = np.arange(batch_size)[rows or slice(None)]

  def stream() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    step = start_step
    while num_steps is None or step < start_step + num_steps:
      yield order(step * batch_size + wanted)
      step += 1

  return _iterate(name, split, stream, len(wanted), prefetch)


def examples_of_step(name: str, batch_size: int, step: int, seed: int = 0, split: str = 'train'
                     ) -> list[tuple[str, int]]:
  """Task and number of the example in each row of a step's global batch: see `batches`."""
  from retro_jax.data import tasks
  providers, rates = tasks.parts(name, split)
  order = ExampleOrder([len(task.source.examples[split]) for task in providers], rates, seed)
  source, example = order(step * batch_size + np.arange(batch_size))
  return [(providers[s].name, int(e)) for s, e in zip(source, example)]


def evaluation_batches(
    name: str,
    batch_size: int,
    *,
    split: str = 'train',
    rows: slice | None = None,
    max_examples: int | None = None,
    prefetch: int = 2,
) -> Iterator[Batch]:
  """Every example of a task once, in the order of the records.

  The last batch is filled up with empty examples: loss_weights 0, tokens 0, ids -1.
  Arguments as in `batches`; `max_examples` stops early.

  Raises:
    UserError: as `batches`, and a mixture, which has no order to go through once.
  """
  from retro_jax.data import tasks
  providers, _ = tasks.parts(name, split)
  if len(providers) > 1:
    raise UserError(f'{name!r} is a mixture; evaluate its tasks '
                    f'{[task.name for task in providers]} one by one')
  total = len(providers[0].source.examples[split])
  total = total if max_examples is None else min(total, max_examples)
  wanted = np.arange(batch_size)[rows or slice(None)]

  def stream() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(0, total, batch_size):
      positions = first + wanted
      yield np.zeros_like(positions), np.where(positions < total, positions, -1)

  return _iterate(name, split, stream, len(wanted), prefetch)


def _iterate(name: str, split: str, stream: Any, rows: int, prefetch: int) -> Iterator[Batch]:
  """Runs (source, example) pairs through seqio; `stream()` starts them anew."""
  import tensorflow as tf

  from retro_jax.data import features, tasks
  providers, _ = tasks.parts(name, split)
  facts = tasks.info(name)
  lengths = features.task_feature_lengths(facts.sequence_length, facts.chunk_length)

  def numbers(generator: Any) -> tf.data.Dataset:
    return tf.data.Dataset.from_generator(
        generator, output_signature=tf.TensorSpec((None,), tf.int64))

  datasets = []
  for i, task in enumerate(providers):
    wanted = numbers(lambda i=i: (example[source == i] for source, example in stream()))
    dataset = task.source.by_number(split, wanted)
    datasets.append(task.preprocess_postcache(task.preprocess_precache(dataset), lengths))
  joined = datasets[0]
  if len(datasets) > 1:
    choices = numbers(lambda: (source for source, _ in stream())).unbatch()
    joined = tf.data.Dataset.choose_from_datasets(datasets, choices, stop_on_empty_dataset=False)
  # All shapes are static and come from the same manifest, so seqio's checks at run time could
  # only cost time.
  converter = features.RetroFeatureConverter(facts.chunk_length, apply_length_check=False)
  joined = converter(joined, lengths).batch(rows, drop_remainder=True).prefetch(prefetch)
  return _Iterator(iter(joined))


class _Iterator(Iterator[Batch]):
  """Numpy batches of a tf.data iterator, which is stopped with the process at the latest.

  Its threads call back into Python: left running while the interpreter shuts down, they
  would abort the process after its work is done.
  """

  _running: 'weakref.WeakSet[_Iterator]' = weakref.WeakSet()

  def __init__(self, iterator: Any):
    self._iterator = iterator
    self._running.add(self)

  def __next__(self) -> Batch:
    import tensorflow as tf
    if self._iterator is None:
      raise StopIteration
    try:
      return {name: value.numpy() for name, value in next(self._iterator).items()}
    except StopIteration:
      self.close()
      raise
    except tf.errors.OpError as error:
      self.close()
      # TensorFlow carries our error as text; a person wants the line, not the graph.
      lines = [line for line in str(error).splitlines() if 'UserError: ' in line]
      if lines:
        raise UserError(lines[0].split('UserError: ', 1)[1]) from None
      raise

  def close(self) -> None:
    """Stops the threads; the iterator is at its end."""
    self._iterator = None


@atexit.register
def _close_all() -> None:
  for iterator in list(_Iterator._running):  # pylint: disable=protected-access
    iterator.close()


def check_divides(mesh: Mesh, batch_size: int) -> None:
  """Refuses a batch of which not every device gets as many sequences.

  Raises:
    UserError: such a batch.
  """
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  if batch_size % ways:
    raise UserError(f'batch size {batch_size} does not divide over data x fsdp = {ways}; '
                    f'choose a multiple of {ways}')


def microbatches(mesh: Mesh, batch_size: int, sequence_length: int, microbatch_tokens: int) -> int:
  """Into how many parts a batch is cut that are computed one after the other.

  Args:
    mesh, batch_size: devices and sequences over all of them.
    sequence_length: n, tokens.
    microbatch_tokens: at most so many of a device at a time, but at least a sequence; 0 for all.

  Returns:
    The smallest number that cuts each device's sequences into equal parts of that size.

  Raises:
    UserError: a batch that does not divide over the devices, or a negative number of tokens.
  """
  check_divides(mesh, batch_size)
  if microbatch_tokens < 0:
    raise UserError(f'microbatch_tokens = {microbatch_tokens}, expected at least 0')
  share = batch_size // (mesh.shape['data'] * mesh.shape['fsdp'])
  at_once = max(microbatch_tokens // sequence_length, 1) if microbatch_tokens else share
  return next(parts for parts in range(1, share + 1)
              if share % parts == 0 and share // parts <= at_once)


def rows_of_process(mesh: Mesh, batch_size: int) -> slice:
  """Rows of the global batch that this process has to feed.

  Raises:
    UserError: the batch does not divide over the mesh, or the rows of this process are not
      consecutive.
  """
  check_divides(mesh, batch_size)
  indices = NamedSharding(mesh, BATCH_SPEC).addressable_devices_indices_map((batch_size,))
  pieces = sorted({index[0].indices(batch_size)[:2] for index in indices.values()})
  for (_, stop), (start, _) in zip(pieces, pieces[1:]):
    if stop != start:
      raise UserError(f'this process holds rows {pieces} of a batch, which are not consecutive; '
                      'order the mesh devices by process')
  return slice(pieces[0][0], pieces[-1][1])


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Global arrays from the rows of each process, the batch axis over ('data', 'fsdp')."""
  sharding = NamedSharding(mesh, BATCH_SPEC)
  return {name: jax.make_array_from_process_local_data(sharding, value)
          for name, value in batch.items()}
