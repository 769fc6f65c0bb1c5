"""Training examples on disk: TFRecords of one constant length, reached by number.

Each shard holds two files of equal order: `examples.tfrecord` with the tokens of sequences,
`neighbors.tfrecord` with what their chunks retrieved. Every record is a tf.train.Example
whose features are little-endian arrays of fixed size, so that record i of a shard lies at
i times the record size, and any TFRecord reader understands the files all the same. No
TensorFlow here; seqio is in tasks.py, the order of examples in batches.py.
"""

import dataclasses
import functools
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from retro_jax import files, storage
from retro_jax.errors import UserError

KIND = 'retrieval-examples'
FORMAT_VERSION = 2
EXAMPLES, NEIGHBORS = 'examples', 'neighbors'


@dataclasses.dataclass(frozen=True)
class ArraySpec:
  """dtype (little-endian) and shape of one feature."""

  dtype: str
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    return np.dtype(self.dtype).itemsize * math.prod(self.shape)


def example_specs(
    sequence_length: int, chunk_length: int, token_dtype: str, scored: bool = False
) -> dict[str, ArraySpec]:
  """Features of the records of `examples.tfrecord`: n tokens in l chunks.

  With `scored`, also which tokens of the text are there to be predicted: 1 at each position whose
  next token is. Without it, all are.
  """
  l = sequence_length // chunk_length
  more = {'scored': ArraySpec('|u1', (sequence_length,))} if scored else {}
  return more | {
      'chunk_ids': ArraySpec('<i8', (l,)),
      'documents': ArraySpec('<i4', (l,)),
      'next_token': ArraySpec(token_dtype, (1,)),
      'text_bytes': ArraySpec('<i4', (l,)),
      'tokens': ArraySpec(token_dtype, (sequence_length,)),
  }


def neighbor_specs(
    num_chunks: int, num_neighbors: int, retrieved_length: int, token_dtype: str,
) -> dict[str, ArraySpec]:
  """Features of the records of `neighbors.tfrecord`: l chunks, K neighbours, r tokens each."""
  return {
      'distances': ArraySpec('<f4', (num_chunks, num_neighbors)),
      'ids': ArraySpec('<i8', (num_chunks, num_neighbors)),
      'tokens': ArraySpec(token_dtype, (num_chunks, num_neighbors, retrieved_length)),
  }


class RecordLayout:
  """Where the bytes of each feature lie in a framed record.

  The frame of TFRecord: 8 bytes of length, 4 of its checksum, the data, 4 of its checksum.

  Attributes:
    specs: the features, by name in order.
    record_size: bytes of a record with its frame.
  """

  def __init__(self, specs: Mapping[str, ArraySpec]):
    self.specs = dict(sorted(specs.items()))
    # Wire format of protobuf: Example.features.feature[name].bytes_list.value, each a
    # length-delimited field; the lengths nest, so they are known before the contents.
    parts, self._offsets, position = [], {}, 0
    entries = []
    for name, spec in self.specs.items():
      value = b'\x0a' + _varint(spec.nbytes)
      bytes_list = b'\x0a' + _varint(len(value) + spec.nbytes)
      feature = b'\x12' + _varint(len(bytes_list) + len(value) + spec.nbytes)
      name_field = b'\x0a' + _varint(len(name)) + name.encode()
      head = name_field + feature + bytes_list + value
      entries.append((name, b'\x0a' + _varint(len(head) + spec.nbytes) + head, spec.nbytes))
    total = sum(len(head) + size for _, head, size in entries)
    parts.append(b'\x0a' + _varint(total))
    position = len(parts[0])
    for name, head, size in entries:
      position += len(head)
      self._offsets[name] = position
      position += size
      parts += [head, bytes(size)]
    self._template = np.frombuffer(b''.join(parts), np.uint8)
    self._fixed = np.ones(position, bool)
    for name, spec in self.specs.items():
      self._fixed[self._offsets[name]:self._offsets[name] + spec.nbytes] = False
    length = struct.pack('<Q', position)
    self._frame = np.frombuffer(length + struct.pack('<I', masked_crc(length)), np.uint8)
    self.record_size = 12 + position + 4

  def encode(self, arrays: Mapping[str, Any]) -> bytes:
    """One framed record.

    Raises:
      ValueError: features missing, unknown, or of another shape.
    """
    if arrays.keys() != self.specs.keys():
      raise ValueError(f'features {sorted(arrays)}, expected {list(self.specs)}')
    data = self._template.copy()
    for name, spec in self.specs.items():
      array = np.asarray(arrays[name])
      if array.shape != spec.shape:
        raise ValueError(f'{name} has shape {array.shape}, expected {spec.shape}')
      stored = np.ascontiguousarray(array.astype(spec.dtype))
      data[self._offsets[name]:self._offsets[name] + spec.nbytes] = stored.view(np.uint8).ravel()
    payload = data.tobytes()
    return self._frame.tobytes() + payload + struct.pack('<I', masked_crc(payload))

  def decode(self, records: np.ndarray, where: str = 'records') -> dict[str, np.ndarray]:
    """Features of framed records.

    Args:
      records: uint8 [b, record_size].
      where: names the records in errors.

    Raises:
      UserError: a record is damaged or holds other features.
    """
    for i, record in enumerate(records):
      data = record[12:-4]
      if not np.array_equal(record[:12], self._frame) or not np.array_equal(
          data[self._fixed], self._template[self._fixed]):
        raise UserError(
            f'{where}, row {i}: not a record of the expected layout; rebuild the examples')
      if masked_crc(data.tobytes()) != int(record[-4:].view('<u4')[0]):
        raise UserError(f'{where}, row {i}: checksum of the record is wrong; rebuild the examples')
    result = {}
    for name, spec in self.specs.items():
      first = 12 + self._offsets[name]
      raw = np.ascontiguousarray(records[:, first:first + spec.nbytes])
      result[name] = raw.view(spec.dtype).reshape((len(records),) + spec.shape)
    return result


