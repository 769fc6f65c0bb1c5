"""The fast tokenizer gives the ids of the tokenizers library, whatever the text."""

import functools
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.retrieval.embedders import BertEmbedder
from retro_jax.retrieval.word_pieces import WordPieces, is_plain_bert

NASTY = [
    '', ' ', '\n\n', '漢字かな交じり文', '漢a字', 'cafe\u0301 café CAFÉ', 'a\u0323\u0307b\u0307\u0323',
    'nul\x00inside\x01\x7f', 'a\u200bb\u200dc\u200e', '👩‍👩‍👧‍👦🙂 ok', 'a' * 100, 'a' * 101 + ' b',
    'é' * 51, '한' * 33 + ' ' + '한' * 34, 'İstanbul ŞIĞ', 'straße ﬁne x² ½ … №', 'ς Σ ΟΔΟΣ ᾶ',
    'full ＷＩＤＴＨ', '[SEP] [CLS]x[MASK] [pad] [PAD]', 'don\'t-stop_me.now!?', 'שָׁלוֹם عَرَبِيّ',
    'हिन्दी ไทย', 'a\u2028b\u2029c\u1680d\xa0e\u3000f', '\ufffd\ufeffa\xad', '\ue000\U00010000\U0010ffff',
    'x\u115f\u1160y', '\x1c\x1d\x1e\x1f\x85', '##ing ## #', 'a\tb\r\nc', 'ひ゛ ゜', '\u0f71\u0f72\u0f74ཀ']


@functools.cache
def library(lowercase=True):
  tokenizer = tokenizers.Tokenizer.from_str(BertEmbedder()._tokenizer.to_str())
  tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
  tokenizer.no_truncation()
  return tokenizer


@functools.cache
def fast(lowercase=True, max_length=256):
  return WordPieces(library(lowercase), max_length)


def slow_rows(texts, lowercase=True, max_length=256):
  """The library, one text at a time; cut to max_length, the last special token kept."""
  rows = [library(lowercase).encode(text).ids for text in texts]
  return [row if len(row) <= max_length else [*row[:max_length - 1], row[-1]] for row in rows]


def check(texts, *settings_):
  rows = fast(*settings_).encode(texts)
  assert all(row.dtype == np.int32 for row in rows)
  assert [row.tolist() for row in rows] == slow_rows(texts, *settings_)


@pytest.mark.parametrize('lowercase', [True, False])
@pytest.mark.parametrize('max_length', [3, 8, 256])
def test_nasty_texts(lowercase, max_length):
  check(NASTY, lowercase, max_length)
  check([text * 3 for text in NASTY], lowercase, max_length)
  check([], lowercase, max_length)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text(st.characters(exclude_categories=['Cs']), max_size=30), max_size=4),
       st.booleans())
def test_arbitrary_unicode(texts, lowercase):
  check(texts, lowercase)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text(st.characters(max_codepoint=0x2fff, exclude_categories=['Cs']),
                        max_size=60), max_size=4), st.booleans())
def test_arbitrary_text_of_alphabets(texts, lowercase):
  check(texts, lowercase)


@pytest.mark.parametrize('lowercase', [True, False])
def test_every_character_of_the_basic_plane(lowercase):
  """Between letters, where each difference of normalising, dropping or splitting shows."""
  points = [point for point in range(0x10000) if not 0xd800 <= point < 0xe000]
  sample = points[:0x800] + points[0x800::7]
  texts = [f'z{chr(point)}Q' for point in sample]
  odd = set(fast(lowercase).may_differ(texts).tolist())
  # The routed ones would agree by construction.
  texts = [text for i, text in enumerate(texts) if i not in odd]
  assert len(texts) > len(sample) // 2
  assert [row.tolist() for row in fast(lowercase).encode(texts)] == [
      row.ids for row in library(lowercase).encode_batch(texts)]


def test_little_of_ordinary_text_goes_to_the_library():
  texts = ['It was “the best of times”, Dickens wrote – in 1859 – of Paris & London.',
           'Zürich, São Paulo, Łódź, Ελλάδα, Москва, 東京'] * 10
  assert not fast().may_differ(texts).size
  assert fast().may_differ([*texts, 'x²', *texts, '[SEP]', 'a' * 200]).tolist() == [20, 41, 42]


def test_other_tokenizers_are_refused():
  def changed(change):
    tokenizer = tokenizers.Tokenizer.from_str(library().to_str())
    change(tokenizer)
    return is_plain_bert(tokenizer)
  bert = tokenizers.normalizers.BertNormalizer
  assert changed(lambda t: None)
  assert changed(lambda t: setattr(t, 'normalizer', bert(lowercase=True, strip_accents=True)))
  for change in (
      lambda t: setattr(t, 'normalizer', bert(lowercase=True, strip_accents=False)),
      lambda t: setattr(t, 'normalizer', bert(clean_text=False)),
      lambda t: setattr(t, 'normalizer', tokenizers.normalizers.NFC()),
      lambda t: setattr(t, 'pre_tokenizer', tokenizers.pre_tokenizers.Whitespace()),
      lambda t: setattr(t.model, 'max_input_chars_per_word', 50),
      lambda t: setattr(t.model, 'continuing_subword_prefix', '@@'),
      lambda t: t.add_tokens(['retro']),
      lambda t: setattr(t, 'post_processor', tokenizers.processors.TemplateProcessing(
          single='[CLS] [CLS] $A', special_tokens=[('[CLS]', 101)])),
      lambda t: setattr(t, 'post_processor', tokenizers.processors.TemplateProcessing(
          single='$A [SEP] [SEP]', special_tokens=[('[SEP]', 102)]))):
    assert not changed(change)


def test_embedder_takes_the_fast_way_for_many_texts_and_gives_the_same_ids():
  embedder = BertEmbedder(max_length=16)
  texts = (NASTY + ['\ud800 lone']) * 80
  many = embedder._word_pieces(texts)
  assert 'tensorflow_text' in sys.modules and isinstance(many[0], np.ndarray)
  few = embedder._word_pieces(texts[:len(NASTY) + 1])
  assert isinstance(few[0], list)
  assert [row.tolist() for row in many] == few * 80
