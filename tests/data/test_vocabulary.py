"""Round trips, reserved ids, determinism and refusals of the vocabulary."""

import random
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece

from retro_jax import files
from retro_jax.data.vocabulary import Vocabulary, clean_text, train_vocabulary
from retro_jax.errors import UserError

SAMPLE = [
    'def add(first, second):\n    """Adds two numbers."""\n    return first + second\n\n\n' * 3,
    'class Number:\n\n  def __init__(self, value):\n    self.value = value\n' * 3,
    'if value <= 0:\n\traise ValueError("expected a positive value, got %d" % value)\r\n' * 3,
]
SPECIAL = ['', ' ', '\0', 'a\0b\0', '\u2581', ' \u2581\u2581 a\u2581', '\u2585', '\u2047',
           '<s>', '</s>', '<pad>', '<unk>', 'a<s>b</s><pad> <unk>', '<0x41><0x0A>', '\r\n', '\r',
           '\n' * 7, ' ' * 33, '\t \t\t\n\t', '😀👩‍👩‍👧 日本語', 'e\u0301 \ufb01 \u00a0\u3000',
           '\ufeffx', '\x7f\x1f\x85\u2028', 'x' * 5000]


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  return train_vocabulary(SAMPLE, tmp_path_factory.mktemp('vocabulary') / 'v.model', 360)


def exact(vocabulary, text):
  ids = vocabulary.encode(text)
  assert vocabulary.decode_bytes(ids) == text.encode()
  assert vocabulary.decode(ids) == text
  assert not set(ids) & {0, 1, 2, 3}
  assert vocabulary.token_bytes[ids].sum() == len(text.encode())
  return ids


@pytest.mark.parametrize('text', SPECIAL)
def test_special_texts_round_trip(vocabulary, text):
  exact(vocabulary, text)


PARTS = st.sampled_from(SPECIAL + SAMPLE[0].split(' ') + [c for c in ' \n\r\t\0\u2581<>/s'])


@hypothesis.given(st.one_of(st.text(), st.lists(PARTS).map(''.join)))
@hypothesis.settings(deadline=None, max_examples=200)
def test_any_text_round_trips(vocabulary, text):
  exact(vocabulary, text)


@hypothesis.given(st.lists(st.one_of(st.text(max_size=20), PARTS), max_size=6))
@hypothesis.settings(deadline=None, max_examples=50)
def test_batches_equal_single_texts(vocabulary, texts):
  assert vocabulary.encode_batch(texts) == [vocabulary.encode(t) for t in texts]


LETTERS = st.text(' \n\tvaluedefirst+(_:\u2581\0é😀', max_size=40)


@hypothesis.given(st.lists(st.one_of(LETTERS, PARTS), max_size=8).map(''.join),
                  st.integers(1, 5))
@hypothesis.settings(deadline=None, max_examples=300)
def test_ids_of_pieces_are_those_of_the_whole(vocabulary, text, size):
  whole = [sentencepiece.SentencePieceProcessor(model_file=vocabulary.path).encode(part)
           for part in text.split('\u2581')]
  expected = whole[0]
  for ids in whole[1:]:
    expected = expected + [vocabulary._byte_ids[bytes([b])] for b in '\u2581'.encode()] + ids
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('retro_jax.data.vocabulary._PIECE_CHARACTERS', size)
    patch.setattr('retro_jax.data.vocabulary._CHARACTERS_AT_ONCE', size * 3)
    assert vocabulary.encode(text) == expected


@hypothesis.given(st.text('value \u2581', max_size=60), st.integers(1, 5))
def test_forced_cuts_keep_the_bytes(vocabulary, text, size):
  with pytest.MonkeyPatch.context() as patch:
    for name in ('_PIECE_CHARACTERS', '_LONGEST_PIECE'):
      patch.setattr(f'retro_jax.data.vocabulary.{name}', size)
    exact(vocabulary, text)


def test_pieces_are_cut_where_no_token_can_span(vocabulary):
  text = SAMPLE[0] * 200
  parts = [part.text for part in vocabulary._parts([text])]
  assert len(parts) > 3 and ''.join(parts) == text
  assert all(4096 <= len(part) < 4200 for part in parts[:-1])
  assert [i for part in parts for i in vocabulary.encode(part)] == vocabulary.encode(text)


def test_arrays(vocabulary):
  rows = vocabulary.encode_arrays(['', 'value', '\u2581'])
  assert [row.dtype for row in rows] == [np.int32] * 3
  assert [len(row) for row in rows] == [0, len(vocabulary.encode('value')), 3]
  assert vocabulary.encode_arrays([]) == []


def test_a_remote_model_is_the_same(vocabulary):
  files.write_bytes('ram://models/v.model', files.read_bytes(vocabulary.path))
  assert Vocabulary.load('ram://models/v.model').fingerprint == vocabulary.fingerprint


def test_lone_surrogates_are_replaced(vocabulary):
  assert clean_text('a\ud800b\udfff') == 'a\ufffdb\ufffd'
  assert vocabulary.decode(vocabulary.encode('a\ud800b')) == 'a\ufffdb'