def _varint(value: int) -> bytes:
  result = bytearray()
  while value > 127:
    result.append(value & 127 | 128)
    value >>= 7
  result.append(value)
  return bytes(result)


def masked_crc(data: bytes) -> int:
  """The checksum of the TFRecord format."""
  crc = google_crc32c.value(data)
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def shard_folder(folder: str | os.PathLike, shard: int) -> Path:
  """Folder of one shard: a file of each of the two sets."""
  return Path(folder) / f'shard-{shard:05d}'


def shard_path(folder: str | os.PathLike, name: str, shard: int) -> Path:
  """File of one shard of one of the two sets."""
  return shard_folder(folder, shard) / f'{name}.tfrecord'


@dataclasses.dataclass(frozen=True)
class ExampleShape:
  """What a set of records has in common; it stands in its manifest."""

  sequence_length: int
  chunk_length: int
  num_neighbors: int
  token_dtype: str
  scored: bool = False

  @property
  def num_chunks(self) -> int:
    return self.sequence_length // self.chunk_length

  @property
  def retrieved_length(self) -> int:
    return 2 * self.chunk_length

  def layouts(self) -> dict[str, RecordLayout]:
    """Layout of each of the two sets."""
    return {
        EXAMPLES: RecordLayout(example_specs(
            self.sequence_length, self.chunk_length, self.token_dtype, self.scored)),
        NEIGHBORS: RecordLayout(neighbor_specs(
            self.num_chunks, self.num_neighbors, self.retrieved_length, self.token_dtype)),
    }


def check_multiple(sequence_length: int, chunk_length: int) -> None:
  """Refuses sequences that do not consist of whole chunks.

  Raises:
    UserError: naming both lengths.
  """
  if chunk_length < 1 or sequence_length < 1 or sequence_length % chunk_length:
    raise UserError(f'sequence_length is {sequence_length}, no multiple of chunk_length '
                    f'{chunk_length}; choose one that is')


class RecordWriter:
  """Writes pairs of records into the two files of one shard, in order."""

  def __init__(self, folder: str | os.PathLike, shape: ExampleShape):
    """Starts both files in `folder`, which is that of the shard."""
    self._layouts = shape.layouts()
    self._files: dict[str, BinaryIO] = {
        name: open(Path(folder) / f'{name}.tfrecord', 'wb')  # pylint: disable=consider-using-with
        for name in self._layouts}

  def write(self, example: Mapping[str, Any], neighbors: Mapping[str, Any]) -> None:
    """Adds one sequence and its neighbours."""
    for name, arrays in ((EXAMPLES, example), (NEIGHBORS, neighbors)):
      self._files[name].write(self._layouts[name].encode(arrays))

  def close(self) -> None:
    """Closes both files."""
    for file in self._files.values():
      file.close()


