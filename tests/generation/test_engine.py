"""The engine against the full-pass `Context`, and requests that share it against the same alone."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.data.vocabulary import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from retro_jax.errors import UserError
from retro_jax.generation import decode
from retro_jax.generation.engine import Engine, writable
from retro_jax.generation.live_retrieval import LiveRetriever
from retro_jax.generation.requests import ChunkRead, Finished, Request, TextPiece
from retro_jax.models import retro
from tests import worlds
from tests.generation.test_decode import PROMPT, K, M, make_config, random_parameters
from tests.generation.test_decode import retriever as retriever  # the fixture

WINDOW = 4 * M
VOCABULARY = worlds.vocabulary()
PROMPTS = [PROMPT, '', 'class', PROMPT + ' the model layer (print value)']


@pytest.fixture(scope='module')
def model():
  config = make_config()
  parameters = random_parameters(config)
  # No text of these tests ends by itself: eos is as unlikely as a token can be.
  table = np.array(parameters['embedding.table'])
  table[EOS_ID] = 0
  return config, parameters | {'embedding.table': jnp.asarray(table)}


@pytest.fixture(scope='module')
def engine(model, retriever) -> Engine:
  return Engine(*model, VOCABULARY, retriever, slots=3, window=WINDOW)


def by_full_passes(model, retriever, prompt: str, count: int, window: int = WINDOW) -> list[int]:
  """Greedy tokens, each by one forward pass over the whole window."""
  config, parameters = model
  context = decode.Context(config, parameters, retriever, window)
  for token in VOCABULARY.encode(prompt):
    context.append(token)
  written = []
  for _ in range(count):
    written.append(int(np.argmax(np.where(
        writable(config, VOCABULARY), context.logits(), -np.inf))))
    context.append(written[-1])
  return written


@pytest.mark.parametrize('on', [True, False])
def test_ragged_greedy_texts_are_those_of_full_passes(model, retriever, engine, on):
  counts = [3 * M, 20, 2 * M + 1, M]  # some grow far beyond the window, four share three slots
  streams = [engine.submit(Request(prompt, count, temperature=0, retrieval=on))
             for prompt, count in zip(PROMPTS, counts)]
  assert engine.waiting == 4
  engine.run()
  for stream, prompt, count in zip(streams, PROMPTS, counts):
    made = stream.result()
    assert list(made.tokens) == by_full_passes(model, retriever if on else None, prompt, count)
    assert made.text == VOCABULARY.decode(made.tokens) and made.reason == 'length'
    tokens = [BOS_ID] + VOCABULARY.encode(prompt) + list(made.tokens)
    assert [t for chunk in made.chunks for t in chunk.tokens] == tokens
    assert any(chunk.neighbors for chunk in made.chunks) == (on and len(tokens) > M)
  assert engine.active == engine.waiting == 0


def test_a_request_writes_the_same_whoever_shares_the_batch(engine):
  request = Request(PROMPT, 2 * M + 3, temperature=1.3, top_p=0.95, seed=4)
  alone = engine.generate(request)
  assert alone.tokens != engine.generate(Request(PROMPT, 2 * M + 3, temperature=1.3, seed=5)).tokens
  for before in (1, 2):  # in another slot, and with others that are at other places
    for i in range(before):
      engine.submit(Request(PROMPTS[i + 1], 30 + i, seed=i, temperature=0.9, retrieval=i == 0))
    for _ in range(before):
      engine.step()
    assert engine.generate(request) == alone


def slow_logits(model, tokens, start, readings) -> np.ndarray:
  """Logits of every place without caches: each place reads E of the last reading before it.

  Args:
    model: with one LM and one RETRO layer.
    tokens: int [n], `start` ids of padding first.
    readings: (tokens known, neighbour tokens [k, r]), rising.
  """
  config, parameters = model
  built = retro.build(config, parameters)
  m, r, n = M, 2 * M, len(tokens)
  segments = (jnp.arange(n) >= start).astype(jnp.int32)[None]
  structure, values = nnx.split(built.decoder.prefix)
  first = nnx.merge(structure, jax.tree.map(lambda x: x[0], values))
  entry = built.decoder.entry
  h = entry.attention(first(built.embedding(jnp.asarray(tokens)[None], jnp.float32), segments,
                            None), segments)
  asking, read = entry.cca.norm(h), np.zeros(h.shape, np.float32)
  for number, (end, found) in enumerate(readings):
    before = np.arange(end - m, end)
    retrieval = retro.Retrieval(jnp.asarray(found)[None, None], jnp.asarray(found != 0)[None, None])
    encoded = built.encode(retrieval, h[:, np.maximum(before, 0)][:, None],
                           jnp.asarray(before >= start)[None, None])
    last = readings[number + 1][0] if number + 1 < len(readings) else n + 1
    for place in range(end - 1, min(last - 1, n)):
      read[:, place] = entry.cca.attention(
          asking[:, place:place + 1], encoded.reshape(1, K * r, -1),
          retrieval.mask.reshape(1, 1, K * r), offset=m - 1 + place + 1 - end, key_groups=K)[:, 0]
  return np.array(built.read(built.decoder.norm(entry.feed_forward(h + read))))[0]


@pytest.mark.parametrize('step, left_pad', [(3, True), (0, True), (5, False)])
def test_neighbors_more_often_and_prompts_moved_to_the_end_of_a_chunk(
    model, retriever, engine, step, left_pad):
  made = engine.generate(Request(PROMPTS[2], 17, temperature=0, retrieval_step=step,
                                 left_pad=left_pad))
  tokens = [BOS_ID] + VOCABULARY.encode(PROMPTS[2]) + list(made.tokens)
  padding = -(len(tokens) - 17) % M if left_pad else 0
  assert padding or not left_pad
  prompt_end, everything = padding + len(tokens) - 17, [PAD_ID] * padding + tokens
  ends = [end for end in range(M if not left_pad else prompt_end, len(everything))
          if end % M == 0 or (end > prompt_end and step and end % M % step == 0)]
  if not left_pad:
    ends = [5] + ends
  readings = []
  for end in ends:
    query = ([PAD_ID] * M + everything[:end])[-M:]
    readings.append((end, retriever.neighbors(np.array(query)).tokens))
  logits = slow_logits(model, everything[:-1], padding, readings)
  logits[:, ~writable(model[0], VOCABULARY)] = -np.inf
  assert np.argmax(logits[prompt_end - 1:], -1).tolist() == list(made.tokens)
  # The records say where which neighbours came.
  at, seen = padding, []
  for chunk in made.chunks:
    at += len(chunk.tokens)
    if chunk.neighbors:
      seen.append((at, [neighbor.tokens for neighbor in chunk.neighbors]))
  assert seen == [(end, [tuple(t for t in row.tolist() if t) for row in found])
                  for end, found in readings]


def test_events_tell_the_text_as_it_comes(engine):
  request = Request(PROMPT, 20, temperature=0)
  events = []
  stream = engine.submit(request)
  engine.run()
  events = list(stream)
  made = events[-1].generation
  assert isinstance(events[-1], Finished) and events[-1].reason == 'length'
  assert ''.join(e.text for e in events if isinstance(e, TextPiece)) == made.text
  read = {e.number: e.neighbors for e in events if isinstance(e, ChunkRead)}
  assert read == {i: c.neighbors for i, c in enumerate(made.chunks) if c.neighbors} and read
  # The same text up to a string that several tokens hold.
  pieces = [VOCABULARY.decode([t]) for t in made.tokens]
  stop = pieces[8][-1:] + pieces[9] + pieces[10][:1]
  first = made.text.index(stop)
  for stops in (stop, ('never there', stop)):
    cut = engine.generate(Request(PROMPT, 20, temperature=0, stop=stops))
    assert cut.reason == 'stop' and cut.text == made.text[:first]
    assert made.tokens[:len(cut.tokens)] == cut.tokens and len(cut.tokens) <= 11
  # What could have become a stop string is sent after all.
  end = made.text[-2:]
  assert engine.generate(Request(PROMPT, 20, temperature=0, stop=end + 'X')).text == made.text


def test_cancelled_requests_leave_and_others_go_on(engine):
  streams = [engine.submit(Request(prompt, 12, temperature=0)) for prompt in PROMPTS]
  for _ in range(6):
    engine.step()
  streams[0].cancel()
  engine.run()
  ends = [stream.result() for stream in streams]
  assert [end.reason for end in ends] == ['cancelled'] + ['length'] * 3
  assert 0 < len(ends[0].tokens) < 12
  assert ends[3] == engine.generate(Request(PROMPTS[3], 12, temperature=0))


def test_a_thread_serves_requests_of_others(engine):
  expected = [engine.generate(Request(prompt, 10, seed=2)) for prompt in PROMPTS]
  stop, results = threading.Event(), {}
  server = threading.Thread(target=engine.serve, args=(stop,))
  server.start()

  def ask(number: int) -> None:
    results[number] = engine.submit(Request(PROMPTS[number], 10, seed=2)).result()

  clients = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
  for client in clients:
    client.start()
  for client in clients:
    client.join()
  stop.set()
  server.join()
  assert [results[number] for number in range(4)] == expected


def test_a_failing_search_ends_its_requests_and_not_the_engine(engine, retriever, monkeypatch):
  expected = engine.generate(Request(PROMPT, 5, temperature=0))

  def fail(*args):
    raise OSError('the database is gone')

  with monkeypatch.context() as patch:
    patch.setattr(retriever, 'neighbors_of', fail)
    stream = engine.submit(Request(PROMPT, 5))
    with pytest.raises(OSError):
      engine.run()
    with pytest.raises(OSError, match='gone'):
      list(stream)
  assert engine.active == 0
  assert engine.generate(Request(PROMPT, 5, temperature=0)) == expected


def test_what_is_never_written():
  config = make_config()
  allowed = writable(config, VOCABULARY)
  assert not allowed[[PAD_ID, BOS_ID, UNK_ID]].any() and allowed[EOS_ID]
  assert not allowed[VOCABULARY.size:].any()
  assert allowed[4:VOCABULARY.size].all()


@pytest.mark.parametrize('changes, words', [
    ({'retrieval_step': M + 1}, 'retrieval_step'), ({'stop': ('a', '')}, 'stop'),
    ({'temperature': -1}, 'temperature'), ({'num_neighbors': K + 1}, 'num_neighbors')])
def test_bad_requests_are_refused(engine, changes, words):
  with pytest.raises(UserError, match=words):
    engine.submit(Request('', **changes))
  assert engine.waiting == 0


@pytest.mark.parametrize('changes, words', [
    ({'slots': 0}, 'slots'), ({'window': M + 1}, 'sequence_length'),
    ({'dropped_chunks': 5, 'window': WINDOW}, 'dropped_chunks')])
def test_bad_engines_are_refused(model, changes, words):
  with pytest.raises(UserError, match=words):
    Engine(*model, VOCABULARY, None, **changes)


def test_fewer_neighbors_are_those_of_a_search_for_fewer(model, retriever, engine):
  one = LiveRetriever(retriever.database, retriever._index, worlds.embedder(), VOCABULARY, 1)
  request = Request(PROMPT, 20, temperature=1.5, seed=3)
  made = engine.generate(dataclasses.replace(request, num_neighbors=1))
  assert made == Engine(*model, VOCABULARY, one, slots=3, window=WINDOW).generate(request)
  assert made.tokens != engine.generate(request).tokens
  assert engine.generate(dataclasses.replace(request, num_neighbors=K)) == engine.generate(request)


def test_a_cancelled_request_leaves_the_queue(engine):
  working = [engine.submit(Request(PROMPT, 30, seed=i)) for i in range(engine.slots)]
  engine.step()
  streams = [engine.submit(Request(PROMPT, 5)) for _ in range(3)]
  streams[1].cancel()
  engine.step()
  assert engine.waiting == 2 and engine.active == engine.slots
  assert streams[1].result().reason == 'cancelled'
  engine.run()
  assert all(stream.result().reason in ('length', 'eos') for stream in [*working, streams[0]])


def test_a_listener_hears_what_an_iterator_gets(engine):
  heard = []
  engine.submit(Request(PROMPT, 20, temperature=0), heard.append)
  stream = engine.submit(Request(PROMPT, 20, temperature=0))
  engine.run()
  assert heard == list(stream)
  calls, seconds = engine.totals['step']
  assert calls >= len(engine.seconds['step']) and seconds >= 0.999 * sum(engine.seconds['step'])
