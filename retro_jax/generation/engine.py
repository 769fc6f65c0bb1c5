"""The engine: many prompts continued at once by one model, with live retrieval.

Requests take one of a fixed number of slots, leave it when they end, and the next ones enter
(continuous batching). A step reads one token of every slot, or a chunk of a prompt; neighbours
are searched when a chunk is complete, for all slots that complete one in the same step
together, while the device computes the others. What a request writes does not depend on who
shares the batch. The model's side is models/decoding.py, the search live_retrieval.py.

Threads. `submit`, `Stream.cancel` and iterating a `Stream` may be called from any thread, at
any time. `step` belongs to one thread at a time (a lock sees to that): a server starts one
thread with `serve`, and its handlers submit and iterate. Without a server, `run` steps in the
caller's own thread until nothing is left, after which streams can be iterated; `generate` is
both for one request.

  engine = Engine(config, parameters, vocabulary, retriever, slots=8, window=2048)
  threading.Thread(target=engine.serve, args=(stop,), daemon=True).start()
  for event in engine.submit(Request('Beavers are', max_new_tokens=100)):
    match event:
      case TextPiece(): print(event.text, end='')
      case ChunkRead(): ...  # a chunk is complete: what it found, the next one reads
      case Finished(): ...   # always the last: event.generation, event.reason
"""

import collections
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from retro_jax.data.vocabulary import PAD_ID, Vocabulary
from retro_jax.errors import UserError
from retro_jax.generation.live_retrieval import LiveRetriever
from retro_jax.generation.requests import ChunkRead, Event, Request, Stream
from retro_jax.generation.sampling import check_settings, choose
from retro_jax.generation.slot import Part, Slot
from retro_jax.generation.written import Generation, describe_neighbors
from retro_jax.models import decoding, retro
from retro_jax.models.config import RetroConfig

# Window when none is asked for, in chunks: the paper's 2048 tokens at m = 64.
DEFAULT_WINDOW_CHUNKS = 32


