"""The routes: completions (whole or as events), models, health, metrics, the page.

Every answer that is no success is JSON with one line of why, and every answer forbids the browser
what the page does not need. What a request says is read in protocol.py; sockets are server.py's.
"""

import asyncio
import contextlib
import importlib.resources
import time
import uuid
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retro_jax.generation.requests import ChunkRead, Finished, TextPiece
from retro_jax.serving import limits, metrics, protocol
from retro_jax.serving.protocol import Answer, ApiError
from retro_jax.serving.service import ClientGone, Service, Work

_PAGE = {'/': ('index.html', 'text/html'), '/page.css': ('page.css', 'text/css'),
         '/page.js': ('page.js', 'text/javascript')}
# The page runs its own script and talks to its own server, nothing else.
_HEADERS = {
    'content-security-policy': "default-src 'none'; script-src 'self'; style-src 'self'; "
                               "connect-src 'self'; img-src data:; base-uri 'none'; "
                               "form-action 'none'; frame-ancestors 'none'",
    'x-content-type-options': 'nosniff', 'referrer-policy': 'no-referrer',
    'cross-origin-resource-policy': 'same-origin', 'cache-control': 'no-store'}
_LOOPBACK = ('localhost', '127.0.0.1', '::1')
_STALL_SECONDS = 10


def make_app(service: Service, loopback: bool = True) -> Starlette:
  """The application.

  Args:
    service: started by whoever made it.
    loopback: only requests to a name of this machine itself are answered, so that no page of
      another site can reach the server under a name of its own (DNS rebinding).
  """
  created = int(time.time())

  async def completions(request: Request) -> ASGIApp:
    try:
      body = await limits.read_body(request, service.limits)
      work = service.submit(protocol.parse(body, service.served))
    except ApiError as error:
      service.metrics.requests.labels(str(error.status)).inc()
      raise
    except ClientDisconnect:
      service.metrics.requests.labels('gone').inc()
      return Response(status_code=400)  # nobody reads it
    answer = Answer(f'cmpl-{uuid.uuid4().hex}', service.served.model, int(time.time()), work.asked,
                    service.vocabulary)
    return _Stream(service, work, answer) if work.asked.stream else _Whole(service, work, answer)

  async def models(request: Request) -> Response:
    del request
    served = service.served
    return _json({'object': 'list', 'data': [{
        'id': served.model, 'object': 'model', 'created': created, 'owned_by': 'retro_jax',
        'databases': list(served.databases), 'max_k': served.num_neighbors,
        'max_tokens': served.max_tokens}]})

  async def health(request: Request) -> Response:
    del request
    return _json({'status': 'ok'})

  async def ready(request: Request) -> Response:
    del request
    if not service.ready:
      raise ApiError(503, 'the model is being compiled', None, 'not_ready', {'retry-after': '1'})
    return _json({'status': 'ready'})

  async def show_metrics(request: Request) -> Response:
    del request
    return Response(service.metrics.text(), headers={'content-type': metrics.CONTENT_TYPE})

  routes = [Route('/v1/completions', completions, methods=['POST']),
            Route('/v1/models', models), Route('/healthz', health), Route('/readyz', ready),
            Route('/metrics', show_metrics)]
  folder = importlib.resources.files('retro_jax.serving') / 'page'
  for path, (name, kind) in _PAGE.items():
    routes.append(Route(path, _file((folder / name).read_bytes(), kind)))

  @contextlib.asynccontextmanager
  async def lifespan(app: Starlette) -> AsyncIterator[None]:
    del app
    yield
    await asyncio.to_thread(service.stop)

  return Starlette(
      routes=routes, lifespan=lifespan,
      middleware=[Middleware(_Guard, loopback=loopback,
                             header_bytes=service.limits.header_bytes)],
      exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _defect})


class _Whole:
  """One JSON object, once the text is there."""

  def __init__(self, service: Service, work: Work, answer: Answer):
    self._service, self._work, self._answer = service, work, answer

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    outcomes = self._service.metrics.requests
    try:
      async with _client(receive, self._work):
        async for event in self._work:
          if isinstance(event, Finished):
            body = await asyncio.to_thread(
                self._answer.whole, event.generation, self._work.prompt_tokens)
      response = _json(body)
      outcomes.labels(body['choices'][0]['finish_reason']).inc()
    except ClientGone:
      outcomes.labels('gone').inc()
      return
    except ApiError as error:
      outcomes.labels(str(error.status)).inc()
      response = _json(error.body, error.status, error.headers)
    await response(scope, receive, send)


