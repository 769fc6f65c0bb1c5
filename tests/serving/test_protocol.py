"""Bodies of requests, good and bad, without a server."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_jax.serving import protocol
from retro_jax.serving.protocol import ApiError, Served

SERVED = Served('tiny', ('code', 'wiki'), 3, 50)
NOTHING = Served('baseline', (), 0, 50)


def parse(fields: dict, served: Served = SERVED) -> protocol.CompletionRequest:
  return protocol.parse(json.dumps(fields).encode(), served)


def test_defaults_are_openais():
  asked = parse({'prompt': 'a'})
  request = asked.request
  assert (request.max_new_tokens, request.temperature, request.top_p, request.top_k) == (
      16, 1.0, 1.0, 0)
  assert (asked.stream, asked.database, request.retrieval, request.num_neighbors) == (
      False, 'code', True, 3)
  # null is the same as nothing, and what changes nothing is understood.
  same = {name: None for name in ('model', 'max_tokens', 'stop', 'seed', 'k', 'logprobs', 'user')}
  assert parse({'prompt': 'a', **same, 'n': 1, 'echo': False, 'presence_penalty': 0.0}) == asked


def test_every_field_arrives():
  asked = parse({'model': 'tiny', 'prompt': '', 'max_tokens': 50, 'temperature': 0, 'top_p': 0.5,
                 'top_k': 4, 'stop': 'x', 'seed': 2**63 - 1, 'stream': True, 'retrieval': True,
                 'k': 2, 'database': 'wiki'})
  request = asked.request
  assert asked.stream and asked.database == 'wiki' and request.prompt == ''
  assert (request.max_new_tokens, request.temperature, request.top_p, request.top_k, request.stop,
          request.seed, request.num_neighbors) == (50, 0.0, 0.5, 4, ('x',), 2**63 - 1, 2)
  assert parse({'prompt': 'a', 'stop': ['a', 'b', 'c', 'd']}).request.stop == ('a', 'b', 'c', 'd')
  off = parse({'prompt': 'a', 'retrieval': False, 'k': 2}).request
  assert not off.retrieval and off.num_neighbors == 0
  assert not parse({'prompt': 'a'}, NOTHING).request.retrieval


BAD_FIELDS = [
    ({'prompt': None}, 'prompt'), ({'prompt': 3}, 'prompt'), ({'prompt': ['a']}, 'prompt'),
    ({'prompt': [1, 2]}, 'prompt'), ({'prompt': {}}, 'prompt'), ({'prompt': True}, 'prompt'),
    ({'prompt': 'a\0b'}, 'prompt'), ({'prompt': 'a\ud800b'}, 'prompt'),
    ({'max_tokens': 0}, 'max_tokens'), ({'max_tokens': -1}, 'max_tokens'),
    ({'max_tokens': 51}, 'max_tokens'), ({'max_tokens': 10**30}, 'max_tokens'),
    ({'max_tokens': 1.5}, 'max_tokens'), ({'max_tokens': '5'}, 'max_tokens'),
    ({'max_tokens': True}, 'max_tokens'), ({'temperature': -0.1}, 'temperature'),
    ({'temperature': 1e308}, 'temperature'), ({'temperature': 10**400}, 'temperature'),
    ({'temperature': 'hot'}, 'temperature'), ({'temperature': False}, 'temperature'),
    ({'top_p': 0}, 'top_p'), ({'top_p': 1.01}, 'top_p'), ({'top_p': [1]}, 'top_p'),
    ({'top_k': -1}, 'top_k'), ({'top_k': 2**40}, 'top_k'), ({'seed': -1}, 'seed'),
    ({'seed': 2**63}, 'seed'), ({'seed': 0.5}, 'seed'), ({'stop': ''}, 'stop'),
    ({'stop': ['a'] * 5}, 'stop'), ({'stop': ['a', '']}, 'stop'), ({'stop': [1]}, 'stop'),
    ({'stop': {'a': 1}}, 'stop'), ({'stop': 'x' * 257}, 'stop'), ({'stop': '\udfff'}, 'stop'),
    ({'stream': 1}, 'stream'), ({'stream': 'true'}, 'stream'), ({'retrieval': 0}, 'retrieval'),
    ({'k': 0}, 'k'), ({'k': 4}, 'k'), ({'k': '1'}, 'k'), ({'n': 2}, 'n'), ({'n': True}, 'n'),
    ({'best_of': 3}, 'best_of'), ({'logprobs': 5}, 'logprobs'), ({'echo': True}, 'echo'),
    ({'echo': 0}, 'echo'), ({'suffix': 'x'}, 'suffix'), ({'logit_bias': {'5': 1}}, 'logit_bias'),
    ({'frequency_penalty': 0.5}, 'frequency_penalty'), ({'stream_options': {}}, 'stream_options'),
    ({'temprature': 1}, 'temprature'), ({'__proto__': {}}, '__proto__'), ({'\ud800': 1}, '\ud800'),
    ({'x' * 5000: 1}, 'x' * 80), ({'model': 3}, 'model'), ({'database': 1}, 'database'),
    ({'model': 'gpt-4'}, 'model'), ({'model': '../../etc'}, 'model'), ({'model': 'a\0'}, 'model'),
    ({'database': 'nowhere'}, 'database'), ({'database': 'x' * 9999}, 'database')]


@pytest.mark.parametrize('fields, param', BAD_FIELDS, ids=range(len(BAD_FIELDS)))
def test_bad_fields_are_named(fields, param):
  with pytest.raises(ApiError) as caught:
    parse({'prompt': 'a'} | fields)
  check(caught.value, {400, 404} if param in ('model', 'database') else {400})
  assert caught.value.body['error']['param'] == param


BAD_BODIES = [
    b'', b' ', b'{', b'{"prompt": "a",}', b'{"prompt": "a"} x', b'{"prompt": "a"}{}', b'[]',
    b'null', b'"prompt"', b'3', b"{'prompt': 'a'}", b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}', b'{"prompt": "a", "temperature": -Infinity}',
    b'{"prompt": "a", "temperature": 1e999}', b'{"prompt": "a", "seed": ' + b'9' * 5000 + b'}',
    b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "a", "x": {"y": 1, "y": 2}}',
    b'{"prompt": ' + b'[' * 100_000 + b']' * 100_000 + b'}', b'{"a":' * 50_000,
    b'\xff\xfe{"prompt": "a"}', b'{"prompt": "\xc3\x28"}', b'{"prompt": "\xed\xa0\x80"}',
    b'\xef\xbb\xbf{"prompt": "a"}', b'{"prompt": "a\x00"}', b'{"prompt": "a\nb"}', b'\0' * 9,
    b'{"prompt": "\\u12"}', b'{"prompt": "\\x41"}', b'{"prompt": 0x10}', b'{prompt: "a"}',
    b'prompt=a', b'<prompt/>']


@pytest.mark.parametrize('body', BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_bad_bodies_are_refused(body):
  with pytest.raises(ApiError) as caught:
    protocol.parse(body, SERVED)
  check(caught.value, {400})


def check(error: ApiError, statuses: set[int]) -> None:
  assert error.status in statuses
  said = error.body['error']
  assert said['type'] == 'invalid_request_error' and said['code']
  assert '\n' not in said['message'] and said['message'].isascii() and len(said['message']) < 300
  json.loads(protocol.dumps(error.body))


@pytest.mark.parametrize('fields', [{'retrieval': True}, {'database': 'code'}])
def test_a_server_without_databases_cannot_be_asked_for_one(fields):
  with pytest.raises(ApiError):
    parse({'prompt': 'a'} | fields, NOTHING)


@given(st.one_of(st.binary(), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(
        ['prompt', 'stop', 'k', 'seed', 'stream', 'model', 'top_p', 'n', 'x']), inner)).map(
            lambda value: json.dumps(value).encode())))
def test_whatever_comes_is_a_request_or_an_error(body):
  try:
    asked = protocol.parse(body, SERVED)
  except ApiError as error:
    check(error, {400, 404})
  else:
    assert asked.request.prompt.encode() is not None


def test_json_is_ascii_and_knows_no_nan():
  assert protocol.dumps({'a': '🙂\u2028\ud800'}).isascii()
  assert protocol.event({'a': 'x\n\ny'}) == b'data: {"a":"x\\n\\ny"}\n\n'
  with pytest.raises(ValueError):
    protocol.dumps({'a': math.nan})
