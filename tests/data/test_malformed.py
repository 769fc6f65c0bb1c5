"""Every kind of malformed input of docs/corpus.md: taken as it says there, or refused by name.

BAD_LINES, ODD_LINES, BAD_FILES, ODD_FILES and ODD_TEXTS are tables; ODD_PATHS are functions
that make what stands in a folder besides a good file.
"""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from retro_jax.data.chunking import chunk_document
from retro_jax.data.corpus import JsonLines, TextFiles
from retro_jax.data.json_records import _DEEPEST
from retro_jax.errors import UserError
from retro_jax.retrieval import database_build
from tests import worlds

DOCS = Path(__file__).parents[2] / 'docs' / 'corpus.md'
GOOD = b'{"text": "good"}\n'
TITLE = 'T' * 10_000


def record(**fields):
  return json.dumps(fields).encode()


def nested(levels):
  return b'[' * levels + b'1' + b']' * levels


# kind: (one line of a .jsonl file, what the refusal says)
BAD_LINES = {
    'invalid JSON': (b'{"text": ', 'not valid JSON: Expecting value at column 11'),
    'two records on one line': (b'{"text": "a"} {"text": "b"}', 'is a line end missing'),
    'JSON array': (b'["text"]', 'expected a JSON object, found a list'),
    'JSON number': (b'7', 'found a number'),
    'JSON string': (b'"text"', 'found text'),
    'JSON null': (b'null', 'found null'),
    'NaN': (b'{"text": "a", "n": NaN}', 'NaN is no JSON number'),
    'Infinity': (b'{"text": "a", "n": -Infinity}', '-Infinity is no JSON number'),
    'deeply nested JSON': (b'{"text": "a", "n": ' + nested(100_000) + b'}', 'nested too deeply'),
    'integer of 5,000 digits': (b'{"text": "a", "id": ' + b'9' * 5000 + b'}',
                                'Exceeds the limit'),
    'missing text field': (b'{"id": "a"}', "field 'text', found no such field"),
    'misspelt text field': (b'{"txt": "a"}', "did you mean 'txt'.*set text_field"),
    'text null': (b'{"text": null}', "field 'text', found null"),
    'text number': (b'{"text": 7}', "field 'text', found a number"),
    'text list': (b'{"text": ["a"]}', "field 'text', found a list"),
    'id true or false': (b'{"text": "a", "id": true}', "field 'id', found true or false"),
    'id fraction': (b'{"text": "a", "id": 1.0}', "whole number in field 'id', found a number"),
    'id list': (b'{"text": "a", "id": [1]}', "field 'id', found a list"),
    'id object': (b'{"text": "a", "id": {}}', "field 'id', found an object"),
    'id empty': (b'{"text": "a", "id": ""}', "empty text in field 'id'"),
    'title list': (b'{"text": "a", "title": ["b"]}', "field 'title', found a list"),
    'metadata nested deeply': (b'{"text": "a", "m": ' + nested(_DEEPEST + 2) + b'}',
                               "field 'm' is nested more than 50 levels"),
    'metadata number too large': (b'{"text": "a", "m": [1e999]}', "number too large in field 'm'"),
    'NUL byte in a line': (b'{"text": "a\0b"}', 'Invalid control character'),
}

