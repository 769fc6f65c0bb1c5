"""Tokenizers of public models under the interface of vocabulary.py: exact bytes, id 0 for padding.

One file holds a Hugging Face tokenizer.json with the ids of bos and eos (`pack`), and stands
wherever a SentencePiece model can; `Vocabulary.load` tells them apart. Ids are the tokenizer's plus
one.

What would change the text is taken out of it, so that the tokens of a text always stand for its
exact bytes: Unicode normalisation, a space put before the text, special tokens spelled out in it.
The ids of ordinary text are the tokenizer's own, but for the first word where a space would be put
before it.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from retro_jax.data.vocabulary import PAD_ID, SPACE, SPACES, Vocabulary, clean_text
from retro_jax.errors import UserError

_FORMAT = 'retro_jax public vocabulary 1'
_BYTE = re.compile(r'<0x([0-9A-F]{2})>')


def pack(tokenizer: str, bos: int, eos: int) -> bytes:
  """The file that `Vocabulary.load` reads.

  Args:
    tokenizer: text of a tokenizer.json.
    bos, eos: the tokenizer's ids of what begins and ends a document; they may be equal.
  """
  described = {'format': _FORMAT, 'bos': bos, 'eos': eos, 'tokenizer': json.loads(tokenizer)}
  return json.dumps(described, ensure_ascii=False, sort_keys=True).encode()


class PublicVocabulary(Vocabulary):
  """A byte-pair tokenizer that knows all bytes: GPT-2's kind (byte-level) or Llama 2's."""

  def __init__(self, path: str | os.PathLike, packed: bytes):
    """Use `Vocabulary.load`; this takes the bytes already read from `path`."""
    import tokenizers

    self.path = str(path)
    self.fingerprint = hashlib.sha256(packed).hexdigest()[:16]
    try:
      described = json.loads(packed)
      if described.get('format') != _FORMAT:
        raise ValueError
    except ValueError:
      raise UserError(f'{path}: neither a SentencePiece model nor a vocabulary that '
                      'tools/import_checkpoint.py wrote; name another file') from None
    settings = described['tokenizer']
    self._byte_level = _has(settings.get('pre_tokenizer'), 'ByteLevel')
    self._names = {i: text for text, i in settings['model'].get('vocab', {}).items()}
    self._check_kind(settings)
    specials, literals = set(), {}
    for token in settings.get('added_tokens', ()):
      self._names[token['id']] = token['content']
      if token['special']:
        specials.add(token['id'])
      else:
        literals[token['id']] = token['content'].encode()
    self.size = max(self._names) + 2
    self.pad_id, self.bos_id, self.eos_id = PAD_ID, described['bos'] + 1, described['eos'] + 1
    specials |= {described['bos'], described['eos']}
    if not max(specials) + 1 < self.size:
      raise UserError(f'{path}: bos or eos beyond its {self.size - 1} ids; import it again')
    unknown = settings['model'].get('unk_token')
    specials |= {i for i, name in self._names.items() if name == unknown}
    self._pieces = [b''] * self.size
    for i, name in self._names.items():
      if i not in specials:
        self._pieces[i + 1] = literals.get(i) or self._bytes_of_name(name)
    self._byte_ids = {self._pieces[i + 1]: i + 1 for i, name in self._names.items()
                      if i not in specials and self._is_byte(name)}
    if len(self._byte_ids) != 256:
      raise UserError(f'{path}: {len(self._byte_ids)} of its tokens are single bytes, expected '
                      '256; such a tokenizer cannot write every text')
    self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self._exact(settings, specials)))
    self.token_bytes = np.array([len(piece) for piece in self._pieces], np.int32)
    self.token_bytes.flags.writeable = False
    probe = ' a  b\n\n c\t \ufb01 e\u0301 \u2581'
    if self.decode_bytes(self.encode(probe)) != probe.encode():
      raise UserError(f'{path}: its tokens do not stand for the exact bytes of a text')

  def _check_kind(self, settings: Any) -> None:
    """Refuses what is neither of the two kinds, by the field that says so."""
    kind, before = settings['model'].get('type', 'BPE'), settings.get('pre_tokenizer')
    if kind != 'BPE':
      raise UserError(f'{self.path}: tokenizer.json has model.type {kind!r}, expected \'BPE\'')
    if settings['model'].get('continuing_subword_prefix') or settings['model'].get(
        'end_of_word_suffix'):
      raise UserError(f'{self.path}: tokenizer.json marks the inside or the end of words, which '
                      'is no text (model.continuing_subword_prefix, model.end_of_word_suffix)')
    if self._byte_level:
      return
    if not settings['model'].get('byte_fallback'):
      raise UserError(f'{self.path}: tokenizer.json is neither byte-level nor has '
                      'model.byte_fallback; it cannot write every text')
    if before is not None and before['type'] != 'Metaspace':
      raise UserError(f'{self.path}: tokenizer.json has pre_tokenizer {before["type"]!r}, expected '
                      "'Metaspace', 'ByteLevel' or none")

  def _exact(self, settings: Any, specials: set[int]) -> dict[str, Any]:
    """The tokenizer without what changes text."""
    model = dict(settings['model'])
    model['vocab'] = {text: i for text, i in model['vocab'].items() if i not in specials}
    model['unk_token'], model['fuse_unk'], model['dropout'] = None, False, None
    added = [{**token, 'lstrip': False, 'rstrip': False, 'single_word': False, 'normalized': False}
             for token in settings.get('added_tokens', ()) if token['id'] not in specials]
    before, normalizer = settings.get('pre_tokenizer'), None
    if self._byte_level:
      before = _without_prefix_space(before)
    elif before is not None:
      before = {**before, 'replacement': SPACE, 'prepend_scheme': 'never'}
      before.pop('add_prefix_space', None)
    else:
      normalizer = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}
    return {**settings, 'model': model, 'added_tokens': added, 'normalizer': normalizer,
            'pre_tokenizer': before, 'post_processor': None, 'truncation': None, 'padding': None}

  def _is_byte(self, name: str) -> bool:
    return len(name) == 1 and name in _BYTE_OF if self._byte_level else bool(_BYTE.fullmatch(name))

  def _bytes_of_name(self, name: str) -> bytes:
    if self._byte_level:
      if all(character in _BYTE_OF for character in name):
        return bytes([_BYTE_OF[character] for character in name])
      return name.encode()
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(SPACE, ' ').encode()

  def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text as int32, without bos and eos."""
    parts: list[str] = []
    rows: list[list[int]] = []  # of each text: its parts by number, -1 for one U+2581
    for text in texts:
      row: list[int] = []
      # Of Llama 2's kind a U+2581 of the text itself has to travel as bytes.
      between = [clean_text(text)] if self._byte_level else SPACES.split(clean_text(text))
      for number, part in enumerate(between):
        if number % 2:
          row += [-1] * len(part)
        elif part:
          row.append(len(parts))
          parts.append(part)
      rows.append(row)
    encoded = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
    space = np.array([self._byte_ids[bytes([b])] for b in SPACE.encode()], np.int32)
    arrays = [np.array(one.ids, np.int32) + 1 for one in encoded]
    return [np.concatenate([np.zeros(0, np.int32), *(arrays[i] if i >= 0 else space for i in row)])
            for row in rows]

  def piece(self, token: int) -> str:
    """How one token is shown to a person, e.g. in a table."""
    token = int(token)
    if not self._pieces[token]:
      return self._names.get(token - 1, '<pad>')
    return self._pieces[token].decode('utf-8', 'replace').replace(' ', SPACE)

  def seqio(self) -> Any:
    """A `seqio.PassThroughVocabulary` of this size: seqio is not to encode with it."""
    import seqio
    return seqio.PassThroughVocabulary(self.size, self.eos_id)


def _has(settings: Any, kind: str) -> bool:
  """Whether a pre-tokenizer is, or is a sequence with, one of this kind."""
  if settings is None:
    return False
  return settings['type'] == kind or any(
      _has(one, kind) for one in settings.get('pretokenizers', ()))


def _without_prefix_space(settings: Any) -> Any:
  """A pre-tokenizer that puts no space before the text."""
  if settings['type'] == 'Sequence':
    return {**settings, 'pretokenizers': [_without_prefix_space(one)
                                          for one in settings['pretokenizers']]}
  return {**settings, 'add_prefix_space': False} if 'add_prefix_space' in settings else settings


def _byte_alphabet() -> dict[str, int]:
  """The byte of each character of byte-level tokens: itself if it can be seen, else from U+0100."""
  seen = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
  hidden = [byte for byte in range(256) if byte not in seen]
  return {chr(byte): byte for byte in seen} | {
      chr(0x100 + number): byte for number, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
