"""`RetroFeatureConverter`: what it makes of task features, and what it refuses."""

import numpy as np
import pytest
import tensorflow as tf

from retro_jax.data import features
from retro_jax.errors import UserError


def dataset(n=8, l=4, k=2, r=4, **changes):
  rng = np.random.default_rng(0)
  row = {
      'tokens': np.arange(1, n + 1, dtype=np.int32),
      'targets': np.array([2, 3, 0, 5, 0, 7, 8, 9][:n], np.int32),
      'chunk_ids': np.arange(l, dtype=np.int64), 'documents': np.zeros(l, np.int32),
      'text_bytes': np.arange(l, dtype=np.int32),
      'neighbor_ids': rng.integers(-1, 2, (l, k)).astype(np.int64),
      'neighbor_tokens': rng.integers(0, 3, (l, k, r)).astype(np.int32)} | changes
  return row, tf.data.Dataset.from_tensors(row)


def test_conversion():
  row, ds = dataset()
  [out] = list(features.RetroFeatureConverter(2)(
      ds, features.task_feature_lengths(8, 2)).as_numpy_iterator())
  assert set(out) == set(features.RetroFeatureConverter.MODEL_FEATURES)
  assert out['loss_weights'].tolist() == [float(t != 0) for t in row['targets']]
  for c, j, p in np.ndindex(4, 2, 4):
    visible = row['neighbor_ids'][c, j] >= 0 and row['neighbor_tokens'][c, j, p] != 0
    assert out['neighbor_mask'][c, j, p] == visible
  for name in ('tokens', 'targets', 'documents', 'text_bytes', 'neighbor_tokens', 'neighbor_ids'):
    np.testing.assert_array_equal(out[name], row[name])
  assert out['loss_weights'].dtype == np.float32 and out['neighbor_mask'].dtype == bool
  assert all(out[name].dtype == np.int32 for name in
             ('tokens', 'targets', 'documents', 'text_bytes', 'chunk_ids', 'neighbor_ids'))


def test_length_that_is_no_multiple():
  with pytest.raises(UserError, match='sequence_length is 8, no multiple of chunk_length 3'):
    features.task_feature_lengths(8, 3)
  _, ds = dataset()
  with pytest.raises(UserError, match='sequence_length is 8, no multiple of chunk_length 3'):
    features.RetroFeatureConverter(3)(ds, features.task_feature_lengths(8, 2))


def test_packing_is_refused():
  with pytest.raises(ValueError, match='cannot pack'):
    features.RetroFeatureConverter(2, pack=True)


@pytest.mark.parametrize('changes', [
    {'neighbor_tokens': np.zeros((4, 8), np.int32)}, {'tokens': np.zeros(8, np.int64)}])
def test_seqio_checks_rank_and_dtype(changes):
  _, ds = dataset(**changes)
  with pytest.raises(ValueError, match='incorrect'):
    features.RetroFeatureConverter(2)(ds, features.task_feature_lengths(8, 2))


def test_seqio_checks_lengths():
  _, ds = dataset()
  converted = features.RetroFeatureConverter(2)(ds, features.task_feature_lengths(6, 2))
  with pytest.raises(tf.errors.InvalidArgumentError):
    list(converted)
