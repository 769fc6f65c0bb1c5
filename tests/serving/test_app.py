"""The whole server on a real socket, with real engines over two real databases."""

import contextlib
import functools
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import serving as load
from retro_jax.data.corpus import Document
from retro_jax.data.vocabulary import EOS_ID
from retro_jax.generation.engine import Engine
from retro_jax.generation.live_retrieval import LiveRetriever
from retro_jax.generation.requests import Request
from retro_jax.retrieval import pipeline
from retro_jax.serving import app, server
from retro_jax.serving.limits import LimitsConfig
from retro_jax.serving.protocol import Served
from retro_jax.serving.service import Service
from tests import worlds
from tests.evaluation import browser, hostile
from tests.generation.test_decode import PROMPT, K, M, make_config, random_parameters
from tests.serving.driven_browser import CONTROL, DrivenBrowser

WINDOW, SLOTS, WAITING = 4 * M, 2, 2
LIMITS = LimitsConfig(body_bytes=10_000, header_bytes=4_000, prompt_tokens=300, max_tokens=400,
                      waiting=WAITING, arrival_seconds=2, answer_seconds=60, drain_seconds=20)


@functools.cache
def parameters():
  """Of a model whose texts never end by themselves."""
  made = random_parameters(make_config())
  table = np.array(made['embedding.table'])
  table[EOS_ID] = 0
  return made | {'embedding.table': jnp.asarray(table)}


def engine_over(retriever: LiveRetriever) -> Engine:
  return Engine(make_config(), parameters(), worlds.vocabulary(), retriever, slots=SLOTS,
                window=WINDOW)


@pytest.fixture(scope='module')
def engines(tmp_path_factory) -> dict[str, Engine]:
  """One engine a database; the second database is made of attacks on who reads it."""
  folder = tmp_path_factory.mktemp('databases')
  attacks = [Document(f'{i} {attack}', f'{attack} of a model layer {attack}', title=attack)
             for i, attack in enumerate(hostile.ATTACKS)]
  made = {}
  for name, rows in (('calm', worlds.documents(0, 12)), ('hostile', attacks)):
    database = worlds.store(folder / name, rows)
    index = pipeline.build_index(folder / f'{name}-index', database)
    retriever = LiveRetriever(database, index, worlds.embedder(), worlds.vocabulary(), K)
    made[name] = engine_over(retriever)
  return made


@contextlib.contextmanager
def serving(engines: dict[str, Engine], limits: LimitsConfig) -> Iterator[str]:
  """A server in a thread; gives its address."""
  names = tuple(name for name in engines if name)
  service = Service(Served('tiny', names, K if names else 0, limits.max_tokens),
                    worlds.vocabulary(), engines, limits)
  listener = server.listen('127.0.0.1', 0)
  running = server.make_server(app.make_app(service), limits)
  thread = threading.Thread(target=running.run, kwargs={'sockets': [listener]})
  thread.start()
  url = f'http://127.0.0.1:{listener.getsockname()[1]}'
  assert b'not_ready' in load.get(url, '/readyz')
  service.start(M)
  try:
    while b'"ready"' not in load.get(url, '/readyz'):
      time.sleep(0.05)
    yield url
  finally:
    running.should_exit = True
    thread.join()


@pytest.fixture(scope='module')
def url(engines) -> Iterator[str]:
  with serving(engines, LIMITS) as address:
    yield address


def complete(url: str, **fields) -> tuple[int, dict]:
  connection, response = load.post(url, fields)
  body = json.loads(response.read())
  connection.close()
  return response.status, body


def alone(engines, fields: dict, name: str = 'calm'):
  """The same request at an engine that nobody serves: what the server must write."""
  return engine_over(engines[name]._retriever).generate(Request(**fields))


@pytest.mark.parametrize('name, asked, request_fields', [
    ('calm', {}, {}),
    ('hostile', {'database': 'hostile', 'k': 1}, {'num_neighbors': 1}),
    ('calm', {'retrieval': False}, {'retrieval': False}),
    ('calm', {'top_k': 5, 'top_p': 0.9, 'seed': 7, 'temperature': 1.5, 'stop': ['zzzz', 'q']},
     {'top_k': 5, 'top_p': 0.9, 'seed': 7, 'temperature': 1.5, 'stop': ('zzzz', 'q')})])
