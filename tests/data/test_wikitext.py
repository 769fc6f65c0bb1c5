"""WikiText's articles and words, on files the test writes."""

import gzip

import pytest

from retro_jax.data.wikitext import WORDS, WikiText
from retro_jax.errors import UserError
from tests.data.test_corpus import check_shards

TEXT = '\n'.join((
    ' ',
    ' = Robert = ',
    ' ',
    ' Robert , an actor @-@ <unk> .',
    ' = = Career = = ',
    ' = = = 2000 – 2005 = = = ',
    ' x = 1 = y',
    ' = 1 rad / s = ',
    ' ',
    ' = 1999 – 2001 = ',
    ' A = B = C',
    ''))


def test_articles_begin_at_titles_and_nothing_is_lost(tmp_path):
  (tmp_path / 'a.txt').write_text(TEXT, encoding='utf-8')
  (tmp_path / 'b.txt.gz').write_bytes(gzip.compress(b'no title at all\n'))
  source = WikiText(f'{tmp_path}/*.txt*')
  check_shards(source)
  documents = list(source.documents())
  assert [d.title for d in documents] == ['Robert', '1999 – 2001', '']
  assert [d.id for d in documents] == ['a.txt:1', 'a.txt:10', 'b.txt.gz:1']
  assert documents[0].text + documents[1].text == TEXT
  # Line by line, with the line's end: 1, 4, 1, 8, 6, 10, 6, 7, 1 | 6, 6 | 5.
  assert [d.metadata[WORDS] for d in documents] == [44, 12, 5]
  assert sum(d.metadata[WORDS] for d in documents[:2]) == len(TEXT.split()) + TEXT.count('\n')


def test_a_copy_without_empty_lines(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_bytes(b' = A = \r\n text \r\n = B b = \r\n = = C = = \r\n')
  documents = list(WikiText(str(path)).documents())
  assert [(d.title, d.metadata[WORDS]) for d in documents] == [('A', 6), ('B b', 11)]


def test_other_content_is_another_corpus(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text(TEXT, encoding='utf-8')
  before = WikiText(str(path)).describe()
  path.write_text(TEXT + ' more\n', encoding='utf-8')
  assert WikiText(str(path)).describe() != before


def test_nothing_there(tmp_path):
  with pytest.raises(UserError, match='no.txt'):
    list(WikiText(f'{tmp_path}/no.txt').documents())