# kind: (one line, its document but for the place; None for no document)
ODD_LINES = {
    'blank line': (b' \t\r', None),
    'duplicate keys': (b'{"text": "a", "text": "b"}', {'text': 'b'}),
    'id number': (b'{"text": "a", "id": 7}', {'text': 'a', 'id': '7'}),
    'id null': (b'{"text": "a", "id": null}', {'text': 'a', 'id': 'a.jsonl:2'}),
    'id with slashes, quotes and line ends': (
        record(text='a', id='../x/"\'\n'), {'text': 'a', 'id': '../x/"\'\n'}),
    'id of 10,000 characters': (record(text='a', id=TITLE), {'text': 'a', 'id': TITLE}),
    'lone surrogate in an id': (
        b'{"text": "a", "id": "x\\udfff"}', {'text': 'a', 'id': 'x\ufffd'}),
    'title null': (b'{"text": "a", "title": null}', {'text': 'a', 'title': ''}),
    'title number': (b'{"text": "a", "title": 1984}', {'text': 'a', 'title': '1984'}),
    'metadata nested': (b'{"text": "a", "m": {"k": [1, {"\\ud800": "\\ud800"}]}}',
                        {'text': 'a', 'metadata': {'m': {'k': [1, {'\ufffd': '\ufffd'}]}}}),
    'Latin-1 bytes': ('{"text": "é"}'.encode('latin-1'), {'text': '\ufffd'}),
    'lone surrogate in a text': (b'{"text": "a\\ud800b"}', {'text': 'a\ufffdb'}),
    'escaped NUL': (b'{"text": "a\\u0000b"}', {'text': 'a\0b'}),
    'CRLF line end': (b'{"text": "a"}\r', {'text': 'a'}),
    'U+2028 in a line': ('{"text": "a\u2028b\x85"}'.encode(), {'text': 'a\u2028b\x85'}),
    'line of many MB': (record(text='word ' * 1_500_000), {'text': 'word ' * 1_500_000}),
    'empty document': (b'{"text": ""}', {'text': ''}),
}

# kind: (file name, bytes, place in the refusal, what it says, texts kept when skipping)
RANDOM = random.Random(0)
ZIPPED = gzip.compress(b''.join(record(text=f'{i} {RANDOM.randbytes(40).hex()}') + b'\n'
                                for i in range(2000)), mtime=0)
BAD_FILES = {
    'truncated gzip': ('a.jsonl.gz', ZIPPED[:-500], r':1\d\d\d', 'cut short or damaged', 1900),
    'gzip with a wrong checksum': (
        'a.jsonl.gz', ZIPPED[:-8] + b'\0\0\0\0' + ZIPPED[-4:], ':2001', 'CRC check failed', 2000),
    'gzip damaged in the middle': (
        'a.jsonl.gz', ZIPPED[:40_000] + b'\xff' * 300 + ZIPPED[40_300:], r':\d+',
        '(cut short or damaged|not valid JSON)', 700),
    'gzip with trailing garbage': (
        'a.jsonl.gz', ZIPPED + b'garbage', ':2001', 'Not a gzipped file', 2000),
    'no gzip in a .gz file': ('a.jsonl.gz', GOOD, '', 'holds no gzip data', 0),
    'UTF-16': ('a.jsonl', GOOD.decode().encode('utf-16'), '', 'is UTF-16 or UTF-32', 0),
    'CR line ends': ('a.jsonl', GOOD[:-1] + b'\r' + GOOD[:-1], ':1', 'line end missing', 0),
}

# kind: (file name, bytes, texts)
ODD_FILES = {
    'gzip without .gz in its name': ('a.jsonl', gzip.compress(GOOD * 2), ['good'] * 2),
    'gzip of several members': ('a.jsonl.gz', gzip.compress(GOOD) * 2, ['good'] * 2),
    'empty file': ('a.jsonl', b'', []),
    'empty .gz file': ('a.jsonl.gz', b'', []),
    'empty gzip': ('a.jsonl.gz', gzip.compress(b''), []),
    'only blank lines': ('a.jsonl', b'\n \n\r\n', []),
    'byte order mark': ('a.jsonl', b'\xef\xbb\xbf' + GOOD, ['good']),
    'last line without its end': ('a.jsonl', GOOD + GOOD[:-1], ['good'] * 2),
}

ODD_TEXTS = {
    'one-token document': 'x',
    'white space alone': ' \n\t\r\n\u00a0 ',
    'right-to-left text': 'שלום \u202eעולם\u202c مرحبا',
    'combining characters': 'e\u0301\u0302\u0303 n\u0303 \u0e33',
    'zero-width joiners': 'a\u200db\u200c\u2060\ufeff',
    'emoji sequences': '👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇺🇦',
    'control characters': '\0\x01\x7f\x1b[31m\x85',
}