class Engine:
  """A model, its caches and the requests that use them; see the module's docstring.

  Attributes:
    window: n, the most tokens the model looks at.
    slots: how many requests are worked on at a time.
    seconds: how long each part took, call by call: 'embed', 'search', 'neighbour tokens',
      'describe', 'dispatch', 'wait', 'choose', and 'step', the whole; the latest calls only.
    totals: how often each part ran and the seconds of all calls together, by the same names.
    tokens_written: by all requests so far.
  """

  def __init__(self, config: RetroConfig, parameters: Mapping[str, jax.Array],
               vocabulary: Vocabulary, retriever: LiveRetriever | None = None, *,
               slots: int = 1, window: int = 0, dropped_chunks: int = 1):
    """Puts the parts together; nothing is compiled yet.

    Args:
      config: of the model.
      parameters: of the model, by dotted name.
      vocabulary: that the model was trained with.
      retriever: None for RETRO[OFF] and for baselines.
      slots: requests at a time.
      window: n, tokens, a multiple of m; best as in training. 0 for 32 chunks.
      dropped_chunks: a text that grows beyond the window loses at least so many chunks on its
        left, and what is left is read anew. 1 keeps the most context; more read anew less often.

    Raises:
      UserError: parts that do not fit each other.
    """
    m = config.chunk_length
    self.window = window or default_window(config)
    if self.window < m or self.window % m:
      raise UserError(f'sequence_length is {self.window}, expected a multiple of the chunk length '
                      f'{m}')
    if config.max_positions and self.window > config.max_positions:
      raise UserError(f'sequence_length is {self.window}, but the model knows '
                      f'{config.max_positions} learned positions')
    for name, value, top in (('slots', slots, None),
                             ('dropped_chunks', dropped_chunks, self.window // m)):
      if value < 1 or (top and value > top):
        raise UserError(f'{name} is {value}, expected at least 1'
                        + (f' and at most {top}' if top else ''))
    if vocabulary.size > config.vocab_size:
      raise UserError(f'{vocabulary.path}: {vocabulary.size} ids, but the model knows '
                      f'{config.vocab_size}; give the vocabulary the model was trained with')
    if retriever is not None:
      retriever.check_fit(config)
      if retriever.vocabulary_fingerprint != vocabulary.fingerprint:
        raise UserError(f'{vocabulary.path} is vocabulary {vocabulary.fingerprint}, but neighbours '
                        f'come in {retriever.vocabulary_fingerprint}; use one vocabulary')
    self.slots, self.tokens_written = slots, 0
    self.seconds: dict[str, collections.deque[float]] = collections.defaultdict(
        lambda: collections.deque(maxlen=10_000))
    self.totals: dict[str, tuple[int, float]] = {}
    self._config, self._vocabulary, self._retriever = config, vocabulary, retriever
    self._dropped = dropped_chunks
    self._weights = decoding.prepare(config, dict(parameters), self.window)
    self._cache = self._new_cache()
    self._allowed = writable(config, vocabulary)
    self._slots: list[Slot | None] = [None] * slots
    self._waiting: collections.deque[Stream] = collections.deque()
    self._arrived = threading.Condition()  # guards _waiting
    self._stepping = threading.Lock()

  @property
  def waiting(self) -> int:
    """Requests that have no slot yet."""
    return len(self._waiting)

  @property
  def active(self) -> int:
    """Requests that have a slot."""
    return sum(slot is not None for slot in self._slots)

  def submit(self, request: Request, listener: Callable[[Event | Exception], None] | None = None
             ) -> Stream:
    """Lets a request wait for a slot.

    Args:
      request: to work on.
      listener: gets the events instead of who iterates the stream; see `Stream`.

    Raises:
      UserError: settings out of range.
    """
    check_settings(request.max_new_tokens, request.temperature, request.top_k, request.top_p,
                   request.seed)
    m = self._config.chunk_length
    if not 0 <= request.retrieval_step <= m:
      raise UserError(f'retrieval_step is {request.retrieval_step}, expected 1 to {m} (the chunk '
                      'length), or 0 for the latter')
    most = self._retriever.num_neighbors if self._retriever is not None else 0
    if not 0 <= request.num_neighbors <= most:
      raise UserError(f'num_neighbors is {request.num_neighbors}, expected 1 to {most} (as many as '
                      'are found), or 0 for the latter')
    if not all(request.stop):
      raise UserError('stop holds an empty string; give strings to stop at')
    stream = Stream(request, listener)
    with self._arrived:
      self._waiting.append(stream)
      self._arrived.notify_all()
    return stream

  def step(self) -> bool:
    """Reads and writes a token for every slot, or reads a chunk of its prompt.

    Returns:
      whether there was anything to do.

    Raises:
      Exception: what went wrong. Every request that had a slot gets it too and leaves; the
        engine can go on with others.
    """
    with self._stepping:
      self._admit()
      going = [slot for slot in self._slots if slot is not None]
      if not going:
        return False
      try:
        with self._watch('step'):
          self._step(going)
      except Exception as error:
        self._slots = [None] * self.slots
        self._cache = self._new_cache()  # the old one may have been given up
        for slot in going:
          slot.stream.send(error)
        raise
      return True

  def run(self) -> None:
    """Steps until every request has ended."""
    while self.step():
      pass

  def generate(self, request: Request) -> Generation:
    """Continues one prompt in the caller's thread (and whatever else was submitted)."""
    stream = self.submit(request)
    self.run()
    return stream.result()

  def warm_up(self) -> None:
    """Compiles what finding neighbours for all slots needs, so that no request waits for that."""
    if self._retriever is not None:
      self._retriever.warm_up(self.slots)

  def serve(self, stop: threading.Event) -> None:
    """Steps for as long as the process lives or until `stop` is set; sleeps when idle.

    A step that fails ends the requests it worked on, each of which raises, not the loop.
    """
    while not stop.is_set():
      try:
        busy = self.step()
      except Exception:  # already handed to every stream it concerns
        continue
      with self._arrived:
        if not busy and not self._waiting:
          self._arrived.wait(timeout=0.1)

  def _new_cache(self) -> decoding.Cache:
    k = self._retriever.num_neighbors if self._retriever is not None else 0
    return decoding.empty_cache(self._config, self.slots, self.window, k)

  def _admit(self) -> None:
    """Gives free slots to waiting requests and ends cancelled ones."""
    with self._arrived:
      gone = [stream for stream in self._waiting if stream.cancelled]
      for stream in gone:
        self._waiting.remove(stream)
      waiting = list(itertools.islice(self._waiting, self._slots.count(None)))
      for _ in waiting:
        self._waiting.popleft()
    for stream in gone:
      self._new_slot(-1, stream).finish('cancelled')
    for stream in waiting:
      number = self._slots.index(None)
      self._slots[number] = self._new_slot(number, stream)
    for number, slot in enumerate(self._slots):
      if slot is not None and slot.stream.cancelled:
        self._finish(number, 'cancelled')

  def _new_slot(self, number: int, stream: Stream) -> Slot:
    return Slot(number, stream, self._config.chunk_length, self.window, self._vocabulary,
                self._retriever is not None)

  def _step(self, going: Sequence[Slot]) -> None:
    """One step of the slots; the device computes while neighbours are searched."""
    for slot in going:
      slot.make_room(self._dropped)
    parts = {slot.number: slot.next_part() for slot in going}
    alone = [slot for slot in going
             if parts[slot.number].count == 1 and not parts[slot.number].completes
             and not slot.fresh]
    others = [slot for slot in going if slot not in alone]
    logits: dict[int, jax.Array] = {}
    together = None
    if alone:
      with self._watch('dispatch'):
        together = self._advance(alone)
    self._retrieve(others)
    with self._watch('dispatch'):
      for slot in others:
        logits[slot.number] = self._extend(slot, parts[slot.number])
    for slot in going:
      slot.took(parts[slot.number])
    with self._watch('wait'):
      values = np.asarray(together) if together is not None else None
      chosen = [(slot, values[slot.number] if slot.number not in logits
                 else np.asarray(logits[slot.number]))
                for slot in going if slot.read_all]
    with self._watch('choose'):
      for slot, row in chosen:
        self._write(slot, row)

  def _advance(self, slots: Sequence[Slot]) -> jax.Array:
    """One token of each of these slots; logits [slots, V]."""
    tokens, active = np.zeros(self.slots, np.int32), np.zeros(self.slots, bool)
    places = np.zeros((3, self.slots), np.int32)
    for slot in slots:
      tokens[slot.number], active[slot.number] = slot.token(slot.place), True
      places[:, slot.number] = slot.place, slot.start, slot.since
    self._cache, logits = decoding.advance(
        self._config, self._weights, self._cache, tokens, decoding.Places(*places), active)
    return logits

  def _extend(self, slot: Slot, part: Part) -> jax.Array:
    """The next tokens of one slot, with neighbours if they complete a chunk; logits [V]."""
    config, found = self._config, None
    if self._retriever is not None:
      k = self._retriever.num_neighbors
      read = np.zeros((1, 1, k, config.retrieved_length), np.int32)
      if part.completes:
        read[0, 0] = slot.retrieved[slot.base + slot.place + part.count].tokens
      found = retro.Retrieval(read, read != PAD_ID)
    tokens = np.zeros(1 if part.count == 1 else config.chunk_length, np.int32)
    tokens[:part.count] = [slot.token(slot.place + i) for i in range(part.count)]
    places = decoding.Places(*np.array([[slot.place], [slot.start], [slot.since]], np.int32))
    self._cache, logits = decoding.extend(
        config, self._weights, self._cache, np.int32(slot.number), tokens, np.int32(part.count),
        places, slot.fresh, part.completes, found)
    return logits

  def _retrieve(self, slots: Sequence[Slot]) -> None:
    """Finds the neighbours that these slots' tokens ask for, all in one search."""
    wanted = [(slot, end) for slot in slots for end in slot.asking()]
    if not wanted:
      return
    queries = np.array([slot.query(end) for slot, end in wanted], np.int32)
    found = self._retriever.neighbors_of(queries, self._watch)
    with self._watch('describe'):
      for (slot, end), neighbors in zip(wanted, found):
        if count := slot.stream.request.num_neighbors:
          neighbors = neighbors.nearest(count)
        slot.retrieved[end] = neighbors
        slot.described[end] = describe_neighbors(neighbors, self._retriever, self._vocabulary)
        slot.stream.send(ChunkRead(slot.number_of(end), slot.described[end]))

  def _write(self, slot: Slot, logits: np.ndarray) -> None:
    """Chooses the slot's next token and sends what it says."""
    request = slot.stream.request
    token = choose(np.where(self._allowed, logits, -np.inf), request.temperature, request.top_k,
                   request.top_p, slot.rng)
    if token == self._vocabulary.eos_id:
      self._finish(slot.number, 'eos')
      return
    self.tokens_written += 1
    if slot.append(token):
      self._finish(slot.number, 'stop')
    elif slot.written == request.max_new_tokens:
      self._finish(slot.number, 'length')

  def _finish(self, number: int, reason: str) -> None:
    slot, self._slots[number] = self._slots[number], None
    slot.finish(reason)

  @contextlib.contextmanager
  def _watch(self, part: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds = time.perf_counter() - begin
    self.seconds[part].append(seconds)
    calls, before = self.totals.get(part, (0, 0.0))
    self.totals[part] = calls + 1, before + seconds


def writable(config: RetroConfig, vocabulary: Vocabulary) -> np.ndarray:
  """bool [V]: the ids a text may get: those that stand for bytes, and eos, which ends it.

  Never written: pad, bos, unk and other ids without text, rows of the table beyond the vocabulary.
  """
  allowed = np.zeros(config.vocab_size, bool)
  allowed[:vocabulary.size] = vocabulary.token_bytes > 0
  allowed[vocabulary.eos_id] = True
  return allowed


def default_window(config: RetroConfig) -> int:
  """Tokens of a window nobody asked for: 32 chunks, or as many as have learned positions."""
  m = config.chunk_length
  limit = config.max_positions // m * m if config.max_positions else DEFAULT_WINDOW_CHUNKS * m
  return min(DEFAULT_WINDOW_CHUNKS * m, limit)