class _Stream:
  """Server-sent events as the text comes; the last ones say how it ended and [DONE]."""

  def __init__(self, service: Service, work: Work, answer: Answer):
    self._service, self._work, self._answer = service, work, answer

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    del scope
    outcomes, answer = self._service.metrics.requests, self._answer
    outcome = '500'
    try:
      # A client that reads nothing must not keep the connection for ever.
      async with (asyncio.timeout(self._service.limits.answer_seconds + _STALL_SECONDS),
                  _client(receive, self._work)):
        await send({'type': 'http.response.start', 'status': 200, 'headers': [
            (b'content-type', b'text/event-stream; charset=utf-8'), (b'x-accel-buffering', b'no')]})
        try:
          async for event in self._work:
            match event:
              case TextPiece():
                await _send(send, protocol.event(answer.piece(event.text)))
              case ChunkRead():
                await _send(send, protocol.event(answer.chunk_read(event)))
              case Finished():
                last = await asyncio.to_thread(
                    answer.whole, event.generation, self._work.prompt_tokens, '')
                await _send(send, protocol.event(last))
                outcome = last['choices'][0]['finish_reason']
        except ApiError as error:
          outcome = str(error.status)
          await _send(send, protocol.event(error.body))
        await _send(send, protocol.DONE, more=False)
    except (ClientGone, TimeoutError):
      outcome = 'gone'
    finally:
      outcomes.labels(outcome).inc()


@contextlib.asynccontextmanager
async def _client(receive: Receive, work: Work) -> AsyncIterator[None]:
  """Interrupts the work when the client leaves; afterwards nothing works for it any more."""
  async def watch() -> None:
    while (await receive())['type'] != 'http.disconnect':
      pass
    work.interrupt(ClientGone())

  watcher = asyncio.create_task(watch())
  try:
    yield
  finally:
    watcher.cancel()
    work.cancel()


async def _send(send: Send, data: bytes, more: bool = True) -> None:
  await send({'type': 'http.response.body', 'body': data, 'more_body': more})


class _Guard:
  """Refuses names of other machines and long headers; adds the headers that bind the browser."""

  def __init__(self, app: ASGIApp, loopback: bool, header_bytes: int):
    self._app, self._loopback, self._header_bytes = app, loopback, header_bytes

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return

    async def guarded(message: Message) -> None:
      if message['type'] == 'http.response.start':
        message = message | {'headers': [
            *message['headers'], *((name.encode(), value.encode())
                                   for name, value in _HEADERS.items())]}
      await send(message)

    size = len(scope['raw_path']) + len(scope['query_string']) + sum(
        len(name) + len(value) + 4 for name, value in scope['headers'])
    error = None
    if size > self._header_bytes:
      error = ApiError(431, f'path and headers have more than {self._header_bytes:,} bytes', None,
                       'headers_too_large')
    elif self._loopback and _host(scope) not in _LOOPBACK:
      error = ApiError(403, 'this server answers only to localhost', None, 'wrong_host')
    app = self._app if error is None else _json(error.body, error.status, {'connection': 'close'})
    await app(scope, receive, guarded)


def _host(scope: Scope) -> str:
  """The host a request names, without its port."""
  value = next((value for name, value in scope['headers'] if name == b'host'), b'')
  host = value.decode('latin-1').lower()
  return host[1:].split(']')[0] if host.startswith('[') else host.rsplit(':', 1)[0]


def _file(content: bytes, kind: str):
  async def serve(request: Request) -> Response:
    del request
    return Response(content, media_type=kind)
  return serve


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
  return Response(protocol.dumps(value), status, headers, 'application/json')


async def _api_error(request: Request, error: Exception) -> Response:
  del request
  assert isinstance(error, ApiError)
  # What of the body was not read must not be taken for the next request.
  close = {'connection': 'close'} if error.status in (408, 413, 415) else {}
  return _json(error.body, error.status, error.headers | close)


async def _http_error(request: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  if error.status_code == 404:
    words = 'nothing here; see /v1/completions, /v1/models, /healthz, /readyz, /metrics and /'
  elif error.status_code == 405:
    words = f'{request.method[:20]} is not answered here; see the header Allow'
  else:
    words = error.detail
  said = ApiError(error.status_code, words, None, 'not_found' if error.status_code == 404
                  else 'method_not_allowed' if error.status_code == 405 else None)
  return _json(said.body, said.status, dict(error.headers or {}))


async def _defect(request: Request, error: Exception) -> Response:
  """A defect of ours: the client gets a line, the log the traceback."""
  del request, error
  said = ApiError(500, 'the server failed at this request', None, 'internal_error')
  return _json(said.body, said.status)
