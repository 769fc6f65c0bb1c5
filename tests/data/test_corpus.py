"""Each source of documents on inputs the test writes itself."""

import gzip
import json
import os

import numpy as np
import pytest

from retro_jax.data.corpus import JsonLines, SeqioDocuments, TextFiles, TfdsDocuments
from retro_jax.errors import UserError


def one_line(error):
  assert '\n' not in str(error.value)


class TestTextFiles:

  @pytest.fixture
  def folder(self, tmp_path):
    (tmp_path / 'in' / 'deep').mkdir(parents=True)
    (tmp_path / 'in' / 'b.txt').write_bytes('é\r\n'.encode())
    (tmp_path / 'in' / 'deep' / 'a.txt').write_bytes(b'bad \xff byte')
    (tmp_path / 'in' / 'empty.txt').write_bytes(b'')
    (tmp_path / 'in' / 'c.md').write_bytes(b'not asked for')
    return tmp_path / 'in'

  def test_documents(self, folder):
    source = TextFiles(f'{folder}/**/*.txt')
    documents = list(source.documents())
    assert [d.id for d in documents] == ['b.txt', 'deep/a.txt', 'empty.txt']
    assert [d.text for d in documents] == ['é\r\n', 'bad \ufffd byte', '']
    report = source.report
    assert (report.documents, report.empty, report.replaced) == (3, 1, 1)
    assert report.bytes == sum(len(d.text.encode()) for d in documents)
    assert list(source.documents()) == documents and source.report.documents == 3
    assert '1 with invalid UTF-8' in str(report)

  def test_describe_changes_with_content_only(self, folder):
    source = TextFiles(f'{folder}/**/*.txt')
    before = source.describe()
    assert json.loads(json.dumps(before)) == before == source.describe()
    os.utime(folder / 'b.txt', (0, 0))
    assert source.describe() == before
    status = os.stat(folder / 'b.txt')
    (folder / 'b.txt').write_bytes('è\r\n'.encode())  # the same size
    os.utime(folder / 'b.txt', ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = source.describe()
    assert changed != before
    (folder / 'new.txt').write_text('x')
    assert source.describe() not in (before, changed)

  def test_large_files_are_described_by_time(self, folder, monkeypatch):
    monkeypatch.setattr('retro_jax.data.corpus._CHECKSUM_BYTES', 1)
    source = TextFiles(f'{folder}/b.txt')
    before = source.describe()
    os.utime(folder / 'b.txt', (0, 0))
    assert source.describe() != before

  def test_refusals(self, folder, tmp_path):
    for action in ('documents', 'describe'):
      with pytest.raises(UserError, match='no file of that name') as error:
        list(getattr(TextFiles(f'{tmp_path}/none/*.txt'), action)())
      one_line(error)
    with pytest.raises(UserError, match='no text in it'):
      list(TextFiles(f'{folder}/empty.txt').documents())


class TestJsonLines:

  def write(self, path, lines, opener=open):
    with opener(path, 'wb') as f:
      f.write(b'\n'.join(lines))

  def test_documents(self, tmp_path):
    self.write(tmp_path / 'a.jsonl', [
        json.dumps({'text': 'one \u2581', 'id': 7, 'title': 'T', 'n': 3}).encode(), b'',
        b'{"text": "bad \xff byte", "title": null}', b'{"text": ""}', b''])
    self.write(tmp_path / 'b.jsonl.gz', [b'{"text": "zipped", "id": "z"}'], gzip.open)
    source = JsonLines(f'{tmp_path}/*.jsonl*', metadata_fields=('n',))
    documents = list(source.documents())
    assert [d.id for d in documents] == ['7', 'a.jsonl:3', 'a.jsonl:4', 'z']
    assert [d.text for d in documents] == ['one \u2581', 'bad \ufffd byte', '', 'zipped']
    assert [d.title for d in documents] == ['T', '', '', '']
    assert documents[0].metadata == {'n': 3} and documents[3].metadata == {}
    assert (source.report.documents, source.report.empty, source.report.replaced) == (4, 1, 1)

  def test_other_fields(self, tmp_path):
    self.write(tmp_path / 'a.jsonl', [b'{"body": "words", "url": "u", "name": "n"}'])
    source = JsonLines(str(tmp_path / 'a.jsonl'), 'body', 'url', 'name')
    (document,) = source.documents()
    assert (document.id, document.text, document.title) == ('u', 'words', 'n')
    assert source.describe() != JsonLines(str(tmp_path / 'a.jsonl'), 'name').describe()

  def test_lone_surrogate_escape_survives_as_replacement(self, tmp_path):
    self.write(tmp_path / 'a.jsonl', [b'{"text": "a\\ud800b"}'])
    source = JsonLines(str(tmp_path / 'a.jsonl'))
    (document,) = source.documents()
    assert source.report.replaced == 1
    assert document.text.encode() == 'a\ufffdb'.encode()

  @pytest.mark.parametrize('line, message', [
      (b'{"text": ', 'not valid JSON'), (b'[1]', 'expected a JSON object, found list'),
      (b'{"txt": "x"}', "no such field.*did you mean 'txt'"), (b'{"text": 3}', 'found int')])
  def test_bad_line_is_named(self, tmp_path, line, message):
    self.write(tmp_path / 'a.jsonl', [b'{"text": "fine"}', b'', line])
    with pytest.raises(UserError, match=message) as error:
      list(JsonLines(str(tmp_path / 'a.jsonl')).documents())
    assert str(error.value).startswith(f'{tmp_path}/a.jsonl:3: ')
    one_line(error)

  def test_refusals(self, tmp_path):
    with pytest.raises(UserError, match='no file'):
      list(JsonLines(f'{tmp_path}/*.jsonl').documents())
    (tmp_path / 'a.jsonl').write_bytes(b'\n\n')
    with pytest.raises(UserError, match='no text in it'):
      list(JsonLines(f'{tmp_path}/*.jsonl').documents())
    (tmp_path / 'b.jsonl.gz').write_bytes(b'not zipped')
    with pytest.raises(UserError, match='cannot be read'):
      list(JsonLines(f'{tmp_path}/b.jsonl.gz').documents())


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

  def test_describe(self, tfds_folder):
    source = TfdsDocuments('small_texts', data_dir=tfds_folder)
    before = source.describe()
    assert json.loads(json.dumps(before)) == before == source.describe()
    path = source._builder().info.splits['train'].filepaths[1]
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
