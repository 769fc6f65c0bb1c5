"""Chunks against a loop over the token row, and their bytes against the text's."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from retro_jax.data.chunking import chunk_document, chunk_documents
from retro_jax.data.corpus import decode_utf8
from retro_jax.data.vocabulary import train_vocabulary
from retro_jax.errors import UserError

TEXTS = ['', 'x', '\n', '\0', '😀', '😀👩‍👩‍👧 emoji\n', '日本語のテキスト。', 'plain text with words\n' * 9,
         'a\u2581b </s> <s>\r\n', '\ufffd\ufffd']


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  texts = ['plain text with words, and more text\n    indented words\n' * 5]
  return train_vocabulary(texts, tmp_path_factory.mktemp('vocabulary') / 'v.model', 330)


def check(chunks, text, vocabulary, chunk_length):
  """Compares with a plain loop."""
  row = [1, *vocabulary.encode(text), 2] if text else []
  expected = []
  while row:
    head, row = row[:chunk_length], row[chunk_length:]
    expected.append((head + [0] * (chunk_length - len(head)), len(head),
                     len(vocabulary.decode_bytes(head))))
  assert chunks.tokens.shape == (len(expected), chunk_length) == (len(chunks), chunk_length)
  assert chunks.tokens.tolist() == [tokens for tokens, _, _ in expected]
  assert chunks.valid_length.tolist() == [length for _, length, _ in expected]
  assert chunks.text_bytes.tolist() == [size for _, _, size in expected]
  for column in (chunks.tokens, chunks.valid_length, chunks.text_bytes):
    assert column.dtype == np.int32
  assert chunks.text_bytes.sum() == len(text.encode())
  assert vocabulary.decode(chunks.tokens.ravel().tolist()) == text
  assert b''.join(vocabulary.decode_bytes(c) for c in chunks.tokens) == text.encode()
  assert (np.asarray(chunks.tokens == 0).sum()
          == chunk_length * len(chunks) - chunks.valid_length.sum())


@pytest.mark.parametrize('chunk_length', [1, 2, 7, 64])
@pytest.mark.parametrize('text', TEXTS)
def test_chunks_of_special_documents(vocabulary, text, chunk_length):
  check(chunk_document(text, vocabulary, chunk_length), text, vocabulary, chunk_length)


@hypothesis.given(st.one_of(st.text(), st.lists(st.sampled_from(TEXTS)).map(''.join)),
                  st.integers(1, 20))
@hypothesis.settings(deadline=None, max_examples=150)
def test_chunks_add_up(vocabulary, text, chunk_length):
  check(chunk_document(text, vocabulary, chunk_length), text, vocabulary, chunk_length)


@hypothesis.given(st.binary(max_size=60))
@hypothesis.settings(deadline=None, max_examples=100)
def test_any_bytes_add_up_after_replacement(vocabulary, data):
  text, replaced = decode_utf8(data)
  assert replaced == (text.encode() != data)
  check(chunk_document(text, vocabulary, 4), text, vocabulary, 4)


def test_exactly_full_last_chunk(vocabulary):
  length = len(vocabulary.encode('plain text'))
  chunks = chunk_document('plain text', vocabulary, length + 2)
  assert len(chunks) == 1 and chunks.valid_length.tolist() == [length + 2]


def test_many_documents_equal_one_by_one(vocabulary, monkeypatch):
  monkeypatch.setattr('retro_jax.data.chunking._BATCH_DOCUMENTS', 3)
  many = list(chunk_documents(iter(TEXTS), vocabulary, 5))
  assert len(many) == len(TEXTS)
  for chunks, text in zip(many, TEXTS):
    check(chunks, text, vocabulary, 5)


def test_chunk_length_must_be_positive(vocabulary):
  with pytest.raises(UserError, match='chunk_length'):
    chunk_document('x', vocabulary, 0)
