"""seqio tasks: both ways of reading agree, targets equal a loop, mistakes are one line."""

import numpy as np
import pytest
import seqio
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.data import features, tasks
from retro_jax.data.corpus import Document
from retro_jax.errors import UserError
from tests import worlds


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tasks')
  store, examples = worlds.examples(folder, worlds.documents(1, 14, longest=60))
  tasks.register_task('a', examples.folder, 2)
  return store, examples


def slow_targets(store):
  """For each chunk id: what follows each of its tokens in the same document."""
  streams = {}
  for chunk in range(store.num_chunks):
    streams.setdefault(int(store.document(chunk)), []).append(chunk)
  result = {}
  for chunks in streams.values():
    tokens = [t for c in chunks for t in store.tokens(c).tolist()]
    following = [b if a else 0 for a, b in zip(tokens, tokens[1:] + [0])]
    for i, c in enumerate(chunks):
      result[c] = following[8 * i:8 * i + 8]
  return result


def test_seqio_get_dataset(made):
  store, examples = made
  lengths = features.task_feature_lengths(32, 8)
  rows = list(seqio.get_mixture_or_task('a').get_dataset(
      lengths, 'train', shuffle=False).as_numpy_iterator())
  assert len(rows) == len(examples)
  expected = slow_targets(store)
  raw = examples.read(range(len(examples)))
  for i, row in enumerate(rows):
    np.testing.assert_array_equal(row['tokens'], raw['tokens'][i])
    np.testing.assert_array_equal(row['neighbor_tokens'], raw['neighbor_tokens'][i][:, :2])
    np.testing.assert_array_equal(row['neighbor_ids'], raw['neighbor_ids'][i][:, :2])
    targets = [t for c in row['chunk_ids'].tolist() for t in expected.get(c, [0] * 8)]
    assert row['targets'].tolist() == targets
    assert set(row) == set(tasks.get('a').output_features)


def test_both_ways_of_reading_agree(made):
  source = tasks.get('a').source
  in_order = list(source.get_dataset('train', shuffle=False).as_numpy_iterator())
  numbers = np.random.default_rng(0).permutation(len(in_order))
  by_number = source.by_number('train', tf.data.Dataset.from_tensor_slices(numbers).batch(3))
  for i, row in zip(numbers, by_number.as_numpy_iterator(), strict=True):
    assert row.keys() == in_order[i].keys()
    for name, value in row.items():
      np.testing.assert_array_equal(value, in_order[i][name])
      assert value.dtype == in_order[i][name].dtype


def test_shards_of_seqio_cover_everything_once(made):
  _, examples = made
  assert len(tasks.get('a').source.list_shards('train')) >= 2
  for count in (2, 9):  # by file, then by example
    ids = []
    for index in range(count):
      ds = tasks.get('a').get_dataset(None, 'train', shuffle=True, seed=1,
                                      shard_info=seqio.ShardInfo(index, count))
      ids += [int(row['chunk_ids'][0]) for row in ds.as_numpy_iterator()]
    assert sorted(ids) == sorted(examples.read(range(len(examples)))['chunk_ids'][:, 0].tolist())


def test_shorter_sequences_keep_right_targets(made):
  """seqio trims; the target of the last token kept is the token after it."""
  store, _ = made
  expected = slow_targets(store)
  lengths = features.task_feature_lengths(16, 8)
  ds = features.RetroFeatureConverter(8)(
      tasks.get('a').get_dataset(lengths, 'train', shuffle=False), lengths)
  for row in ds.as_numpy_iterator():
    assert row['tokens'].shape == (16,) and row['neighbor_tokens'].shape == (2, 2, 16)
    targets = [t for c in row['chunk_ids'].tolist() for t in expected.get(c, [0] * 8)]
    assert row['targets'].tolist() == targets


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6), l=st.integers(1, 4))
def test_every_text_token_is_a_target_once(tmp_path_factory, seed, count, l):
  rows = worlds.documents(seed, count, longest=25) + [Document('empty', ''), Document('x', 'y')]
  _, examples = worlds.examples(tmp_path_factory.mktemp('t'), rows, 8 * l, 1)
  task = tasks.register_task('once', examples.folder, 1)
  found = []
  for row in task.get_dataset(None, 'train', shuffle=False).as_numpy_iterator():
    found += [t for t in row['targets'].tolist() if t]
  # The order is that of the documents, so the targets are their token rows without bos.
  vocabulary = worlds.vocabulary()
  expected = [t for row in rows if row.text for t in vocabulary.encode(row.text) + [2]]
  assert found == expected


def test_mistakes_are_one_line(made, tmp_path):
  _, examples = made
  with pytest.raises(UserError, match='holds 3 neighbours a chunk, 4 asked for'):
    tasks.register_task('b', examples.folder, 4)
  with pytest.raises(UserError, match='no retrieval-examples there'):
    tasks.register_task('b', tmp_path, 1)
  with pytest.raises(UserError, match="no task or mixture 'aa' .did you mean 'a'"):
    tasks.get('aa')
  with pytest.raises(UserError, match="has no split 'valid'"):
    tasks.parts('a', 'valid')
  with pytest.raises(UserError, match='rates'):
    tasks.register_mixture('m', {'a': 0})
  assert 'b' not in seqio.TaskRegistry.names()


def test_mixture_needs_tasks_that_fit(made, tmp_path):
  _, other = worlds.examples(tmp_path, worlds.documents(2, 4), 16)
  tasks.register_task('short', other.folder, 2)
  with pytest.raises(UserError, match='has sequence_length 32 but .* has 16'):
    tasks.register_mixture('m', {'a': 1, 'short': 1})
  tasks.register_task('one', made[1].folder, 1)
  with pytest.raises(UserError, match='different numbers of neighbours'):
    tasks.register_mixture('m', {'a': 1, 'one': 1})


def test_info(made):
  store, examples = made
  facts = tasks.info('a')
  assert (facts.sequence_length, facts.chunk_length, facts.retrieved_length) == (32, 8, 16)
  assert facts.num_neighbors == 2 and facts.num_examples == {'train': len(examples)}
  assert facts.vocabulary_fingerprint == store.vocabulary_fingerprint
  assert facts.vocabulary_size == worlds.vocabulary().size
