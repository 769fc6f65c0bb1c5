"""Each source of documents on inputs the test writes itself."""

import gzip
import json
import os
import pickle
import shutil

import pytest

from retro_jax import files, storage
from retro_jax.data.corpus import JsonLines, TextFiles
from retro_jax.data.input_files import find_files
from retro_jax.errors import UserError


def one_line(error):
  assert '\n' not in str(error.value)


def check_shards(source):
  """Shards survive pickling and add up to the source; returns them."""
  whole = list(source.documents())
  shards = pickle.loads(pickle.dumps(source.shards()))
  assert shards == source.shards()
  assert [d for shard in shards for d in shard.documents()] == whole
  assert len({shard.name for shard in shards}) == len(shards)
  for count in ('documents', 'bytes', 'empty', 'replaced', 'skipped'):
    assert sum(getattr(shard.report, count) for shard in shards) == getattr(source.report, count)
  for shard in shards:
    assert json.loads(json.dumps(shard.describe())) == shard.describe() and shard.weight > 0
  return shards


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

  def test_shards_are_consecutive_files(self, tmp_path, monkeypatch):
    monkeypatch.setattr('retro_jax.data.corpus._SHARD_FILES', 4)
    monkeypatch.setattr('retro_jax.data.corpus._SHARD_BYTES', 30)
    monkeypatch.setattr('retro_jax.data.corpus._FILES_TO_BORDER', 5)
    for i in range(40):
      (tmp_path / f'{i:02d}.txt').write_text('x' * (1 + i % 17))
    (tmp_path / '20.txt').write_text('larger than a shard may be by a good deal')
    source = TextFiles(f'{tmp_path}/*.txt')
    shards = check_shards(source)
    assert len(shards) > 10
    assert all(shard.weight <= 30 or len(shard.files) == 1 for shard in shards)
    # A new file changes few shards: the others are as they were.
    before = [shard.describe() for shard in shards]
    (tmp_path / '05b.txt').write_text('new')
    after = [shard.describe() for shard in source.shards()]
    assert before[-8:] == after[-8:] and before != after

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
      (b'{"text": ', 'not valid JSON'), (b'[1]', 'expected a JSON object, found a list'),
      (b'{"txt": "x"}', "no such field.*did you mean 'txt'"), (b'{"text": 3}', 'found a number')])
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
    with pytest.raises(UserError, match='holds no gzip data'):
      list(JsonLines(f'{tmp_path}/b.jsonl.gz').documents())

  def test_shards_are_files(self, tmp_path):
    for name in 'bca':
      self.write(tmp_path / f'{name}.jsonl', [
          b'{"text": "%s"}' % name.encode(), b'{"text": ""}',
          b'{"text": "x", "id": "%d"}' % ord(name)])
    source = JsonLines(f'{tmp_path}/*.jsonl', metadata_fields=['n'])
    shards = check_shards(source)
    assert [shard.name for shard in shards] == ['a.jsonl', 'b.jsonl', 'c.jsonl']
    places = [d.place for d in shards[1].documents()]
    assert places == ['b.jsonl:1', 'b.jsonl:2', 'b.jsonl:3']
    before = [shard.describe() for shard in shards]
    (tmp_path / 'b.jsonl').write_text('{"text": "changed"}')
    after = [shard.describe() for shard in source.shards()]
    assert [x == y for x, y in zip(before, after)] == [True, False, True]
    (tmp_path / 'b.jsonl').rename(tmp_path / 'd.jsonl')  # ids hold the name
    assert [shard.describe() for shard in source.shards()][2] != after[1]

  def test_settings_change_the_description(self, tmp_path):
    self.write(tmp_path / 'a.jsonl', [b'{"text": "x"}'])
    path = str(tmp_path / 'a.jsonl')
    sources = [JsonLines(path), JsonLines(path, 't'), JsonLines(path, id_field='i'),
               JsonLines(path, title_field='t'), JsonLines(path, metadata_fields=('m',)),
               JsonLines(path, skip_bad_lines=True)]
    for described in ([s.describe() for s in sources],
                      [s.shards()[0].describe() for s in sources]):
      assert len({json.dumps(d) for d in described}) == len(sources)

  def test_a_moved_corpus_is_the_same(self, tmp_path):
    (tmp_path / 'here').mkdir()
    self.write(tmp_path / 'here' / 'a.jsonl', [b'{"text": "x"}'])
    (tmp_path / 'here' / 'b.txt').write_text('text')
    both = lambda folder: [JsonLines(f'{tmp_path}/{folder}/*.jsonl').describe(),
                           TextFiles(f'{tmp_path}/{folder}/*.txt').describe()]
    before = both('here')
    shutil.copytree(tmp_path / 'here', tmp_path / 'there', copy_function=shutil.copyfile)
    assert both('there') == before

  def test_a_bucket_gives_what_a_disk_gives(self, tmp_path):
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    for name, data in (('a.jsonl', lines), ('b.jsonl.gz', gzip.compress(lines))):
      files.write_bytes(tmp_path / 'in' / name, data)
      files.write_bytes(f'ram://corpus/in/{name}', data)
    disk, bucket = JsonLines(f'{tmp_path}/in/*.jsonl*'), JsonLines('ram://corpus/in/*.jsonl*')
    assert list(disk.documents()) == list(bucket.documents())
    assert disk.describe() == bucket.describe()
    check_shards(bucket)


class TestInputFiles:

  @pytest.fixture
  def large(self, tmp_path, monkeypatch):
    """A file that counts as large, settled, with a cache of its own."""
    monkeypatch.setenv('RETRO_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr('retro_jax.data.input_files._LARGE_BYTES', 4)
    monkeypatch.setattr('retro_jax.data.input_files._SETTLED_NS', -1)
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'a.txt').write_text('some text')
    return tmp_path / 'in' / 'a.txt'

  def remembered(self, path):
    return sorted((path.parent.parent / 'cache' / 'checksums').glob('*'))

  def checksum(self, path):
    (file,) = find_files(str(path))
    return file.checksum()

  def test_checksums_of_large_files_are_remembered(self, large):
    first = self.checksum(large)
    assert first == storage.file_checksum(large)
    (entry,) = self.remembered(large)
    entry.write_text('f' * 64)
    assert self.checksum(large) == 'f' * 64  # not read again
    entry.write_text('cut sh')
    assert self.checksum(large) == first

  def test_another_content_of_the_same_size_and_time_is_noticed(self, large):
    first, status = self.checksum(large), os.stat(large)
    large.write_text('same size')
    os.utime(large, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert self.checksum(large) == storage.file_checksum(large) != first

  def test_what_was_just_written_is_not_remembered(self, large, monkeypatch):
    monkeypatch.setattr('retro_jax.data.input_files._SETTLED_NS', 10**12)
    self.checksum(large)
    assert not self.remembered(large)

  def test_no_cache_is_no_error(self, large, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('RETRO_JAX_CACHE', str(tmp_path / 'file' / 'cache'))
    assert self.checksum(large) == storage.file_checksum(large)

  def test_large_remote_files_are_told_by_size_and_time(self, large):
    files.write_bytes('ram://large/a.txt', b'some text')
    first = self.checksum('ram://large/a.txt')
    assert first == self.checksum('ram://large/a.txt') and '9 bytes' in first
    files.write_bytes('ram://large/a.txt', b'some other text')
    assert self.checksum('ram://large/a.txt') != first