def test_answers_are_the_engines_whole_and_as_events(url, engines, name, asked, request_fields):
  common = {'prompt': PROMPT, 'temperature': 0}
  made = alone(engines, common | {'max_new_tokens': 20} | request_fields, name)
  status, whole = complete(url, model='tiny', max_tokens=20, **(common | asked))
  assert status == 200 and whole['object'] == 'text_completion'
  choice = whole['choices'][0]
  assert choice['text'] == made.text
  assert choice['finish_reason'] == ('length' if made.reason == 'length' else 'stop')
  assert whole['usage'] == {
      'prompt_tokens': len(worlds.vocabulary().encode(PROMPT)),
      'completion_tokens': len(made.tokens),
      'total_tokens': len(worlds.vocabulary().encode(PROMPT)) + len(made.tokens)}

  status, headers, events = load.stream(url, {'max_tokens': 20, **common, **asked})
  assert status == 200 and headers['content-type'].startswith('text/event-stream')
  assert load.text_of(events) == made.text
  assert events[-2]['retrieval'] == whole['retrieval']
  # Neighbours of every chunk, in the events and in the end, as the engine found them.
  found = {event['retrieval']['found_by']: event['retrieval']['neighbors']
           for event in events[:-2] if 'retrieval' in event}
  assert {number: [n['chunk_id'] for n in neighbors] for number, neighbors in found.items()} == {
      number: [n.chunk_id for n in chunk.neighbors]
      for number, chunk in enumerate(made.chunks) if chunk.neighbors}
  assert bool(found) == asked.get('retrieval', True)
  chunks = whole['retrieval']['chunks']
  k = asked.get('k', K)
  for number, chunk in enumerate(chunks):
    assert ''.join(span['text'] for span in chunk['spans']) == made.chunks[number].text
    assert all(span['copied'] is False for span in chunk['spans']) or chunk['read']
    assert [n['chunk_id'] for n in chunk['read']] == [
        n['chunk_id'] for n in found.get(number - 1, [])]
    assert len(chunk['read']) <= k
    for read in chunk['read']:
      # Half characters at the cut between N and F count to F.
      assert ''.join(span['text'] for span in read['spans']).replace('\ufffd', '') == (
          read['text'] + read['continuation']).replace('\ufffd', '')
  assert ''.join(span['text'] for span in whole['retrieval']['text_spans']) == made.text


def test_what_is_served_is_said(url):
  model = json.loads(load.get(url, '/v1/models'))['data'][0]
  assert model['id'] == 'tiny' and model['databases'] == ['calm', 'hostile']
  assert model['max_k'] == K and model['max_tokens'] == LIMITS.max_tokens
  assert json.loads(load.get(url, '/healthz')) == {'status': 'ok'}


def raw(url: str, data: bytes, wait: float = 10) -> tuple[int, dict, bytes]:
  """Bytes to the server; status, JSON and all that came back."""
  host, port = url.removeprefix('http://').split(':')
  with socket.create_connection((host, int(port)), timeout=wait) as connection:
    connection.sendall(data)
    answer = b''
    with contextlib.suppress(ConnectionResetError):  # it need not read all of a long request
      while part := connection.recv(1 << 16):
        answer += part
  head, _, body = answer.partition(b'\r\n\r\n')
  return int(head.split(b' ')[1]), json.loads(body), answer


GOOD = b'{"prompt": "a", "max_tokens": 1}'  # whatever is wrong is not the body


def http(body: bytes = GOOD, method: bytes = b'POST', path: bytes = b'/v1/completions',
         kind: bytes = b'application/json', host: bytes = b'localhost', more: bytes = b'',
         length: bytes | None = None) -> bytes:
  length = str(len(body)).encode() if length is None else length
  return (method + b' ' + path + b' HTTP/1.1\r\nhost: ' + host + b'\r\ncontent-type: ' + kind
          + b'\r\ncontent-length: ' + length + b'\r\nconnection: close\r\n' + more + b'\r\n' + body)


