"""Continuing a prompt: the model token by token, retrieval at every chunk boundary.

The simple and exact way: each token is one full forward pass over a window of fixed
shape, compiled once. `Context` is what has been read and written so far, with the
neighbours of its chunks; `generate` is the loop around it. Searching is in
live_retrieval.py.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.data.vocabulary import BOS_ID, PAD_ID, Vocabulary
from retro_jax.errors import UserError
from retro_jax.generation.live_retrieval import FoundNeighbors, LiveRetriever
from retro_jax.models import retro
from retro_jax.models.config import RetroConfig

# Window when none is asked for, in chunks: the paper's 2048 tokens at m = 64.
DEFAULT_WINDOW_CHUNKS = 32


@dataclasses.dataclass(frozen=True)
class Neighbor:
  """One neighbour as a person reads it.

  Attributes:
    chunk_id: in the database.
    document_id, title: of the document it lies in.
    distance: squared L2 between embeddings.
    text: of the neighbour N.
    continuation: text of F, which follows N in its document; '' at the document's end.
  """

  chunk_id: int
  document_id: str
  title: str
  distance: float
  text: str
  continuation: str


@dataclasses.dataclass(frozen=True)
class ChunkRecord:
  """A chunk of [bos] + prompt + continuation.

  Attributes:
    tokens: at most m ids; fewer in the last chunk.
    text: that they stand for.
    neighbors: RET of this chunk, which the model read while it wrote the chunk after it;
      () where nothing was retrieved (retrieval off, chunk incomplete or the end).
  """

  tokens: tuple[int, ...]
  text: str
  neighbors: tuple[Neighbor, ...]


@dataclasses.dataclass(frozen=True)
class Generation:
  """What `generate` returns.

  Attributes:
    prompt: as given.
    text: the continuation, without the prompt.
    tokens: ids of the continuation, without eos.
    ended: whether the model ended the document itself.
    chunks: prompt and continuation, chunk by chunk.
  """

  prompt: str
  text: str
  tokens: tuple[int, ...]
  ended: bool
  chunks: tuple[ChunkRecord, ...]


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
      _check_fit(config, retriever)
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
) -> Generation:
  """Continues `prompt` until the model ends the document or `max_new_tokens` are written.

  Equal arguments give equal text. Ids that are no target in training (pad, bos, unk, rows of
  the embedding table beyond the vocabulary) are never written.

  Args:
    config: of the model.
    parameters: of the model, by dotted name.
    vocabulary: that the model was trained with.
    retriever: None for RETRO[OFF] and for the baseline.
    prompt: may be empty.
    max_new_tokens: at least 1.
    temperature: divides the logits; 0 always takes the likeliest token.
    top_k: samples among so many likeliest tokens; 0 for all.
    top_p: samples among the fewest likeliest tokens that hold this probability; 1 for all.
    seed: of the random numbers, not negative.
    sequence_length: the most tokens the model looks at, as in its training; 0 for 32 chunks.

  Raises:
    UserError: settings out of range, or parts that do not fit each other.
  """
  _check_settings(max_new_tokens, temperature, top_k, top_p, seed)
  if vocabulary.size > config.vocab_size:
    raise UserError(f'{vocabulary.path}: {vocabulary.size} ids, but the model knows '
                    f'{config.vocab_size}; give the vocabulary the model was trained with')
  if retriever is not None and retriever.vocabulary_fingerprint != vocabulary.fingerprint:
    raise UserError(f'{vocabulary.path} is vocabulary {vocabulary.fingerprint}, but neighbours '
                    f'come in {retriever.vocabulary_fingerprint}; use one vocabulary')
  m = config.chunk_length
  prompt_ids = vocabulary.encode(prompt)
  # Chunks that can never be filled would only cost time.
  needed = -(-(1 + len(prompt_ids) + max_new_tokens) // m) * m
  window = sequence_length or DEFAULT_WINDOW_CHUNKS * m
  if window > needed and window % m == 0:
    window = needed
  context = Context(config, parameters, retriever, window, vocabulary.bos_id)
  for token in prompt_ids:
    context.append(token)
  allowed = np.zeros(config.vocab_size, bool)
  allowed[:vocabulary.size] = vocabulary.token_bytes > 0
  allowed[vocabulary.eos_id] = True
  rng = np.random.default_rng(seed)
  start, ended = len(context.tokens), False
  while len(context.tokens) - start < max_new_tokens:
    logits = np.where(allowed, context.logits(), -np.inf)
    token = choose(logits, temperature, top_k, top_p, rng)
    if token == vocabulary.eos_id:
      ended = True
      break
    context.append(token)
  written = tuple(context.tokens[start:])
  return Generation(prompt, vocabulary.decode(written), written, ended,
                    _chunk_records(context, vocabulary, retriever, m))


def choose(logits: np.ndarray, temperature: float, top_k: int, top_p: float,
           rng: np.random.Generator) -> int:
  """The id of the next token; equal logits are ordered by id. Arguments as in `generate`."""
  order = np.argsort(-logits.astype(np.float64), kind='stable')
  if temperature == 0:
    return int(order[0])
  order = order[:top_k or len(order)]
  scaled = (logits[order].astype(np.float64) - logits[order[0]]) / temperature
  probabilities = np.exp(scaled)
  probabilities /= probabilities.sum()
  cumulative = np.cumsum(probabilities)
  if top_p < 1:
    kept = int(np.searchsorted(cumulative, top_p)) + 1
    cumulative = cumulative[:kept]
  # The sum of what was kept stands for 1; rounding must not lead past its end.
  drawn = rng.random() * cumulative[-1]
  return int(order[min(int(np.searchsorted(cumulative, drawn, 'right')), len(cumulative) - 1)])


def _chunk_records(context: Context, vocabulary: Vocabulary, retriever: LiveRetriever | None,
                   m: int) -> tuple[ChunkRecord, ...]:
  records = []
  for number, start in enumerate(range(0, len(context.tokens), m)):
    tokens = tuple(context.tokens[start:start + m])
    found = context.retrieved.get(number)
    records.append(ChunkRecord(tokens, vocabulary.decode(tokens), () if found is None else
                               describe_neighbors(found, retriever, vocabulary)))
  return tuple(records)


def describe_neighbors(found: FoundNeighbors, retriever: LiveRetriever, vocabulary: Vocabulary
                       ) -> tuple[Neighbor, ...]:
  """The neighbours that exist, as text."""
  database, m = retriever.database, retriever.chunk_length
  described = []
  for chunk, distance, tokens in zip(found.ids.tolist(), found.distances, found.tokens.tolist()):
    if chunk < 0:
      continue
    document = database.document_info(int(database.document(chunk)))
    described.append(Neighbor(chunk, document['id'], document['title'], float(distance),
                              vocabulary.decode(tokens[:m]), vocabulary.decode(tokens[m:])))
  return tuple(described)


def _check_fit(config: RetroConfig, retriever: LiveRetriever) -> None:
  folder = retriever.database.folder
  if not config.has_retrieval:
    raise UserError('the model has no layers that read neighbours (a baseline); '
                    'turn retrieval off or give a RETRO model')
  if retriever.chunk_length != config.chunk_length:
    raise UserError(f'{folder} holds chunks of {retriever.chunk_length} tokens, but the model '
                    f'works with {config.chunk_length}; use a database of that chunk length')
  if config.retrieved_length != 2 * config.chunk_length:
    raise UserError(f'the model reads {config.retrieved_length} tokens of each neighbour, but '
                    f'{folder} gives {2 * config.chunk_length} (chunk and continuation); '
                    'use a model with retrieved_length = 2 chunk_length')


def _check_settings(max_new_tokens: int, temperature: float, top_k: int, top_p: float,
                    seed: int) -> None:
  limits: Sequence[tuple[str, float, bool, str]] = (
      ('max_new_tokens', max_new_tokens, max_new_tokens >= 1, 'at least 1'),
      ('temperature', temperature, temperature >= 0, '0 or more'),
      ('top_k', top_k, top_k >= 0, '0 (all) or more'),
      ('top_p', top_p, 0 < top_p <= 1, 'more than 0 and at most 1'),
      ('seed', seed, seed >= 0, '0 or more'))
  for name, value, good, expected in limits:
    if not good:
      raise UserError(f'{name} is {value}, expected {expected}')
