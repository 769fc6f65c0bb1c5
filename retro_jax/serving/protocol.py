"""Completions as JSON, in OpenAI's shape: what a request says, what an answer looks like.

`parse` takes any bytes and gives a `CompletionRequest` or raises an `ApiError`, which is a
status and a body for the client. The other functions make answers. No sockets, no model.

Beyond OpenAI's fields a request may hold `database`, `retrieval` (false reads no neighbours) and
`k`; an answer holds `retrieval`: what was found for each chunk, and what was copied from it.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retro_jax.data.vocabulary import Vocabulary
from retro_jax.evaluation import html_page
from retro_jax.generation import faithfulness
from retro_jax.generation.faithfulness import ReadNeighbor
from retro_jax.generation.requests import ChunkRead, Request
from retro_jax.generation.written import Generation, Neighbor

MOST_STOPS = 4
LONGEST_STOP = 256  # characters
_LARGEST_SEED = 2**63 - 1
_HOTTEST = 100.0
# Fields of OpenAI's that are understood at the one value that changes nothing.
_FIXED = {'n': 1, 'best_of': 1, 'echo': False, 'logprobs': None, 'suffix': None, 'user': None,
          'logit_bias': None, 'stream_options': None, 'presence_penalty': 0, 'frequency_penalty': 0}
_REASONS = {'eos': 'stop', 'stop': 'stop', 'length': 'length', 'cancelled': 'cancelled'}
DONE = b'data: [DONE]\n\n'


class ApiError(Exception):
  """An answer that says what is wrong with a request, or with the server.

  Attributes:
    status: of HTTP.
    body: {'error': {message, type, param, code}}.
    headers: besides the usual ones.
  """

  def __init__(self, status: int, message: str, param: str | None = None,
               code: str | None = None, headers: Mapping[str, str] | None = None):
    super().__init__(message)
    self.status, self.headers = status, dict(headers or {})
    kind = ('rate_limit_error' if status == 429 else 'invalid_request_error' if status < 500
            else 'server_error')
    self.body = {'error': {'message': message, 'type': kind, 'param': param, 'code': code}}


@dataclasses.dataclass(frozen=True)
class Served:
  """What a request may name.

  Attributes:
    model: the model's id.
    databases: names, the default first; empty where nothing is retrieved.
    num_neighbors: k, the most a request may ask for.
    max_tokens: the most a request may ask for.
  """
  model: str
  databases: Sequence[str]
  num_neighbors: int
  max_tokens: int


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
  """A checked request.

  Attributes:
    request: for the engine.
    database: whose engine; '' where there is none.
    stream: whether the answer comes as events.
  """
  request: Request
  database: str
  stream: bool


def parse(body: bytes, served: Served) -> CompletionRequest:
  """What the body of POST /v1/completions asks for.

  Raises:
    ApiError: 400 or 404, and why.
  """
  fields = _Fields(_json_object(body))
  model = fields.text('model', served.model)
  if model != served.model:
    raise ApiError(404, f'no model {_shown(model)} here; there is {served.model!r}', 'model',
                   'model_not_found')
  for name, value in _FIXED.items():
    fields.fixed(name, value)
  database = fields.text('database', served.databases[0] if served.databases else '')
  if database not in (served.databases or ['']):
    raise ApiError(404, f'no database {_shown(database)} here; there is '
                   + (', '.join(map(repr, served.databases)) or 'none'), 'database',
                   'database_not_found')
  prompt = fields.text('prompt', None)
  retrieval = fields.boolean('retrieval', bool(served.databases))
  if retrieval and not served.databases:
    raise ApiError(400, 'retrieval is true, but this server has no database', 'retrieval')
  k = fields.integer('k', served.num_neighbors, 1, max(served.num_neighbors, 1))
  request = Request(
      prompt, fields.integer('max_tokens', min(16, served.max_tokens), 1, served.max_tokens),
      fields.number('temperature', 1.0, 0, _HOTTEST), fields.integer('top_k', 0, 0, 2**31 - 1),
      fields.number('top_p', 1.0, 0, 1, above=True), fields.integer('seed', 0, 0, _LARGEST_SEED),
      fields.stops(), retrieval, k if retrieval else 0)
  stream = fields.boolean('stream', False)
  fields.refuse_others()
  return CompletionRequest(request, database, stream)


class _Fields:
  """Takes fields out of a JSON object, one by one; null is the same as nothing."""

  def __init__(self, values: dict[str, Any]):
    self._values = values

  def _take(self, name: str, default: Any, kinds: tuple[type, ...], expected: str) -> Any:
    value = self._values.pop(name, None)
    if value is None:
      value = default
      if value is None:
        raise ApiError(400, f'{name} is missing; expected {expected}', name, 'missing_field')
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
      raise ApiError(400, f'{name} is {_shown(value)}, expected {expected}', name, 'wrong_type')
    return value

  def text(self, name: str, default: str | None) -> str:
    return _clean(self._take(name, default, (str,), 'a string'), name)

  def boolean(self, name: str, default: bool) -> bool:
    return self._take(name, default, (bool,), 'true or false')

  def integer(self, name: str, default: int, least: int, most: int) -> int:
    expected = f'an integer from {least} to {most}'
    value = self._take(name, default, (int,), expected)
    if value != default and not least <= value <= most:
      raise ApiError(400, f'{name} is {_shown(value)}, expected {expected}', name, 'out_of_range')
    return value

  def number(self, name: str, default: float, least: float, most: float, above: bool = False
             ) -> float:
    expected = f'a number {"above" if above else "from"} {least:g} to {most:g}'
    value = self._take(name, default, (int, float), expected)
    if not least <= value <= most or (above and value == least):
      raise ApiError(400, f'{name} is {_shown(value)}, expected {expected}', name, 'out_of_range')
    return float(value)

  def stops(self) -> tuple[str, ...]:
    expected = f'a string, or at most {MOST_STOPS}'
    value = self._take('stop', [], (str, list), expected)
    value = [value] if isinstance(value, str) else value
    if len(value) > MOST_STOPS:
      raise ApiError(400, f'stop holds {len(value)} strings, expected {expected}', 'stop',
                     'out_of_range')
    for stop in value:
      if not isinstance(stop, str) or not 0 < len(stop) <= LONGEST_STOP:
        raise ApiError(400, f'stop holds {_shown(stop)}, expected strings of 1 to {LONGEST_STOP} '
                       'characters', 'stop', 'out_of_range')
      _clean(stop, 'stop')
    return tuple(value)

  def fixed(self, name: str, allowed: Any) -> None:
    value = self._values.pop(name, None)
    if value is None or (value == allowed and isinstance(value, bool) == isinstance(allowed, bool)):
      return
    words = 'leave it out' if allowed is None else f'expected {json.dumps(allowed)}'
    raise ApiError(400, f'{name} is {_shown(value)}, which is not supported; {words}', name,
                   'unsupported_value')

  def refuse_others(self) -> None:
    if self._values:
      name = next(iter(self._values))
      raise ApiError(400, f'unknown field {_shown(name)}', name[:80], 'unknown_field')


def _json_object(body: bytes) -> dict[str, Any]:
  """The JSON object in a body: UTF-8, no name twice, only numbers that JSON knows."""
  def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(items)
    if len(values) < len(items):
      names = [name for name, _ in items]
      twice = next(name for name in values if names.count(name) > 1)
      raise ApiError(400, f'field {_shown(twice)} stands twice', twice[:80], 'duplicate_field')
    return values

  def refuse(name: str) -> None:
    raise ApiError(400, f'{name} is no JSON number', code='invalid_json')

  def finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
      refuse(digits[:80])
    return value

  try:
    value = json.loads(body.decode('utf-8'), object_pairs_hook=pairs, parse_constant=refuse,
                       parse_float=finite)
  except UnicodeDecodeError as error:
    raise ApiError(400, f'the body is not UTF-8 (byte {error.start})',
                   code='invalid_json') from None
  except json.JSONDecodeError as error:
    raise ApiError(400, f'the body is not JSON: {error.msg} at character {error.pos}',
                   code='invalid_json') from None
  except (RecursionError, ValueError):  # too deep; a number of thousands of digits
    raise ApiError(400, 'the body is JSON that is nested too deeply or holds too long a number',
                   code='invalid_json') from None
  if not isinstance(value, dict):
    raise ApiError(400, 'the body is no JSON object', code='invalid_json')
  return value


def _clean(value: str, name: str) -> str:
  if '\0' in value or any('\ud800' <= sign <= '\udfff' for sign in value):
    raise ApiError(400, f'{name} holds NUL or half a character (a lone surrogate)', name,
                   'invalid_text')
  return value


def _shown(value: Any) -> str:
  """A value of a client's in a message: short, ASCII, on one line."""
  words = json.dumps(value) if not isinstance(value, (dict, list)) else (
      'an object' if isinstance(value, dict) else 'a list')
  return words if len(words) <= 80 else words[:77] + '...'


