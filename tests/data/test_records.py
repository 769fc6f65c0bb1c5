"""Records against TensorFlow's own reader, and against themselves after damage."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax import storage
from retro_jax.data import records
from retro_jax.errors import UserError


def random_pair(rng, shape):
  layouts = shape.layouts()
  result = []
  for layout in layouts.values():
    result.append({
        name: rng.integers(0, 60000, spec.shape).astype(spec.dtype) if spec.dtype != '<f4'
        else rng.normal(size=spec.shape).astype('f4') for name, spec in layout.specs.items()})
  return result


def write(folder, shape, pairs, per_shard, **manifest):
  for shard, first in enumerate(range(0, len(pairs), per_shard)):
    records.shard_folder(folder, shard).mkdir(parents=True)
    writer = records.RecordWriter(records.shard_folder(folder, shard), shape)
    for pair in pairs[first:first + per_shard]:
      writer.write(*pair)
    writer.close()
  storage.write_manifest(folder, {
      'kind': records.KIND, 'format_version': records.FORMAT_VERSION, 'num_examples': len(pairs),
      'examples_per_shard': per_shard, 'sequence_length': shape.sequence_length,
      'chunk_length': shape.chunk_length, 'num_neighbors': shape.num_neighbors,
      'token_dtype': shape.token_dtype, 'content': 'abc', **manifest})
  return records.Examples(folder)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), m=st.integers(1, 5), l=st.integers(1, 4), k=st.integers(1, 3),
       count=st.integers(1, 9), per_shard=st.integers(1, 5), dtype=st.sampled_from(['<u2', '<u4']))
def test_round_trip_in_any_order(tmp_path_factory, seed, m, l, k, count, per_shard, dtype):
  rng = np.random.default_rng(seed)
  shape = records.ExampleShape(l * m, m, k, dtype)
  pairs = [random_pair(rng, shape) for _ in range(count)]
  examples = write(tmp_path_factory.mktemp('r') / 'x', shape, pairs, per_shard)
  wanted = rng.integers(0, count, 7)
  read = examples.read(wanted)
  for row, i in enumerate(wanted):
    for prefix, arrays in zip(('', 'neighbor_'), pairs[i]):
      for name, array in arrays.items():
        np.testing.assert_array_equal(read[prefix + name][row], array)
        assert read[prefix + name].dtype == np.dtype(array.dtype)
  assert len(read) == 8 and len(examples) == count


def test_tensorflow_reads_the_same_and_every_record_has_one_length(tmp_path):
  import tensorflow as tf
  rng = np.random.default_rng(0)
  shape = records.ExampleShape(192, 64, 3, '<u2')
  pairs = [random_pair(rng, shape) for _ in range(5)]
  examples = write(tmp_path / 'x', shape, pairs, 3)
  for which, name in enumerate((records.EXAMPLES, records.NEIGHBORS)):
    assert [p.stat().st_size for p in examples.paths(name)] == [
        n * examples.layouts[name].record_size for n in (3, 2)]
    raw = list(tf.data.TFRecordDataset([str(p) for p in examples.paths(name)]).as_numpy_iterator())
    assert len(raw) == 5
    for record, pair in zip(raw, pairs):
      features = tf.train.Example.FromString(record).features.feature
      assert sorted(features) == sorted(pair[which])
      for feature, array in pair[which].items():
        assert features[feature].bytes_list.value == [array.tobytes()]


def test_empty_example(tmp_path):
  shape = records.ExampleShape(8, 4, 2, '<u4')
  examples = write(tmp_path / 'x', shape, [random_pair(np.random.default_rng(0), shape)], 1)
  read = examples.read([-1, 0, -1])
  for row in (0, 2):
    assert not read['tokens'][row].any() and not read['neighbor_tokens'][row].any()
    assert (read['chunk_ids'][row] == -1).all() and (read['documents'][row] == -1).all()
    assert (read['neighbor_ids'][row] == -1).all()
    assert np.isinf(read['neighbor_distances'][row]).all()
  assert read['tokens'][1].any()
  for bad in (1, -2):
    with pytest.raises(IndexError):
      examples.read([bad])


@pytest.mark.parametrize('where', ['length', 'frame', 'payload', 'proto', 'checksum'])
def test_damage_is_noticed(tmp_path, where):
  rng = np.random.default_rng(0)
  shape = records.ExampleShape(8, 4, 2, '<u2')
  examples = write(tmp_path / 'x', shape, [random_pair(rng, shape) for _ in range(3)], 3)
  path = examples.paths(records.EXAMPLES)[0]
  size = examples.layouts[records.EXAMPLES].record_size
  data = bytearray(path.read_bytes())
  offset = {'length': 0, 'frame': 9, 'payload': size - 8, 'proto': 12, 'checksum': size - 1}[where]
  data[size + offset] ^= 1
  path.write_bytes(data)
  examples = records.Examples(tmp_path / 'x')
  assert len(examples.read([0, 2])['tokens']) == 2
  with pytest.raises(UserError, match='shard-00000/examples.tfrecord.*rebuild') as error:
    examples.read([0, 1])
  assert '\n' not in str(error.value)


def test_truncated_or_replaced_file_is_noticed(tmp_path):
  shape = records.ExampleShape(8, 4, 2, '<u2')
  examples = write(tmp_path / 'x', shape, [random_pair(np.random.default_rng(0), shape)] * 3, 3)
  path = examples.paths(records.NEIGHBORS)[0]
  path.write_bytes(path.read_bytes()[:-5])
  with pytest.raises(UserError, match='rebuild'):
    examples.read([0])
  with pytest.raises(UserError, match='shard-00000/neighbors.tfrecord'):
    records.Examples(tmp_path / 'x')


def test_wrong_shapes_do_not_get_written():
  layout = records.RecordLayout({'a': records.ArraySpec('<i4', (3,))})
  with pytest.raises(ValueError, match='shape'):
    layout.encode({'a': np.zeros(4)})
  with pytest.raises(ValueError, match='expected'):
    layout.encode({'b': np.zeros(3)})


def test_checksum_is_that_of_the_format():
  # From the TFRecord of one empty record: length 0 has this masked CRC-32C.
  assert records.masked_crc(struct.pack('<Q', 0)) == 0x07980329


def test_lengths_that_do_not_fit():
  with pytest.raises(UserError, match='100, no multiple of chunk_length 64'):
    records.check_multiple(100, 64)
  records.check_multiple(128, 64)
