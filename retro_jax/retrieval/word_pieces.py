"""BERT word pieces several times faster than the tokenizers library, and the same ids.

tensorflow_text's FastBertTokenizer does the work. It differs from the library, which every
checkpoint was trained with, in few places, and texts with one of those go to the library:

* characters that it folds by compatibility (NFKC: ligatures, superscripts, full-width
  letters, the eszett), where BERT only decomposes (NFD) and lower-cases;
* control, format, private and unassigned characters, and those assigned after Unicode 3.2,
  where the two follow different tables;
* words that may exceed the hundred characters after which a word is unknown;
* special tokens spelled out in the text, such as [SEP].

Which embedders use it is the business of embedders.py.
"""

import functools
import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

# After decomposition a character is at most three that are no accents: 99 in a word.
_LONGEST_WORD = 33
# A word of that length never exceeds so many bytes: this limit of FastBert is never met.
_MOST_BYTES = 1000
_SPACES = np.array([9, 10, 13, 32], np.uint32)
_BEYOND = 0x10000
# Fillers and the replacement character, which one of the two drops. (The Ogham space, below,
# has a mark of its own and is no space to one of them; spaces beyond ASCII are left as they
# are where case is kept.)
_DROPPED = '\u115f\u1160\ufffd'


class WordPieces:
  """Ids of texts as a plain BERT tokenizer gives them, specials included.

  Args:
    tokenizer: a `tokenizers.Tokenizer` that `is_plain_bert`; its truncation and padding are
      not looked at.
    max_length: longest row of ids, specials included; the rest of a text is cut off.
  """

  def __init__(self, tokenizer: Any, max_length: int):
    import tensorflow as tf
    import tensorflow_text

    tf.config.set_visible_devices([], 'GPU')  # they are the model's
    settings = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    self._lowercase = settings['normalizer']['lowercase']
    self._fast = tensorflow_text.FastBertTokenizer(
        sorted(vocabulary, key=vocabulary.get), token_out_type=tf.int32,
        suffix_indicator=settings['model']['continuing_subword_prefix'],
        unknown_token=settings['model']['unk_token'], max_bytes_per_word=_MOST_BYTES,
        lower_case_nfd_strip_accents=self._lowercase)
    self._first, self._last = tokenizer.encode('').ids
    self._specials = [token['content'] for token in settings['added_tokens']]
    self._exact = tokenizer
    self._max_length = max_length

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each text: int32 of 2 to `max_length` elements."""
    differing = self.may_differ(texts)
    pieces = self._fast.tokenize(texts if len(texts) else [''])
    ids, bounds = pieces.values.numpy(), pieces.row_splits.numpy()
    counts = np.minimum(np.diff(bounds), self._max_length - 2)[:len(texts)]
    starts = np.concatenate([[0], np.cumsum(counts + 2)])
    flat = np.empty(starts[-1], np.int32)
    flat[starts[:-1]], flat[starts[1:] - 1] = self._first, self._last
    inside = np.ones(len(flat), bool)
    inside[starts[:-1]] = inside[starts[1:] - 1] = False
    kept = np.arange(len(ids)) - np.repeat(bounds[:-1], np.diff(bounds)) < self._max_length - 2
    flat[inside] = ids[kept]
    rows = [flat[begin:end] for begin, end in zip(starts, starts[1:])]
    for row, encoding in zip(differing, self._exact.encode_batch_fast(
        [texts[row] for row in differing])):
      kept = encoding.ids[:-1][:self._max_length - 1]
      rows[row] = np.array([*kept, self._last], np.int32)
    return rows

  def may_differ(self, texts: Sequence[str]) -> np.ndarray:
    """Which texts only the tokenizers library is trusted with: ascending int64."""
    # One array of all characters: a look at each text alone would cost more than FastBert.
    points = np.frombuffer('\n'.join([*texts, '']).encode('utf-32-le'), np.uint32)
    starts = np.cumsum([0, *(len(text) + 1 for text in texts)])
    apart = np.flatnonzero(~_agreeing(self._lowercase)[np.minimum(points, _BEYOND)])
    spaces = np.flatnonzero(_is_space()[np.minimum(points, _BEYOND)])
    long_words = spaces[np.diff(spaces, prepend=-1) > _LONGEST_WORD + 1]
    odd = np.searchsorted(starts, np.concatenate([apart, long_words]), side='right') - 1
    # Special tokens are rare: one search each in all texts tells that mostly there is none.
    spelled = [i for i, text in enumerate(texts) if any(s in text for s in self._specials)]
    return np.unique(np.concatenate([odd, np.array(spelled, np.int64)]))


def is_plain_bert(tokenizer: Any) -> bool:
  """Whether a `tokenizers.Tokenizer` does what BERT's own did, which `WordPieces` equals."""
  settings = json.loads(tokenizer.to_str())
  model, normalizer = settings['model'], settings['normalizer'] or {}
  vocabulary = tokenizer.get_vocab(with_added_tokens=False)
  lowercase = normalizer.get('lowercase')
  return (model['type'] == 'WordPiece' and normalizer.get('type') == 'BertNormalizer'
          and normalizer['clean_text'] and normalizer['handle_chinese_chars']
          and normalizer['strip_accents'] in (None, lowercase)
          and (settings['pre_tokenizer'] or {}).get('type') == 'BertPreTokenizer'
          and model['max_input_chars_per_word'] >= 3 * _LONGEST_WORD
          and model['unk_token'] in vocabulary and model['continuing_subword_prefix'] == '##'
          and sorted(vocabulary.values()) == list(range(len(vocabulary)))
          and not any(token['normalized'] for token in settings['added_tokens'])
          # One special token before the pieces and one behind them.
          and len(tokenizer.encode('').ids) == 2
          and tokenizer.encode('').special_tokens_mask == [1, 1]
          and tokenizer.encode('.').special_tokens_mask == [1, 0, 1])


@functools.cache
def _agreeing(lowercase: bool) -> np.ndarray:
  """bool [65537]: the characters that both normalise alike; the last is for all others."""
  old = unicodedata.ucd_3_2_0

  def agrees(character: str) -> bool:
    kind = old.category(character)
    if character in '\t\n\r ' or lowercase and kind == 'Zs' and character != '\u1680':
      return True
    if kind[0] in 'CZ' or kind != unicodedata.category(character) or character in _DROPPED:
      return False
    if unicodedata.combining(character) and kind != 'Mn':
      return False  # order matters, and only the library puts them in order
    return (unicodedata.normalize('NFKD', character) == unicodedata.normalize('NFD', character)
            and character.casefold() == character.lower())

  return np.array([agrees(chr(point)) for point in range(_BEYOND)] + [False])


@functools.cache
def _is_space() -> np.ndarray:
  """bool [65537]: characters that surely end a word."""
  result = np.zeros(_BEYOND + 1, bool)
  result[_SPACES] = True
  return result