def read(folder, **settings):
  source = JsonLines(f'{folder}/*', metadata_fields=('m',), **settings)
  return list(source.documents()), source.report


def refused(folder, place, message, **settings):
  """Refused in one line that begins with the file and the line."""
  with pytest.raises(UserError) as error:
    read(folder, **settings)
  assert re.match(f'{re.escape(str(folder))}/{place}: .*{message}', str(error.value))
  assert '\n' not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize('kind', BAD_LINES)
def test_bad_lines(tmp_path, kind):
  line, message = BAD_LINES[kind]
  (tmp_path / 'a.jsonl').write_bytes(GOOD + line + b'\n' + GOOD)
  refused(tmp_path, 'a.jsonl:2', message)
  documents, report = read(tmp_path, skip_bad_lines=True)
  assert [d.id for d in documents] == ['a.jsonl:1', 'a.jsonl:3']
  assert (report.documents, report.skipped, len(report.skipped_places)) == (2, 1, 1)
  assert '1 bad ones skipped' in str(report) and 'a.jsonl:2: ' in str(report)


@pytest.mark.parametrize('kind', ODD_LINES)
def test_odd_lines(tmp_path, kind):
  line, expected = ODD_LINES[kind]
  (tmp_path / 'a.jsonl').write_bytes(GOOD + line + b'\n' + GOOD)
  documents, report = read(tmp_path)
  assert [d.place for d in (documents[0], documents[-1])] == ['a.jsonl:1', 'a.jsonl:3']
  assert len(documents) == 2 + (expected is not None) and not report.skipped
  if expected is not None:
    document = documents[1]
    assert {name: getattr(document, name) for name in expected} == expected
    (document.id + document.title + json.dumps(document.metadata)).encode()
    assert report.replaced == ('\ufffd' in document.text)
    assert report.empty == (not document.text)


@pytest.mark.parametrize('kind', BAD_FILES)
def test_bad_files(tmp_path, kind):
  name, content, place, message, kept = BAD_FILES[kind]
  (tmp_path / name).write_bytes(content)
  (tmp_path / 'b.jsonl').write_bytes(GOOD)
  refused(tmp_path, re.escape(name) + place, message)
  documents, report = read(tmp_path, skip_bad_lines=True)
  assert len(documents) >= kept + 1 and documents[-1].text == 'good'
  assert [d.text.split()[0] for d in documents[:kept]] == [str(i) for i in range(kept)] or not kept
  assert report.documents == len(documents)
  assert report.skipped == 1 or kind == 'gzip damaged in the middle'  # that leaves bad lines too


@pytest.mark.parametrize('kind', ODD_FILES)
def test_odd_files(tmp_path, kind):
  name, content, texts = ODD_FILES[kind]
  (tmp_path / name).write_bytes(content)
  (tmp_path / 'b.jsonl').write_bytes(GOOD)
  documents, _ = read(tmp_path)
  assert [d.text for d in documents] == texts + ['good']


@pytest.mark.parametrize('kind', ODD_TEXTS)
def test_odd_texts_are_kept_byte_for_byte(tmp_path, kind):
  text = ODD_TEXTS[kind]
  (tmp_path / 'a.jsonl').write_bytes(record(text=text, id='one', title=text))
  ((document,), _) = read(tmp_path)
  assert document.text == document.title == text
  (tmp_path / 'a.jsonl').write_bytes(text.encode())
  (same,) = TextFiles(f'{tmp_path}/a.jsonl').documents()
  vocabulary = worlds.vocabulary()
  for t in (document.text, same.text):
    chunks = chunk_document(t, vocabulary, 4)
    assert vocabulary.decode_bytes(chunks.tokens.ravel().tolist()) == text.encode()
    assert chunks.text_bytes.sum() == len(text.encode())


def _folder(path):
  path.mkdir()


def _dangling(path):
  path.symlink_to(path.parent / 'nowhere')


def _circle(path):
  path.symlink_to(path)


def _unreadable(path):
  path.write_bytes(GOOD)
  path.chmod(0)


