"""Continuing one prompt: `generate`; and what every way of decoding must agree with: `Context`.

`generate` is the engine (engine.py) with one slot, which decodes with caches. `Context` is the
same model in the simplest way, one full forward pass over a window of fixed shape for every
token: slow, and what tests compare with.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.data.vocabulary import BOS_ID, PAD_ID, Vocabulary
from retro_jax.errors import UserError
from retro_jax.generation.engine import Engine, default_window
from retro_jax.generation.live_retrieval import FoundNeighbors, LiveRetriever
from retro_jax.generation.requests import Request
from retro_jax.generation.sampling import check_settings
from retro_jax.generation.written import Generation
from retro_jax.models import retro
from retro_jax.models.config import RetroConfig


class Context:
  """A document being written, and the neighbours of its complete chunks.

  Attributes:
    tokens: everything so far, [bos] first.
    retrieved: neighbours by number of the chunk (0-indexed), as far as they were needed.
  """

  def __init__(self, config: RetroConfig, parameters: Mapping[str, jax.Array],
               retriever: LiveRetriever | None, sequence_length: int, bos_id: int = BOS_ID):
    """Starts with [bos].

    Args:
      config: of the model.
      parameters: of the model, by dotted name.
      retriever: None for RETRO[OFF] and for the baseline.
      sequence_length: n, tokens in the window, a multiple of m.
      bos_id: of [bos] in the model's vocabulary.

    Raises:
      UserError: parts that do not fit each other.
    """
    m = config.chunk_length
    if sequence_length < m or sequence_length % m:
      raise UserError(f'sequence_length is {sequence_length}, expected a multiple of the chunk '
                      f'length {m}')
    if retriever is not None:
      retriever.check_fit(config)
    self.tokens = [bos_id]
    self.retrieved: dict[int, FoundNeighbors] = {}
    self._config, self._parameters, self._retriever = config, dict(parameters), retriever
    self._length = sequence_length

  def append(self, token: int) -> None:
    """Adds one token."""
    self.tokens.append(int(token))

  def logits(self) -> np.ndarray:
    """float32 [V], about the token after the last one.

    Position p reads the neighbours of chunk floor(p/m), as in training; those of a chunk
    that has just been completed are retrieved first. Of a context longer than the window,
    whole chunks are dropped from the left; a window's first m - 1 positions then read
    nothing, again as in training.
    """
    m, n = self._config.chunk_length, self._length
    first = max(0, -(-(len(self.tokens) - n) // m))  # chunks dropped
    visible = self.tokens[first * m:]
    window = np.zeros((1, n), np.int32)
    window[0, :len(visible)] = visible
    return np.asarray(_last_logits(
        self._config, self._parameters, window, len(visible), self._neighbors(first, len(visible))))

  def _neighbors(self, first: int, length: int) -> retro.Retrieval | None:
    """Neighbours of the chunks in the window; missing for those not yet complete."""
    if self._retriever is None:
      return None
    m, k = self._config.chunk_length, self._retriever.num_neighbors
    tokens = np.zeros((1, self._length // m, k, self._config.retrieved_length), np.int32)
    for i in range(length // m):
      chunk = first + i
      if chunk not in self.retrieved:
        self.retrieved[chunk] = self._retriever.neighbors(self.tokens[chunk * m:(chunk + 1) * m])
      tokens[0, i] = self.retrieved[chunk].tokens
    return retro.Retrieval(tokens, tokens != PAD_ID)


@functools.partial(jax.jit, static_argnums=0)
def _last_logits(config: RetroConfig, parameters: retro.Parameters, window: jax.Array,
                 length: jax.Array, retrieval: retro.Retrieval | None) -> jax.Array:
  """float32 [V] at position `length` of the window [1, n]; READ is applied there alone."""
  model = retro.build(config, parameters)
  segments = (jnp.arange(window.shape[1]) < length).astype(jnp.int32)[None]
  hidden = model.hidden(window, segments, retrieval)
  return model.read(hidden[0, length - 1])


def generate(
    config: RetroConfig,
    parameters: Mapping[str, jax.Array],
    vocabulary: Vocabulary,
    retriever: LiveRetriever | None,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    sequence_length: int = 0,
    stop: Sequence[str] = (),
    retrieval_step: int = 0,
    left_pad: bool = False,
) -> Generation:
  """Continues `prompt` until the model ends the document or `max_new_tokens` are written.

  Equal arguments give equal text. Ids that are no target in training (pad, bos, unk, rows of
  the embedding table beyond the vocabulary) are never written.

  Args:
    config: of the model.
    parameters: of the model, by dotted name.
    vocabulary: that the model was trained with.
    retriever: None for RETRO[OFF] and for the baseline.
    prompt, max_new_tokens, temperature, top_k, top_p, seed, stop, retrieval_step, left_pad: see
      `engine.Request`.
    sequence_length: the most tokens the model looks at, as in its training; 0 for 32 chunks.

  Raises:
    UserError: settings out of range, or parts that do not fit each other.
  """
  check_settings(max_new_tokens, temperature, top_k, top_p, seed)
  m = config.chunk_length
  window = sequence_length or default_window(config)
  # A place that can never be filled would only cost time; powers of two, so that prompts of
  # other lengths find the programs compiled.
  needed = 1 + len(vocabulary.encode(prompt)) + max_new_tokens + m * left_pad
  if window % m == 0:
    window = min(window, m << (-(-needed // m) - 1).bit_length())
  engine = Engine(config, parameters, vocabulary, retriever, window=window)
  return engine.generate(Request(
      prompt, max_new_tokens, temperature, top_k, top_p, seed, stop,
      retrieval_step=retrieval_step, left_pad=left_pad))