HOSTILE = {
    'no http': (b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n', 400),
    'no http, words': (b'hello server\r\n\r\n', 400),
    'another protocol': (b'GET / SPDY/3\r\nhost: localhost\r\n\r\n', 400),
    'no host': (b'GET / HTTP/1.1\r\nconnection: close\r\n\r\n', 400),
    'two hosts': (b'GET / HTTP/1.1\r\nhost: localhost\r\nhost: b\r\n\r\n', 400),
    'host of another site': (http(host=b'evil.example:80'), 403),
    'long path': (http(path=b'/' + b'a' * 10_000), 431),
    'long header': (http(more=b'x: ' + b'y' * 10_000 + b'\r\n'), 431),
    'many headers': (http(more=b'x: y\r\n' * 3_000), 431),
    'nul in a header': (http(more=b'x: a\0b\r\n'), 400),
    'nul in the path': (http(path=b'/v1\0/completions'), 400),
    'length no number': (http(length=b'ten'), 400),
    'length negative': (http(length=b'-5'), 400),
    'length enormous': (http(length=b'9' * 30), 400),
    'length too large': (http(length=b'10001'), 413),
    'body too large': (http(b'{"prompt": "' + b'a' * 20_000 + b'"}'), 413),
    'body too large, chunked': (http(b'4e20\r\n' + b'a' * 20_000 + b'\r\n0\r\n\r\n').replace(
        b'content-length: 20013', b'transfer-encoding: chunked'), 413),
    'bad chunks': (http(b'zz\r\nabc').replace(
        b'content-length: 7', b'transfer-encoding: chunked'), 400),
    'unknown encoding of the transfer': (http(more=b'transfer-encoding: gzip\r\n'), 400),
    'body that does not come': (http(b'{"prompt"', length=b'100'), 408),
    'wrong method': (http(method=b'GET'), 405),
    'unknown method': (http(method=b'BREW'), 405),
    'delete of a page': (http(method=b'DELETE', path=b'/'), 405),
    'unknown path': (http(path=b'/v1/chat/completions'), 404),
    'path traversal': (http(path=b'/../../../../etc/passwd', method=b'GET'), 404),
    'path traversal, encoded': (http(path=b'/%2e%2e%2f%2e%2e%2fetc/passwd', method=b'GET'), 404),
    'path traversal, file': (http(path=b'/page.js/..%5c..%5capp.py', method=b'GET'), 404),
    'path with half a character': (http(path=b'/%ff%fe', method=b'GET'), 404),
    'wrong type': (http(kind=b'text/plain'), 415),
    'a form': (http(b'prompt=a', kind=b'application/x-www-form-urlencoded'), 415),
    'type that is no type': (http(kind=b'\xff\xfe'), 415),
    'empty body': (http(b''), 400),
    'nul body': (http(b'\0\0\0\0'), 400),
    'gzip body': (http(b'\x1f\x8b\x08\x00'), 400),
    'utf-16 body': (http('{"prompt": "a"}'.encode('utf-16')), 400),
    'prompt too long': (http(json.dumps({'prompt': 'a b ' * 1000}).encode()), 400),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_requests_get_a_clear_answer(url, name, capfd):
  data, expected = HOSTILE[name]
  status, body, answer = raw(url, data)
  # h11 finds headers too long only where it waits for more of them.
  assert status == expected or (expected, status) == (431, 400), body
  error = body['error']
  assert set(error) == {'message', 'type', 'param', 'code'}
  assert error['message'] and '\n' not in error['message'] and len(error['message']) < 300
  assert b'Traceback' not in answer
  assert 'Traceback' not in capfd.readouterr().err


def test_a_client_that_says_nothing_is_hung_up_on(url):
  host, port = url.removeprefix('http://').split(':')
  for said in (b'', b'POST /v1/compl'):
    with socket.create_connection((host, int(port)), timeout=15) as connection:
      connection.sendall(said)
      assert connection.recv(100) == b''


def test_a_full_queue_refuses_and_clients_that_leave_free_it(url, engines):
  engine = engines['calm']
  request = {'prompt': PROMPT, 'max_tokens': 400, 'temperature': 0, 'stream': True}
  taken = []
  for _ in range(SLOTS + WAITING):
    connection, response = load.post(url, request)
    assert response.status == 200
    taken.append((connection, response))
  connection, response = load.post(url, request)
  body = json.loads(response.read())
  assert response.status == 429 and int(response.headers['retry-after']) >= 1
  assert body['error']['code'] == 'queue_full' and body['error']['type'] == 'rate_limit_error'
  # The other database has a queue of its own.
  assert complete(url, prompt='a', max_tokens=2, database='hostile')[0] == 200
  assert engine.active == SLOTS and engine.waiting == WAITING
  written = engine.tokens_written
  for connection, response in taken:
    response.close()
    connection.close()
  assert load.becomes_free(url)
  assert engine.tokens_written - written < 200  # nobody wrote to the end
  assert complete(url, prompt='a', max_tokens=2)[0] == 200


def test_an_engine_that_cannot_be_prepared_answers_yet(engines, monkeypatch, caplog):
  engine = engine_over(engines['calm']._retriever)
  monkeypatch.setattr(engine, 'warm_up', lambda: 1 / 0)
  service = Service(Served('tiny', ('calm',), K, 9), worlds.vocabulary(), {'calm': engine}, LIMITS)
  service.start(M)
  try:
    generation = engine.submit(Request(PROMPT, 3)).result()
  finally:
    service.stop()
  assert len(generation.tokens) == 3
  assert "engine 'calm' cannot write" in caplog.text and 'ZeroDivisionError' in caplog.text


def test_an_answer_that_takes_too_long_ends(engines):
  fresh = engine_over(engines['calm']._retriever)
  limits = LimitsConfig(max_tokens=1_000_000, answer_seconds=1, arrival_seconds=30)
  with serving({'calm': fresh}, limits) as url:
    request = {'prompt': PROMPT, 'max_tokens': 1_000_000, 'temperature': 0}
    status, body = complete(url, **request)
    assert status == 504 and body['error']['code'] == 'timeout'
    assert load.becomes_free(url)
    status, _, events = load.stream(url, request)
    assert status == 200 and events[-2]['error']['code'] == 'timeout' and events[-1] == '[DONE]'


def test_a_failing_engine_is_no_traceback_for_clients(url, engines, monkeypatch):
  def fail(*args):
    raise OSError('the database is gone')

  with monkeypatch.context() as patch:
    patch.setattr(engines['calm']._retriever, 'neighbors_of', fail)
    status, body = complete(url, prompt=PROMPT, max_tokens=5)
    assert status == 500 and 'gone' not in json.dumps(body)
    _, _, events = load.stream(url, {'prompt': PROMPT, 'max_tokens': 5})
    assert events[-2]['error']['type'] == 'server_error' and events[-1] == '[DONE]'
  assert complete(url, prompt=PROMPT, max_tokens=5)[0] == 200


def test_under_load_no_text_is_lost_or_mixed_up(url):
  requests = load.make_requests(url, 24)[::3]
  texts = load.alone(url, requests)
  assert len(set(texts)) > 3
  counts = load.load(url, requests, texts, seconds=3, clients=8)
  assert not counts.wrong and counts.right > 5
  assert load.becomes_free(url)


def test_metrics_count(url):
  def value(name: str) -> float:
    text = load.get(url, '/metrics').decode()
    found = re.search(rf'^{re.escape(name)} (\S+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0

  names = ['retro_requests_total{outcome="length"}', 'retro_requests_total{outcome="400"}',
           'retro_tokens_written_total{database="calm"}', 'retro_prompt_tokens_total',
           'retro_request_seconds_count', 'retro_first_text_seconds_count',
           'retro_part_seconds_count{database="calm",part="search"}']
  before = [value(name) for name in names]
  complete(url, prompt=PROMPT, max_tokens=7)
  complete(url, prompt=3)
  prompt = len(worlds.vocabulary().encode(PROMPT))
  grown = [value(name) - old for name, old in zip(names, before)]
  assert grown[:6] == [1, 1, 7, prompt, 1, 1] and grown[6] >= 1
  assert value('retro_slots{database="calm"}') == SLOTS
  assert 0 < value('retro_part_seconds_sum{database="calm",part="search"}') <= value(
      'retro_part_seconds_sum{database="calm",part="step"}')


def test_the_page_may_only_run_its_own_script(url):
  for path in ('/', '/page.js', '/page.css', '/v1/models', '/nowhere'):
    connection = load.connect(url)
    connection.request('GET', path)
    response = connection.getresponse()
    content, policy = response.read().decode(), response.headers['content-security-policy']
    connection.close()
    assert "default-src 'none'" in policy and 'unsafe' not in policy
    assert "script-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert response.headers['x-content-type-options'] == 'nosniff'
  script = load.get(url, '/page.js').decode()
  assert not re.search(r'innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b', script)
  content = load.get(url, '/').decode()
  assert not re.search(r'<script>|\son\w+=|style=|https?://', content)


STATUS = 'document.getElementById("status").textContent'


def test_the_page_in_a_browser(url, tmp_path: Path):
  path = browser.find()
  if path is None:
    print('skipped: no chromium or google-chrome is installed, so no page was opened in one')
    pytest.skip('no chromium or google-chrome is installed')
  with DrivenBrowser(path, tmp_path / 'profile') as page:
    page.size(360, 740, phone=True)
    page.open(url)
    page.wait('document.getElementById("database").options.length === 3')
    title = page.look('document.title')
    # By keyboard: the prompt has the focus; the hostile database is in the second pane.
    assert page.look('document.activeElement.id') == 'prompt'
    page.type('<img src=x onerror="document.title=1"> of a model layer')
    page.look('(() => { document.getElementById("max_tokens").value = 30;'
              'document.getElementById("database").selectedIndex = 2; })()')
    page.press('Enter', CONTROL)
    page.wait(f'{STATUS} === "done"')
    panes = page.look('[...document.querySelectorAll(".pane")].map((pane) => ['
                      'pane.querySelector("h2").textContent,'
                      'pane.querySelector(".continuation").textContent,'
                      'pane.querySelectorAll(".neighbor").length])')
    for (heading, text, neighbors), name in zip(panes, ('calm', 'hostile')):
      status, whole = complete(
          url, prompt='<img src=x onerror="document.title=1"> of a model layer', max_tokens=30,
          temperature=0.7, top_p=0.9, database=name)
      assert heading == f'with neighbours from {name}'
      assert [c for c in text if c.isalnum()] == [
          c for c in whole['choices'][0]['text'] if c.isalnum()]
      assert neighbors == sum(len(chunk['read']) for chunk in whole['retrieval']['chunks']) > 0
    assert page.look('document.querySelectorAll("mark").length') > 0
    # What documents say does nothing, and nothing is wider than the phone.
    assert page.look('document.title') == title
    assert page.look('document.querySelectorAll("img, iframe, svg, a, meta[http-equiv]").length'
                     ) == 0
    shown = page.look('document.body.textContent')
    assert '<script>document.title="HACKED"</script>' in shown
    assert not [sign for sign in hostile.ACTING if sign in shown]
    assert page.look('document.documentElement.scrollWidth <= innerWidth')
    # Without neighbours, from the address alone; and stopped by a key.
    page.open(f'{url}/?prompt=a&retrieval=0&max_tokens=5&temperature=0&go=1')
    page.wait(f'{STATUS} === "done"')
    assert page.look('document.querySelectorAll(".neighbor").length') == 0
    assert page.look('document.querySelector(".pane h2").textContent') == 'without neighbours'
    page.open(f'{url}/?prompt=a&max_tokens=400&go=1')
    page.wait('document.querySelector(".continuation")?.textContent.length > 0')
    page.press('Escape')
    page.wait(f'{STATUS} === "stopped"')
    assert load.becomes_free(url)
    # A mistake is shown.
    page.open(f'{url}/?prompt=a&seed=-1&go=1')
    page.wait(f'{STATUS} === "not everything was written"')
    assert 'seed is -1' in page.look('document.querySelector(".pane .error").textContent')