def dumps(value: Any) -> bytes:
  """ASCII, so that no text can be ill-formed; NaN and infinity are refused."""
  return json.dumps(value, allow_nan=False, separators=(',', ':')).encode()


def event(value: Any) -> bytes:
  """One server-sent event."""
  return b'data: ' + dumps(value) + b'\n\n'


@dataclasses.dataclass(frozen=True)
class Answer:
  """Makes the JSON of one completion.

  Attributes:
    id: of this completion.
    model: that wrote it.
    created: seconds since 1970.
    asked: the request.
    vocabulary: of the tokens.
  """
  id: str
  model: str
  created: int
  asked: CompletionRequest
  vocabulary: Vocabulary

  def piece(self, text: str) -> dict[str, Any]:
    """More text."""
    return self._around(text, None)

  def chunk_read(self, read: ChunkRead) -> dict[str, Any]:
    """A chunk is complete and found neighbours, which the next one reads."""
    return self._around('', None) | {'retrieval': {
        'found_by': read.number, 'read_by': read.number + 1,
        'neighbors': [_neighbor(neighbor) for neighbor in read.neighbors]}}

  def whole(self, made: Generation, prompt_tokens: int, text: str | None = None) -> dict[str, Any]:
    """The whole answer, or (with `text` = '') the last event, which repeats no text."""
    written = len(made.tokens)
    return self._around(made.text if text is None else text, _REASONS[made.reason]) | {
        'usage': {'prompt_tokens': prompt_tokens, 'completion_tokens': written,
                  'total_tokens': prompt_tokens + written},
        'retrieval': self._retrieval(made)}

  def _around(self, text: str, reason: str | None) -> dict[str, Any]:
    return {'id': self.id, 'object': 'text_completion', 'created': self.created,
            'model': self.model, 'choices': [
                {'text': text, 'index': 0, 'logprobs': None, 'finish_reason': reason}]}

  def _retrieval(self, made: Generation) -> dict[str, Any]:
    chunks = []
    passages = faithfulness.passages(made)
    for number, passage in enumerate(passages):
      kinds = ['prompt' if place < passage.prompt else 'written'
               for place in range(len(passage.tokens))]
      chunks.append({'number': number, 'spans': self._spans(passage.tokens, kinds, passage.copied),
                     'read': [self._read(read) for read in passage.read]})
    request = self.asked.request
    measures = faithfulness.measure(made)
    copied = np.concatenate([passage.copied[passage.prompt:]
                             for passage in passages])
    spans, left = [], len(made.text)  # tokens may go on beyond the text: a stop string
    for span in self._spans(made.tokens, ['written'] * len(made.tokens), copied):
      if left:
        spans.append({'text': span['text'][:left], 'copied': span['copied']})
      left -= len(span['text'][:left])
    return {'on': request.retrieval, 'text_spans': spans, 'database': self.asked.database or None,
            'k': request.num_neighbors or None, 'chunks': chunks,
            'copied': measures.copied, 'longest_copied': measures.longest_copied,
            'repetition': measures.repetition}

  def _read(self, read: ReadNeighbor) -> dict[str, Any]:
    """A neighbour beside the chunk that read it, with what was copied."""
    neighbor = read.neighbor
    kinds = ['text' if place < neighbor.length else 'continuation'
             for place in range(len(neighbor.tokens))]
    return _neighbor(neighbor) | {
        'longest_copied': read.longest, 'spans': self._spans(neighbor.tokens, kinds, read.copied)}

  def _spans(self, tokens: Sequence[int], kinds: Sequence[str], copied: np.ndarray
             ) -> list[dict[str, Any]]:
    """Text of runs of tokens of one kind that are all copied or all not."""
    names = [kind + (' copied' if same else '') for kind, same in zip(kinds, copied)]
    marked = html_page.marked(np.array(tokens, int), np.array(names, object), self.vocabulary)
    return [{'text': text, 'of': name.split()[0], 'copied': name.endswith(' copied')}
            for text, name in marked]


def _neighbor(neighbor: Neighbor) -> dict[str, Any]:
  return {'chunk_id': neighbor.chunk_id, 'document_id': neighbor.document_id,
          'title': neighbor.title, 'distance': neighbor.distance, 'text': neighbor.text,
          'continuation': neighbor.continuation}
