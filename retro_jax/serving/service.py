"""Engines at work behind a server: one a database, their threads, and the requests under way.

All but `start` and `stop` belongs to the thread of the event loop; events of the engines' threads
are handed over to it. What requests look like on the wire is protocol.py's business.
"""

import asyncio
import collections
import functools
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping

from retro_jax.data.vocabulary import Vocabulary
from retro_jax.errors import UserError
from retro_jax.generation.engine import Engine
from retro_jax.generation.requests import Event, Finished, Request, TextPiece
from retro_jax.serving.limits import LimitsConfig
from retro_jax.serving.metrics import Metrics
from retro_jax.serving.protocol import ApiError, CompletionRequest, Served

_log = logging.getLogger(__name__)
# Of answers that were just given, for the guess when a slot becomes free.
_REMEMBERED = 32
_LONGEST_RETRY = 60


class ClientGone(Exception):
  """Nobody is there any more to read the answer."""


class Work:
  """A request that an engine works on; iterate it once for its events.

  Attributes:
    asked: the request.
    prompt_tokens: of its prompt.
    cancel: frees the slot, if the engine still works on it.
  """

  def __init__(self, asked: CompletionRequest, prompt_tokens: int):
    self.asked, self.prompt_tokens = asked, prompt_tokens
    self.cancel: Callable[[], None] = lambda: None
    self._items: asyncio.Queue[Event | Exception] = asyncio.Queue()

  def put(self, item: Event | Exception) -> None:
    """The next event, or what ends the iteration by raising it."""
    self._items.put_nowait(item)

  def interrupt(self, reason: Exception) -> None:
    """Frees the slot; whoever iterates gets the reason."""
    self.cancel()
    self.put(reason)

  async def __aiter__(self) -> AsyncIterator[Event]:
    while True:
      item = await self._items.get()
      if isinstance(item, Exception):
        raise item
      yield item
      if isinstance(item, Finished):
        return


class Service:
  """What the server serves.

  Attributes:
    served: what requests may name.
    vocabulary: of the model.
    limits: of requests.
    engines: by name of the database; '' where nothing is retrieved.
    metrics: of requests and engines.
  """

  def __init__(self, served: Served, vocabulary: Vocabulary, engines: Mapping[str, Engine],
               limits: LimitsConfig):
    self.served, self.vocabulary, self.limits = served, vocabulary, limits
    self.engines = dict(engines)
    self.metrics = Metrics(self.engines)
    self._under_way = dict.fromkeys(self.engines, 0)
    self._latest: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
    self._stop = threading.Event()
    self._threads: list[threading.Thread] = []
    self._warm: dict[str, bool] = {}

  @property
  def ready(self) -> bool:
    """Whether every engine has compiled its programs and written a text."""
    return len(self._warm) == len(self.engines) and all(self._warm.values())

  def start(self, chunk_length: int) -> None:
    """Starts the engines' threads and lets each write a few tokens, which compiles everything."""
    for name, engine in self.engines.items():
      thread = threading.Thread(target=self._serve, args=(name, engine), daemon=True,
                                name=f'engine {name}')
      thread.start()
      self._threads.append(thread)
      # A prompt longer than a chunk, then tokens of which every other one retrieves.
      request = Request('\n'.join('ab' * chunk_length), max_new_tokens=4,
                        retrieval_step=min(2, chunk_length))
      engine.submit(request, functools.partial(self._warmed, name))

  def stop(self) -> None:
    """Lets the engines finish their step and end."""
    self._stop.set()
    for thread in self._threads:
      thread.join()

  def submit(self, asked: CompletionRequest) -> Work:
    """Hands a request to its engine.

    Raises:
      ApiError: the prompt is too long, or too many requests wait.
    """
    tokens = len(self.vocabulary.encode(asked.request.prompt))
    if tokens > self.limits.prompt_tokens:
      raise ApiError(400, f'the prompt has {tokens:,} tokens, expected at most '
                     f'{self.limits.prompt_tokens:,}', 'prompt', 'context_length_exceeded')
    name = asked.database
    engine = self.engines[name]
    if self._under_way[name] >= engine.slots + self.limits.waiting:
      seconds = self._retry_after(engine)
      raise ApiError(429, f'{self._under_way[name]} requests are under way already, of which '
                     f'{engine.slots} are worked on; try again in {seconds} seconds', None,
                     'queue_full', {'retry-after': str(seconds)})
    loop, begin = asyncio.get_running_loop(), time.perf_counter()
    work = Work(asked, tokens)
    first = True

    def take(item: Event | Exception) -> None:
      nonlocal first
      if isinstance(item, TextPiece) and first:
        first = False
        self.metrics.first_text.observe(time.perf_counter() - begin)
      if isinstance(item, (Finished, Exception)):
        time_up.cancel()
        self._under_way[name] -= 1
        seconds = time.perf_counter() - begin
        if isinstance(item, Finished) and item.reason != 'cancelled':
          self._latest.append(seconds)
          self.metrics.request_seconds.observe(seconds)
        if isinstance(item, Exception):
          _log.error('a step of engine %r failed', name, exc_info=item)
          item = ApiError(500, 'the server failed at this request', None, 'internal_error')
      work.put(item)

    def listen(item: Event | Exception) -> None:  # in the engine's thread
      if not loop.is_closed():
        loop.call_soon_threadsafe(take, item)

    try:
      work.cancel = engine.submit(asked.request, listen).cancel
    except UserError as error:
      raise ApiError(400, str(error), None, 'out_of_range') from None
    # No event is taken before this thread is done here.
    self._under_way[name] += 1
    time_up = loop.call_later(self.limits.answer_seconds, lambda: work.interrupt(ApiError(
        504, f'no whole answer within {self.limits.answer_seconds:g} seconds', None, 'timeout')))
    self.metrics.prompt_tokens.inc(tokens)
    return work

  def _serve(self, name: str, engine: Engine) -> None:
    """What the engine's thread does. What cannot be prepared fails each request, not the thread."""
    try:
      engine.warm_up()
    except Exception as error:
      self._warmed(name, error)
    engine.serve(self._stop)

  def _warmed(self, name: str, item: Event | Exception) -> None:
    if isinstance(item, Exception):
      _log.error('engine %r cannot write', name, exc_info=item)
      self._warm[name] = False
    elif isinstance(item, Finished):
      self._warm[name] = True

  def _retry_after(self, engine: Engine) -> int:
    """Seconds until about one slot is free, from what answers took of late."""
    mean = sum(self._latest) / len(self._latest) if self._latest else 1.0
    return min(max(1, math.ceil(mean / engine.slots)), _LONGEST_RETRY)
