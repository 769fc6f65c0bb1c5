"""Documents of TFDS datasets and seqio tasks that the test makes itself."""

import json
import pickle

import numpy as np
import pytest

from retro_jax.data.dataset_corpus import SeqioDocuments, TfdsDocuments
from retro_jax.errors import UserError


def one_line(error):
  assert '\n' not in str(error.value)


TEXTS = ['first', 'sécond\n', '', 'a\0\u2581']


@pytest.fixture(scope='module')
def tfds_folder(tmp_path_factory):
  """A TFDS dataset 'small_texts' of TEXTS and numbers, prepared on disk."""
  import tensorflow_datasets as tfds
  folder = tmp_path_factory.mktemp('tfds')
  (folder / 'small_texts' / '1.0.0').mkdir(parents=True)
  info = tfds.core.DatasetInfo(
      builder=tfds.core.DatasetIdentity(
          name='small_texts', version=tfds.core.Version('1.0.0'), module_name='',
          data_dir=str(folder / 'small_texts' / '1.0.0')),
      features=tfds.features.FeaturesDict(
          {'text': tfds.features.Text(), 'url': tfds.features.Text(), 'n': np.int64}))
  writer = tfds.core.SequentialWriter(info, max_examples_per_shard=3)
  writer.initialize_splits(['train'])
  writer.add_examples(
      {'train': [{'text': t, 'url': f'u{i}', 'n': i} for i, t in enumerate(TEXTS)]})
  writer.close_all()
  return str(folder)


class TestTfds:

  def test_documents(self, tfds_folder):
    source = TfdsDocuments('small_texts', data_dir=tfds_folder)
    documents = list(source.documents())
    assert [d.text for d in documents] == TEXTS
    assert [d.id for d in documents] == [f'small_texts/1.0.0/train/{i}' for i in range(4)]
    assert source.report.documents == 4 and source.report.empty == 1
    named = TfdsDocuments('small_texts', id_field='url', title_field='url', data_dir=tfds_folder)
    assert [d.id for d in named.documents()] == [f'u{i}' for i in range(4)]

  def test_a_shard_is_a_file(self, tfds_folder):
    source = TfdsDocuments('small_texts', data_dir=tfds_folder)
    shards = pickle.loads(pickle.dumps(source.shards()))
    assert [len(list(shard.documents())) for shard in shards] == [3, 1]
    assert [d for shard in shards for d in shard.documents()] == list(source.documents())
    assert [shard.report.documents for shard in shards] == [3, 1]
    assert len({shard.name for shard in shards}) == 2 and all(s.weight > 0 for s in shards)
    assert shards[0].describe() != shards[1].describe()
    part = TfdsDocuments('small_texts', 'train[1:4]', data_dir=tfds_folder)
    assert len(part.shards()) == 1
    assert [d.text for d in part.documents()] == TEXTS[1:]

  def test_describe(self, tfds_folder):
    source = TfdsDocuments('small_texts', data_dir=tfds_folder)
    before = source.describe()
    assert json.loads(json.dumps(before)) == before == source.describe()
    path = source.builder().info.splits['train'].filepaths[1]
    content = path.read_bytes()
    path.write_bytes(content + b'x')
    assert source.describe() != before
    path.write_bytes(content)
    assert source.describe() == before

  def test_refusals(self, tfds_folder):
    for source, message in [
        (TfdsDocuments('no_such_texts', data_dir=tfds_folder), 'no such TFDS dataset'),
        (TfdsDocuments('small_texts', 'validation', data_dir=tfds_folder), 'no split'),
        (TfdsDocuments('small_texts', text_field='txt', data_dir=tfds_folder), "mean 'text'"),
        (TfdsDocuments('small_texts', text_field='n', data_dir=tfds_folder), 'holds no text')]:
      with pytest.raises(UserError, match=message) as error:
        list(source.documents())
      one_line(error)


@pytest.fixture(scope='module')
def seqio_tasks(tmp_path_factory):
  """One task over lines of a file, one over a Python function."""
  import seqio
  import tensorflow as tf
  path = tmp_path_factory.mktemp('seqio') / 'lines.txt'
  path.write_text('first\nsecond\n')
  feature = seqio.Feature(seqio.PassThroughVocabulary(1), dtype=tf.string, rank=0, add_eos=False)
  seqio.TaskRegistry.add(
      'small_lines', seqio.TextLineDataSource({'train': str(path)}),
      preprocessors=[lambda dataset: dataset.map(lambda line: {'text': line})],
      output_features={'text': feature})
  texts = list(TEXTS)
  seqio.TaskRegistry.add(
      'small_function', seqio.FunctionDataSource(
          lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
              {'text': texts, 'n': range(len(texts))}), splits=['train', 'test']),
      preprocessors=[], output_features={'text': feature})
  yield path, texts
  seqio.TaskRegistry.remove('small_lines')
  seqio.TaskRegistry.remove('small_function')


class TestSeqio:

  def test_documents(self, seqio_tasks):
    source = SeqioDocuments('small_lines')
    assert [d.text for d in source.documents()] == ['first', 'second']
    assert [d.id for d in source.documents()] == ['small_lines/train/0', 'small_lines/train/1']
    source = SeqioDocuments('small_function', 'test', id_field='n')
    assert [(d.id, d.text) for d in source.documents()] == [
        (str(i), t) for i, t in enumerate(TEXTS)]
    assert source.report.empty == 1
    assert source.shards() == [source] and source.weight == 1 and source.name
    assert SeqioDocuments('small_lines').weight == len('first\nsecond\n')

  def test_describe(self, seqio_tasks):
    path, texts = seqio_tasks
    source = SeqioDocuments('small_lines')
    before = source.describe()
    assert json.loads(json.dumps(before)) == before == source.describe()
    path.write_text('first\nsecund\n')
    assert source.describe() != before
    source = SeqioDocuments('small_function')
    before = source.describe()
    texts[0] = 'fjrst'
    assert source.describe() != before
    texts[0] = 'first'
    assert source.describe() == before

  def test_refusals(self, seqio_tasks):
    for source, message in [
        (SeqioDocuments('small_linez'), "did you mean 'small_lines'"),
        (SeqioDocuments('small_lines', 'test'), 'no split'),
        (SeqioDocuments('small_lines', text_field='txt'), "did you mean 'text'"),
        (SeqioDocuments('small_function', text_field='n'), 'holds no text')]:
      with pytest.raises(UserError, match=message) as error:
        list(source.documents())
      one_line(error)
