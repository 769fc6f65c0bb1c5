"""Sockets and signals: the application under uvicorn, until SIGTERM or SIGINT ends it.

On a signal no connection is taken any more, answers under way are finished, and `run` returns.
"""

import asyncio
import os
import signal
import socket
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from retro_jax.errors import UserError
from retro_jax.serving import protocol
from retro_jax.serving.limits import LimitsConfig
from retro_jax.serving.protocol import ApiError


def listen(host: str, port: int) -> socket.socket:
  """A listening socket; port 0 takes any that is free.

  Raises:
    UserError: the address is not ours or in use.
  """
  if not isinstance(port, int) or not 0 <= port < 65536:
    raise UserError(f'port is {port!r}, expected 0 (any) to 65535')
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family, backlog=256)
  except (OSError, UnicodeError) as error:
    known = isinstance(error, OSError) and not isinstance(error, socket.gaierror)
    reason = os.strerror(error.errno) if known else 'no such host'
    raise UserError(f'{host}:{port}: cannot listen there ({reason}); '
                    'set SERVE_HOST or SERVE_PORT') from None


def make_server(app: Starlette, limits: LimitsConfig) -> uvicorn.Server:
  """uvicorn around the application."""
  class Protocol(_Protocol):
    arrival_seconds = limits.arrival_seconds

  return uvicorn.Server(uvicorn.Config(
      app, http=Protocol, ws='none', loop='asyncio', access_log=False, log_level='warning',
      h11_max_incomplete_event_size=limits.header_bytes, server_header=False,
      timeout_graceful_shutdown=max(1, round(limits.drain_seconds))))


def run(app: Starlette, listener: socket.socket, limits: LimitsConfig) -> None:
  """Serves until a signal; returns when the last answer is given or drain_seconds are over."""
  # uvicorn raises the signals that it took once more when it has ended; they have done their work.
  before = {number: signal.signal(number, lambda *_: None)
            for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    make_server(app, limits).run(sockets=[listener])
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


class _Protocol(H11Protocol):
  """HTTP/1.1 of uvicorn, with a limit for how long a request's first line and headers may take.

  What is no HTTP gets an answer in JSON, as everything else does.
  """

  arrival_seconds: float
  _waiting: asyncio.TimerHandle | None = None

  def connection_made(self, transport: Any) -> None:
    super().connection_made(transport)
    self._waiting = self.loop.call_later(self.arrival_seconds, self._late)

  def connection_lost(self, exc: Exception | None) -> None:
    self._no_longer_waiting()
    super().connection_lost(exc)

  def data_received(self, data: bytes) -> None:
    cycle = self.cycle
    super().data_received(data)
    if self.cycle is not cycle:
      self._no_longer_waiting()
    elif self._waiting is None and self.conn.their_state is h11.IDLE:
      self._waiting = self.loop.call_later(self.arrival_seconds, self._late)

  def send_400_response(self, msg: str) -> None:
    if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
      self.transport.close()  # an answer is already on its way
      return
    error = ApiError(400, 'this is no HTTP request, or its headers are too long', None,
                     'invalid_http')
    body = protocol.dumps(error.body)
    for event in (h11.Response(status_code=400, reason=b'Bad Request', headers=[
        (b'content-type', b'application/json'), (b'content-length', str(len(body)).encode()),
        (b'connection', b'close')]), h11.Data(data=body), h11.EndOfMessage()):
      self.transport.write(self.conn.send(event))
    self.transport.close()

  def _late(self) -> None:
    self._waiting = None
    if self.conn.our_state is h11.IDLE:
      self.transport.close()

  def _no_longer_waiting(self) -> None:
    if self._waiting is not None:
      self._waiting.cancel()
      self._waiting = None
