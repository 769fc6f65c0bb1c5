"""What goes into the engine and what comes out: requests, events, and the stream of them.

The engine is in engine.py; what a whole generation is, in written.py.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from retro_jax.generation.written import Generation, Neighbor


@dataclasses.dataclass(frozen=True)
class Request:
  """What to continue and how.

  Attributes:
    prompt: may be empty.
    max_new_tokens: at least 1.
    temperature: divides the logits; 0 always takes the likeliest token.
    top_k: samples among so many likeliest tokens; 0 for all.
    top_p: samples among the fewest likeliest tokens that hold this probability; 1 for all.
    seed: of the random numbers, not negative; equal requests write equal texts.
    stop: the text ends before the first of these strings that is written.
    retrieval: False reads no neighbours (RETRO[OFF]), beside requests that do.
    num_neighbors: so many of the neighbours that the engine finds are read, the nearest; 0 for all.
    retrieval_step: neighbours of the last m tokens are found anew after so many written tokens
      (Wang et al. 2023); 0 for m, once a chunk, as in training.
    left_pad: the prompt is moved right so that it ends a chunk, and its last m tokens find
      neighbours for the very first token that is written (Wang et al. 2023). What is before it
      is padding, which nobody reads.
  """
  prompt: str
  max_new_tokens: int = 64
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  stop: Sequence[str] = ()
  retrieval: bool = True
  num_neighbors: int = 0
  retrieval_step: int = 0
  left_pad: bool = False

  def __post_init__(self):
    stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
    object.__setattr__(self, 'stop', stop)


@dataclasses.dataclass(frozen=True)
class TextPiece:
  """More of the continuation; all pieces together are `Generation.text`.

  A piece may hold several tokens or a part of one: text is held back while it could become a
  stop string or while a character is incomplete.
  """
  text: str


@dataclasses.dataclass(frozen=True)
class ChunkRead:
  """A chunk, of the prompt or written, is complete and has found neighbours.

  Attributes:
    number: of the chunk in `Generation.chunks`, from 0.
    neighbors: what is read from here on.
  """
  number: int
  neighbors: tuple[Neighbor, ...]


@dataclasses.dataclass(frozen=True)
class Finished:
  """The end of a stream.

  Attributes:
    reason: 'eos' (the model ended the document), 'length' (max_new_tokens), 'stop' (a stop string)
      or 'cancelled'.
    generation: all of it.
  """
  reason: str
  generation: Generation


Event = TextPiece | ChunkRead | Finished


class Stream:
  """The events of one request, in order; iterate it once, from one thread.

  Attributes:
    request: that was submitted.
  """

  def __init__(self, request: Request,
               listener: Callable[[Event | Exception], None] | None = None):
    """A stream without events.

    Args:
      request: that is submitted.
      listener: is called with each event in the engine's thread, and must not wait or raise;
        the stream is then not to be iterated. None keeps the events for who iterates.
    """
    self.request = request
    self._events: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
    self._deliver = listener or self._events.put
    self._cancelled = threading.Event()

  def cancel(self) -> None:
    """Asks for the end: the next step of the engine frees the slot and sends `Finished`.

    A request that still waits for a slot leaves the queue.
    """
    self._cancelled.set()

  @property
  def cancelled(self) -> bool:
    return self._cancelled.is_set()

  def send(self, event: Event | Exception) -> None:
    """For the engine: the next event, or what went wrong."""
    self._deliver(event)

  def __iter__(self) -> Iterator[Event]:
    """Waits for each event; raises what made the engine fail."""
    while True:
      event = self._events.get()
      if isinstance(event, Exception):
        raise event
      yield event
      if isinstance(event, Finished):
        return

  def result(self) -> Generation:
    """Waits for the end."""
    return next(event.generation for event in self if isinstance(event, Finished))
