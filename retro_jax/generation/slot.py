"""One request at work: its tokens, its window, where neighbours are asked for, the text it sends.

Bookkeeping without arrays of the model. Who reads the tokens and searches: engine.py.
"""

import codecs
import dataclasses

import numpy as np

from retro_jax.data.vocabulary import PAD_ID, Vocabulary
from retro_jax.generation.live_retrieval import FoundNeighbors
from retro_jax.generation.requests import Finished, Stream, TextPiece
from retro_jax.generation.written import ChunkRecord, Generation, Neighbor


@dataclasses.dataclass(frozen=True)
class Part:
  """The next tokens of a slot that one call reads: how many, and whether neighbours come."""
  count: int
  completes: bool


class Slot:
  """A request at work: its tokens, where its window is, and what of it was read.

  Numbers of tokens count the padding on the left: token i of the text is number padding + i.
  The window begins at number `base`, a chunk's; places in it are numbers less `base`.
  """

  def __init__(self, number: int, stream: Stream, m: int, window: int, vocabulary: Vocabulary,
               can_retrieve: bool):
    request = stream.request
    self.number, self.stream, self.m, self.window = number, stream, m, window
    self._vocabulary = vocabulary
    self.tokens = [vocabulary.bos_id] + vocabulary.encode(request.prompt)
    self._prompt_length = len(self.tokens)
    self._retrieves = can_retrieve and request.retrieval
    self._interval = request.retrieval_step or m
    self._padding = -len(self.tokens) % m if request.left_pad and self._retrieves else 0
    self.rng = np.random.default_rng(request.seed)
    # Neighbours by the number of tokens before which they were asked for; as arrays and as text.
    self.retrieved: dict[int, FoundNeighbors] = {}
    self.described: dict[int, tuple[Neighbor, ...]] = {}
    self.base, self.place, self.since = 0, self._padding, 0
    self._frontier = self.end  # what is before it is read in whole chunks
    self._bytes = codecs.getincrementaldecoder('utf-8')('replace')
    self._sent, self._held = [], ''

  @property
  def end(self) -> int:
    """The number of the next token to be written."""
    return self._padding + len(self.tokens)

  @property
  def start(self) -> int:
    """Place of the first token that is no padding."""
    return max(0, self._padding - self.base)

  @property
  def fresh(self) -> bool:
    """Whether nothing of the window was read."""
    return self.place == self.start

  @property
  def read_all(self) -> bool:
    return self.base + self.place == self.end

  @property
  def written(self) -> int:
    return len(self.tokens) - self._prompt_length

  def token(self, place: int) -> int:
    """The token at a place of the window."""
    return self.tokens[self.base + place - self._padding]

  def make_room(self, dropped_chunks: int) -> None:
    """Drops chunks on the left of a text that has grown beyond the window."""
    beyond = self.end - self.base - self.window
    if beyond <= 0:
      return
    needed = -(-beyond // self.m)
    most = (self.end - 1 - self.base) // self.m  # the last token stays
    self.base += self.m * min(max(needed, dropped_chunks), most)
    self.place = self.start
    self.since = 0
    self._frontier = max(self._frontier, self.end - 1)

  def next_part(self) -> Part:
    """What the next call reads: up to the end of a chunk, of the prompt or of the text."""
    first, grid = self.base + self.place, self.m
    last = min(self.end, (first // grid + 1) * grid)
    return Part(last - first, self._asks(last))

  def _asks(self, end: int) -> bool:
    """Whether the tokens before `end` ask for neighbours."""
    if not self._retrieves:
      return False
    within = end % self.m
    return within == 0 or (end > self._frontier and within % self._interval == 0)

  def asking(self) -> list[int]:
    """Where neighbours are needed and not yet known: of all complete chunks, or of the last m."""
    if not self._retrieves:
      return []
    first = self.base + self.place
    ends = range((first // self.m + 1) * self.m, self.end + 1, self.m)
    part = self.next_part()
    wanted = set(ends) | ({first + part.count} if part.completes else set())
    return sorted(wanted - self.retrieved.keys())

  def query(self, end: int) -> list[int]:
    """The m tokens before `end`, padded on the left."""
    first = max(0, end - self.m - self._padding)
    tokens = self.tokens[first:end - self._padding]
    return [PAD_ID] * (self.m - len(tokens)) + tokens

  def took(self, part: Part) -> None:
    """The part was read."""
    self.place += part.count
    self.since = 1 if part.completes else self.since + part.count

  def append(self, token: int) -> bool:
    """Adds a written token and sends its text; True at a stop string, which is cut off."""
    self.tokens.append(token)
    return self._say(self._bytes.decode(self._vocabulary.decode_bytes([token])))

  def _say(self, text: str, final: bool = False) -> bool:
    """Sends text as far as no stop string can begin in it."""
    self._held += text
    stops = self.stream.request.stop
    places = [place for place in (self._held.find(stop) for stop in stops) if place >= 0]
    if places:
      self._send(self._held[:min(places)])
      self._held = ''
      return True
    begun = [size for stop in stops for size in range(1, len(stop))
             if self._held.endswith(stop[:size])]
    keep = 0 if final else max(begun, default=0)
    ready = len(self._held) - keep
    self._send(self._held[:ready])
    self._held = self._held[ready:]
    return False

  def _send(self, text: str) -> None:
    if text:
      self._sent.append(text)
      self.stream.send(TextPiece(text))

  def number_of(self, end: int) -> int:
    """The number of the chunk that ends there."""
    return self._all_ends(end).index(end)

  def _all_ends(self, last: int) -> list[int]:
    """Where chunks end, up to `last`: each m tokens, and where neighbours were found between."""
    grid = range((self._padding // self.m + 1) * self.m, last + 1, self.m)
    return sorted(set(grid) | {end for end in self.described if end <= last})

  def finish(self, reason: str) -> None:
    """Sends the rest and the end."""
    if reason != 'stop' and self._say(self._bytes.decode(b'', final=True), final=True):
      reason = 'stop'
    ends = self._all_ends(self.end)
    if not ends or ends[-1] < self.end:
      ends.append(self.end)
    records, first = [], 0
    for end in ends:
      tokens = tuple(self.tokens[first:end - self._padding])
      records.append(ChunkRecord(tokens, self._vocabulary.decode(tokens),
                                 self.described.get(end, ())))
      first = end - self._padding
    self.stream.send(Finished(reason, Generation(
        self.stream.request.prompt, ''.join(self._sent), tuple(self.tokens[self._prompt_length:]),
        reason == 'eos', tuple(records), reason)))
