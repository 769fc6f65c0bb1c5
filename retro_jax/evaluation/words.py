"""Perplexity of words, in the convention of WikiText: comparable whatever the tokens are.

Words are what white space separates in the tokenised text, and every line end is one more,
<eos>. The bits are those of our own tokens, all of them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from retro_jax.data.vocabulary import Vocabulary
from retro_jax.data.windows import Documents
from retro_jax.evaluation.bits_per_byte import Score
from retro_jax.retrieval.database import VOCABULARY, ChunkDatabase


def count_words(text: str) -> int:
  """Words between white space and one <eos> a line; a last line without its end is one, too."""
  lines = text.count('\n') + bool(text and not text.endswith('\n'))
  return len(text.split()) + lines


def word_perplexity(bits: float, words: int) -> float:
  """exp of the nats a word: 2 ** (bits / words)."""
  return float(2.0 ** (bits / words))


def perplexities(scores: Mapping[str, Score], queries: ChunkDatabase, documents: Documents
                 ) -> dict[str, Any]:
  """`words`, their number, and `perplexity` by setting.

  Args:
    scores: over `documents`.
    queries: the store of their texts.
    documents: that were scored.
  """
  vocabulary = Vocabulary.load(queries.folder / VOCABULARY)
  words = 0
  for ordinal in documents.ordinals.tolist():
    info = queries.document_info(ordinal)
    chunks = np.arange(info['first_chunk'], info['first_chunk'] + info['num_chunks'])
    words += count_words(vocabulary.decode(queries.tokens(chunks).ravel().tolist()))
  return {'words': words, 'perplexity': {
      name: word_perplexity(score.bits.sum(), max(words, 1)) for name, score in scores.items()}}