def _brackets(path):
  path.with_name('a[1].jsonl').write_bytes(b'{"text": "brackets"}')


# kind: (makes something at a path, what the refusal says or None for passed over)
ODD_PATHS = {
    'folder that matches': (_folder, None),
    'dangling symbolic link': (_dangling, 'is a symbolic link to nothing'),
    'symbolic links in a circle': (_circle, 'lead in a circle'),
    'named pipe': (os.mkfifo, 'is a pipe, socket or device'),
    'file without permission': (_unreadable, 'permission denied'),
}


@pytest.mark.parametrize('kind', ODD_PATHS)
def test_odd_paths(tmp_path, kind):
  make, message = ODD_PATHS[kind]
  (tmp_path / 'b.jsonl').write_bytes(GOOD)
  make(tmp_path / 'a.jsonl')
  nobody = kind == 'file without permission' and os.geteuid() == 0
  if nobody:  # root may read everything
    for folder in (tmp_path, *tmp_path.parents):
      # pytest-of-NAME, pytest-N and a worker's own; tmp_path's name begins like the test's.
      if folder.stat().st_uid == 0 and folder.name.startswith(('pytest-', 'popen-', 'test_')):
        folder.chmod(0o755)
    os.seteuid(65534)
  try:
    if message is None:
      assert [d.id for d in read(tmp_path)[0]] == ['b.jsonl:1']
    else:
      refused(tmp_path, 'a.jsonl', message)
      refused(tmp_path, 'a.jsonl', message, skip_bad_lines=True)  # that is for content alone
  finally:
    if nobody:
      os.seteuid(0)


def test_file_name_with_brackets(tmp_path):
  _brackets(tmp_path / 'a.jsonl')
  (tmp_path / 'a1.jsonl').write_bytes(GOOD)
  documents = list(JsonLines(f'{tmp_path}/a[1].jsonl').documents())
  assert [(d.id, d.text) for d in documents] == [('a[1].jsonl:1', 'brackets')]
  (tmp_path / 'a[1].jsonl').unlink()
  assert [d.id for d in JsonLines(f'{tmp_path}/a[1].jsonl').documents()] == ['a1.jsonl:1']


def test_no_file_matching(tmp_path):
  for pattern in ('*.jsonl', 'none.jsonl', 'no/**/*.jsonl'):
    with pytest.raises(UserError, match='no file of that name or pattern'):
      JsonLines(f'{tmp_path}/{pattern}').documents()
  with pytest.raises(UserError, match='is a folder, expected files'):
    JsonLines(str(tmp_path)).documents()


def test_file_name_that_is_no_utf8(tmp_path):
  for byte in (b'\xfe', b'\xff'):
    with open(os.fsencode(tmp_path) + b'/a' + byte + b'\n.txt', 'wb') as f:
      f.write(b'text')
  documents = list(TextFiles(f'{tmp_path}/*.txt').documents())
  assert [d.id for d in documents] == ['a\\xfe\n.txt', 'a\\xff\n.txt']
  Path(os.fsdecode(os.fsencode(tmp_path) + b'/a\xff\n.txt')).write_bytes(b'\xff\xfea\0')
  with pytest.raises(UserError, match=r'a\\udcff\\n.txt: is UTF-16') as error:
    list(TextFiles(f'{tmp_path}/*.txt').documents())
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('change, message', [
    (lambda path: path.unlink(), 'no such file'),
    (lambda path: path.write_bytes(GOOD * 3), 'was changed while it was being read')])
@pytest.mark.parametrize('source', [JsonLines, TextFiles])
def test_file_that_vanishes_or_changes(tmp_path, source, change, message):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(GOOD)
  (shard,) = source(str(path)).shards()
  change(path)
  for action in (shard.describe, lambda: list(shard.documents())):
    with pytest.raises(UserError, match=message) as error:
      action()
    assert str(error.value).startswith(f'{path}: ')


