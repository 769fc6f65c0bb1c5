"""Tokenizers of public models: exact bytes, the same ids, and what is refused."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from retro_jax.data import chunking
from retro_jax.data.public_vocabulary import pack
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.errors import UserError
from tests import public_models
from tests.data.test_vocabulary import PARTS, SPECIAL

KINDS = {'byte_level': (0, 1), 'metaspace': (1, 2)}  # bos and eos
SPELLED = ['<|begin|>', 'a<|end|>b', '<s></s><unk>', '<0x41>', ' <0x20> ']


@pytest.fixture(scope='module', params=KINDS)
def vocabulary(request, tmp_path_factory):
  path = tmp_path_factory.mktemp('vocabulary') / 'vocabulary.model'
  path.write_bytes(pack(public_models.tokenizer(request.param), *KINDS[request.param]))
  made = Vocabulary.load(path)
  made.kind = request.param
  return made


def exact(vocabulary, text):
  ids = vocabulary.encode(text)
  assert vocabulary.decode_bytes(ids) == text.encode() and vocabulary.decode(ids) == text
  assert not set(ids) & {vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id}
  assert vocabulary.token_bytes[ids].sum() == len(text.encode())
  assert all(vocabulary.token_bytes[i] > 0 for i in ids)
  return ids


@pytest.mark.parametrize('text', SPECIAL + SPELLED)
def test_special_texts_round_trip(vocabulary, text):
  exact(vocabulary, text)


@hypothesis.given(st.one_of(st.text(), st.lists(PARTS).map(''.join)))
@hypothesis.settings(deadline=None, max_examples=100)
def test_any_text_round_trips(vocabulary, text):
  exact(vocabulary, text)


@hypothesis.given(st.lists(st.one_of(st.text(max_size=20), PARTS), max_size=6))
@hypothesis.settings(deadline=None, max_examples=30)
def test_batches_equal_single_texts(vocabulary, texts):
  assert vocabulary.encode_batch(texts) == [vocabulary.encode(t) for t in texts]


def test_ids_are_the_tokenizers_own_plus_one(vocabulary):
  theirs = tokenizers.Tokenizer.from_str(public_models.tokenizer(vocabulary.kind))
  text = 'def return self  import\n class None'
  expected = theirs.encode(text).ids
  found = [i - 1 for i in exact(vocabulary, text)]
  if vocabulary.kind == 'metaspace':  # which puts a space before the first word
    assert found != expected
    found = [i - 1 for i in exact(vocabulary, ' ' + text)]
  assert found == expected
  assert max(len(vocabulary.piece(i)) for i in vocabulary.encode(text)) > 1  # words, not bytes


def test_chunks_have_the_documents_bytes(vocabulary):
  text = 'def return\n  self 🙂 import' * 9
  chunks = chunking.chunk_document(text, vocabulary, 8)
  assert chunks.text_bytes.sum() == len(text.encode())
  assert chunks.tokens[0, 0] == vocabulary.bos_id
  assert chunks.tokens.reshape(-1)[chunks.valid_length.sum() - 1] == vocabulary.eos_id
  assert vocabulary.decode(np.concatenate(chunks.tokens)) == text


def test_one_special_token_may_begin_and_end(tmp_path):
  (tmp_path / 'v').write_bytes(pack(public_models.tokenizer(), 1, 1))
  vocabulary = Vocabulary.load(tmp_path / 'v')
  assert vocabulary.bos_id == vocabulary.eos_id == 2
  assert vocabulary.size == public_models.VOCABULARY + 1
  assert vocabulary.piece(0) == '<pad>' and vocabulary.piece(2) == '<|end|>'


@pytest.mark.parametrize('change, message', [
    (lambda t: t['model'].update(type='WordPiece'), "model.type 'WordPiece', expected 'BPE'"),
    (lambda t: t['model'].update(end_of_word_suffix='</w>'), 'end_of_word_suffix'),
    (lambda t: t.update(pre_tokenizer=None), 'neither byte-level nor has model.byte_fallback'),
    (lambda t: t['model']['vocab'].pop('\u0100'), '255 of its tokens are single bytes')])
def test_tokenizers_without_exact_bytes_are_refused(tmp_path, change, message):
  settings = json.loads(public_models.tokenizer())
  change(settings)
  (tmp_path / 'v').write_bytes(pack(json.dumps(settings), 0, 1))
  with pytest.raises(UserError, match=message) as error:
    Vocabulary.load(tmp_path / 'v')
  assert '\n' not in str(error.value)


def test_other_json_is_no_vocabulary(tmp_path):
  (tmp_path / 'v').write_text(public_models.tokenizer())
  with pytest.raises(UserError, match='tools/import_checkpoint.py'):
    Vocabulary.load(tmp_path / 'v')