class Examples:
  """Read access to a finished folder of records, by example number.

  Attributes:
    manifest: what the folder says of itself.
    shape: its lengths.
    fingerprint: of the bytes of all records.
    num_examples: sequences in it.
  """

  def __init__(self, folder: str | os.PathLike):
    """Opens the folder.

    Raises:
      UserError: nothing there, something else, or files missing or cut short.
    """
    self.folder = Path(files.fetch_tree(folder))
    self.manifest = storage.read_manifest(folder, KIND)
    if self.manifest['format_version'] != FORMAT_VERSION:
      raise UserError(f'{folder}: format version {self.manifest["format_version"]}, '
                      f'expected {FORMAT_VERSION}; rebuild the examples')
    self.shape = ExampleShape(**{
        field.name: self.manifest[field.name] for field in dataclasses.fields(ExampleShape)
        if field.name in self.manifest})
    self.fingerprint: str = self.manifest['content']
    self.num_examples: int = self.manifest['num_examples']
    self.examples_per_shard: int = self.manifest['examples_per_shard']
    self.num_shards = -(-self.num_examples // self.examples_per_shard)
    self.layouts = self.shape.layouts()
    for name in self.layouts:
      for shard in range(self.num_shards):
        self._check_size(name, shard)

  def __len__(self) -> int:
    return self.num_examples

  def paths(self, name: str) -> list[Path]:
    """All files of one of the two sets, in order."""
    return [shard_path(self.folder, name, i) for i in range(self.num_shards)]

  def _check_size(self, name: str, shard: int) -> tuple[Path, int, int]:
    """Path, number of records and their size of one file; refuses one that is cut short."""
    path = shard_path(self.folder, name, shard)
    size = self.layouts[name].record_size
    expected = min(self.examples_per_shard, self.num_examples - shard * self.examples_per_shard)
    there = path.stat().st_size if path.exists() else 0
    if there != expected * size:
      raise UserError(f'{path}: {there:,} bytes, expected {expected:,} records of {size:,}; '
                      'rebuild the examples')
    return path, expected, size

  @functools.cache  # pylint: disable=method-cache-max-size-none
  def _records(self, name: str, shard: int) -> np.ndarray:
    path, expected, size = self._check_size(name, shard)
    return np.memmap(path, np.uint8, 'r', shape=(expected, size))

  def read(self, indices: Sequence[int] | np.ndarray,
           sets: Sequence[str] = (EXAMPLES, NEIGHBORS)) -> dict[str, np.ndarray]:
    """Examples by number, in any order; -1 gives an empty one.

    Args:
      indices: of the examples.
      sets: which of the two sets of records to read.

    Returns:
      the features of `example_specs`, and those of `neighbor_specs` as `neighbor_ids`,
      `neighbor_distances`, `neighbor_tokens`; each with a leading axis over `indices`.
      In an empty example ids are -1, distances inf, all else 0.

    Raises:
      UserError: a record is damaged; says which file.
      IndexError: there is no such example.
    """
    indices = np.asarray(indices, np.int64)
    if indices.size and (indices.min() < -1 or indices.max() >= self.num_examples):
      raise IndexError(f'{self.folder}: examples {indices.min()}..{indices.max()} asked for, '
                       f'it holds 0..{self.num_examples - 1}')
    result = {}
    for name in sets:
      layout = self.layouts[name]
      features = {
          feature: np.full((len(indices),) + spec.shape, _EMPTY.get(feature, 0), spec.dtype)
          for feature, spec in layout.specs.items()}
      shards = np.where(indices < 0, -1, indices // self.examples_per_shard)
      for shard in np.unique(shards[shards >= 0]):
        here = np.flatnonzero(shards == shard)
        rows = indices[here] % self.examples_per_shard
        where = f'{shard_path(self.folder, name, shard)}: records {rows.tolist()}'
        for feature, values in layout.decode(self._records(name, int(shard))[rows], where).items():
          features[feature][here] = values
      prefix = 'neighbor_' if name == NEIGHBORS else ''
      result.update({prefix + feature: values for feature, values in features.items()})
    return result


_EMPTY = {'chunk_ids': -1, 'documents': -1, 'ids': -1, 'distances': np.inf}