def test_layout_is_one_token_each(vocabulary):
  assert len(vocabulary.encode('\n    ')) == 1
  assert len(vocabulary.encode('\n\n')) == 1
  assert len(vocabulary.encode('\t')) == 1


def test_special_ids_stand_for_no_bytes(vocabulary):
  assert (vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id) == (0, 1, 2)
  assert vocabulary.size == 360 and vocabulary.token_bytes.shape == (360,)
  assert vocabulary.token_bytes.dtype == np.int32
  assert not vocabulary.token_bytes[:4].any() and (vocabulary.token_bytes[4:] > 0).all()
  ids = vocabulary.encode('value')
  assert vocabulary.decode([1, *ids, 2, 0, 0]) == 'value'


def test_a_character_cut_in_two_decodes_to_replacement(vocabulary):
  ids = vocabulary.encode('😀')
  assert len(ids) == 4
  assert vocabulary.decode(ids[:2]) == '\ufffd'
  assert vocabulary.decode_bytes(ids[:2]) + vocabulary.decode_bytes(ids[2:]) == '😀'.encode()


def test_training_is_deterministic_across_processes(vocabulary, tmp_path):
  again = train_vocabulary(SAMPLE, tmp_path / 'again.model', 360)
  assert again.fingerprint == vocabulary.fingerprint
  script = ('import sys; from retro_jax.data.vocabulary import train_vocabulary as t; '
            f't({SAMPLE!r}, sys.argv[1], 360)')
  subprocess.run([sys.executable, '-c', script, str(tmp_path / 'other.model')], check=True)
  assert (tmp_path / 'other.model').read_bytes() == (tmp_path / 'again.model').read_bytes()
  other = train_vocabulary(SAMPLE, tmp_path / 'smaller.model', 350)
  assert other.fingerprint != vocabulary.fingerprint


def test_sample_respects_budget_and_seed(tmp_path):
  rng = random.Random(0)
  texts = [' '.join(''.join(rng.choices('abcdefgh', k=6)) for _ in range(5)) * 20
           for _ in range(6)]
  train = lambda **settings: train_vocabulary(texts, tmp_path / 'v.model', 300, **settings)
  prints = {train(seed=s, sample_bytes=1500).fingerprint for s in range(4)}
  assert len(prints) > 1
  whole = train(seed=0).fingerprint
  assert whole == train(seed=1).fingerprint and whole not in prints


def test_very_long_lines_train(tmp_path):
  line = ' '.join(f'unmistakable{i}' for i in range(20_000))
  v = train_vocabulary([line], tmp_path / 'v.model', 340)
  assert len(v.encode('unmistakable')) == 1
  exact(v, line)


def test_seqio_vocabulary_agrees(vocabulary):
  wrapped = vocabulary.seqio()
  text = 'def add(first):\n    return first\n'
  assert list(wrapped.encode(text)) == vocabulary.encode(text)
  assert wrapped.decode(vocabulary.encode(text)) == text
  assert wrapped.vocab_size == vocabulary.size


def test_refusals(tmp_path, vocabulary):
  with pytest.raises(UserError, match='no vocabulary there'):
    Vocabulary.load(tmp_path / 'none.model')
  (tmp_path / 'text.model').write_text('not a model')
  for content in (b'not a model', b''):
    (tmp_path / 'text.model').write_bytes(content)
    with pytest.raises(UserError, match='not a SentencePiece model|pad id|byte'):
      Vocabulary.load(tmp_path / 'text.model')
  with pytest.raises(UserError, match='no text'):
    train_vocabulary(['', ' \n'], tmp_path / 'new.model', 360)
  for size in (10, 100_000):
    with pytest.raises(UserError, match='another vocab_size'):
      train_vocabulary(SAMPLE, tmp_path / 'new.model', size)
  assert not (tmp_path / 'new.model').exists()
  assert vocabulary.fingerprint == Vocabulary.load(vocabulary.path).fingerprint


@pytest.mark.parametrize('setting, message', [
    (dict(pad_id=-1), 'pad id'), (dict(pad_id=0, bos_id=-1, eos_id=1, unk_id=2), 'bos'),
    (dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, byte_fallback=False), 'byte_fallback'),
    (dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, add_dummy_prefix=True), 'changes text'),
    (dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, normalization_rule_name='nmt_nfkc'),
     'changes text')])
def test_unfit_models_are_refused(tmp_path, setting, message):
  options = dict(vocab_size=320, model_type='bpe', byte_fallback=True, add_dummy_prefix=False,
                 remove_extra_whitespaces=False, normalization_rule_name='identity',
                 minloglevel=2)
  if not setting.get('byte_fallback', True):
    options['vocab_size'] = 60
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(SAMPLE), model_prefix=str(tmp_path / 'm'), **(options | setting))
  with pytest.raises(UserError, match=message) as error:
    Vocabulary.load(tmp_path / 'm.model')
  assert '\n' not in str(error.value)
