"""From the features of a retrieval task to what the model sees: `RetroFeatureConverter`.

Reading records is in tasks.py and records.py. Neighbours have rank 3 (chunks, neighbours,
tokens), which is why nothing is packed here: sequences were packed with whole chunks when
they were written.
"""

from collections.abc import Mapping

import seqio
import tensorflow as tf

from retro_jax.data.records import check_multiple

_Spec = seqio.FeatureConverter.FeatureSpec


def task_feature_lengths(sequence_length: int, chunk_length: int) -> dict[str, int]:
  """Lengths, by task feature, of sequences of n tokens: seqio's `task_feature_lengths`.

  Raises:
    UserError: n is no multiple of the chunk length.
  """
  check_multiple(sequence_length, chunk_length)
  per_chunk = sequence_length // chunk_length
  return {
      name: sequence_length if name in ('tokens', 'targets') else per_chunk
      for name in RetroFeatureConverter.TASK_FEATURES}


class RetroFeatureConverter(seqio.FeatureConverter):
  """Task features to model features; n tokens, l chunks, k neighbours of r tokens.

    tokens, targets          int32 [n]
    loss_weights             float32 [n], 1 where there is a target
    documents, text_bytes    int32 [l]
    chunk_ids                int32 [l], -1 for padding
    neighbor_ids             int32 [l, k], -1 where there is none
    neighbor_tokens          int32 [l, k, r]
    neighbor_mask            bool [l, k, r], False for padding and missing neighbours
  """

  TASK_FEATURES = {
      'tokens': _Spec(tf.int32),
      'targets': _Spec(tf.int32),
      'chunk_ids': _Spec(tf.int64),
      'documents': _Spec(tf.int32),
      'text_bytes': _Spec(tf.int32),
      'neighbor_ids': _Spec(tf.int64, rank=2),
      'neighbor_tokens': _Spec(tf.int32, rank=3),
  }
  MODEL_FEATURES = {
      'tokens': _Spec(tf.int32),
      'targets': _Spec(tf.int32),
      'loss_weights': _Spec(tf.float32),
      'documents': _Spec(tf.int32),
      'text_bytes': _Spec(tf.int32),
      'chunk_ids': _Spec(tf.int32),
      'neighbor_ids': _Spec(tf.int32, rank=2),
      'neighbor_tokens': _Spec(tf.int32, rank=3),
      'neighbor_mask': _Spec(tf.bool, rank=3),
  }
  PACKING_FEATURE_DTYPES = None

  def __init__(self, chunk_length: int, **kwargs):
    """`chunk_length` is m; `kwargs` go to seqio. Packing cannot work with rank 3.

    Raises:
      ValueError: pack=True.
    """
    if kwargs.pop('pack', False):
      raise ValueError('RetroFeatureConverter cannot pack: sequences are packed on disk')
    super().__init__(pack=False, **kwargs)
    self.chunk_length = chunk_length

  def _convert_features(
      self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
    check_multiple(task_feature_lengths['tokens'], self.chunk_length)

    def convert(features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
      found = features['neighbor_ids'] >= 0
      return {
          'tokens': features['tokens'],
          'targets': features['targets'],
          'loss_weights': tf.cast(features['targets'] != 0, tf.float32),
          'documents': features['documents'],
          'text_bytes': features['text_bytes'],
          'chunk_ids': tf.cast(features['chunk_ids'], tf.int32),
          'neighbor_ids': tf.cast(features['neighbor_ids'], tf.int32),
          'neighbor_tokens': features['neighbor_tokens'],
          'neighbor_mask': (features['neighbor_tokens'] != 0) & found[..., None],
      }

    return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

  def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
    """Lengths of the model features, seqio's contract.

    Raises:
      UserError: the sequence length is no multiple of the chunk length.
    """
    check_multiple(task_feature_lengths['tokens'], self.chunk_length)
    chunks = task_feature_lengths['tokens'] // self.chunk_length
    return {name: task_feature_lengths['tokens']
            if name in ('tokens', 'targets', 'loss_weights') else chunks
            for name in self.MODEL_FEATURES}