def test_file_that_changes_while_it_is_read(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(GOOD * 5)
  documents = JsonLines(str(path)).documents()
  next(documents)
  with open(path, 'ab') as f:
    f.write(GOOD)
  with pytest.raises(UserError, match='was changed while it was being read'):
    list(documents)


def test_text_files(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbftext\r\n\0\xff')
  (tmp_path / 'b.txt').write_bytes('text'.encode('utf-16'))
  (tmp_path / 'c.txt.gz').write_bytes(gzip.compress(b'zipped'))
  (tmp_path / 'd.txt.gz').write_bytes(gzip.compress(b'zipped')[:-3])
  with pytest.raises(UserError, match='b.txt: is UTF-16'):
    list(TextFiles(f'{tmp_path}/*').documents())
  source = TextFiles(f'{tmp_path}/*', skip_bad_files=True)
  assert [d.text for d in source.documents()] == ['text\r\n\0\ufffd', 'zipped']
  assert (source.report.skipped, source.report.replaced) == (2, 1)
  assert ['b.txt' in place for place in source.report.skipped_places] == [True, False]


def test_only_the_first_skipped_places_are_kept(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(GOOD + b'bad\n' * 1000)
  (tmp_path / 'b.jsonl').write_bytes(GOOD + b'bad\n' * 1000)
  _, report = read(tmp_path, skip_bad_lines=True)
  assert report.skipped == 2000 and len(report.skipped_places) == 5
  assert str(report).count('\n') == 0 and str(report).endswith('...)')


@pytest.mark.parametrize('names', [('a', 'a'), ('a', 'b')])
def test_duplicate_ids_within_and_across_files(tmp_path, names):
  for number, name in enumerate(names):
    with open(tmp_path / f'{name}.jsonl', 'ab') as f:
      f.write(record(text=f'text {number}', id='same') + b'\n')
  second = 'a.jsonl:2' if names == ('a', 'a') else 'b.jsonl:1'
  with pytest.raises(UserError, match=f"'same' comes twice, at a.jsonl:1 and {second};"):
    database_build.build_chunk_database(
        tmp_path / 'db', JsonLines(f'{tmp_path}/*.jsonl'), worlds.vocabulary())


MEASURE = '''
import resource, sys
from retro_jax.data.chunking import chunk_documents
from retro_jax.data.corpus import JsonLines
from retro_jax.data.vocabulary import Vocabulary
source, vocabulary = JsonLines(sys.argv[1]), Vocabulary.load(sys.argv[2])
texts = (document.text for document in source.documents())
size = sum(int(c.text_bytes.sum()) for c in chunk_documents(texts, vocabulary, 64))
seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime
# Not ru_maxrss, which is at least that of the process this one was forked from.
peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]
print(size, source.report.bytes, int(peak) >> 10, seconds)
'''


@pytest.mark.parametrize('unit', ['def return class None\n', 'x', '\u2581'])
def test_huge_document(tmp_path, unit):
  """Time and memory grow with the size alone, with or without places to cut."""
  peak, seconds = [], []
  for size in (1_500_000, 4_000_000):
    text = unit * (size // len(unit.encode()))
    with open(tmp_path / 'a.jsonl', 'w', encoding='utf-8') as f:
      json.dump({'text': text}, f, ensure_ascii=False)
    done = subprocess.run(
        [sys.executable, '-c', MEASURE, str(tmp_path / 'a.jsonl'), worlds.vocabulary().path],
        check=True, capture_output=True, text=True)
    there, read_bytes, megabytes, cpu = map(float, done.stdout.split())
    assert there == read_bytes == len(text.encode())
    peak.append(megabytes)
    seconds.append(cpu)
  assert peak[0] + (peak[1] - peak[0]) / 2.5 * 98.5 < 2048  # so that 100 MB takes less than 2 GiB
  assert seconds[1] < 5 * seconds[0]


def test_the_page_lists_every_kind():
  page = DOCS.read_text(encoding='utf-8')
  kinds = [*BAD_LINES, *ODD_LINES, *BAD_FILES, *ODD_FILES, *ODD_TEXTS, *ODD_PATHS]
  missing = [kind for kind in kinds if f'| {kind} |' not in page]
  assert not missing and len(set(kinds)) >= 40
