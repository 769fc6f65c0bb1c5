"""What a client may ask for and how long it may take; and how a body is read within that.

What a body says is protocol.py's business; who waits for whom, service.py's.
"""

import asyncio
import dataclasses

from starlette.requests import Request

from retro_jax.errors import UserError
from retro_jax.serving.protocol import ApiError


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
  """What is too much.

  Attributes:
    body_bytes: of a request.
    header_bytes: of its first line and headers.
    prompt_tokens: of a prompt; what is beyond the model's window is read and forgotten.
    max_tokens: that may be asked for.
    waiting: requests to a database that may wait for a slot; the next one is refused (429).
    arrival_seconds: for a request to arrive, headers and body each.
    answer_seconds: for an answer, from the whole request to the last token.
    drain_seconds: that answers may go on after SIGTERM.
  """
  body_bytes: int = 262_144
  header_bytes: int = 16_384
  prompt_tokens: int = 8_192
  max_tokens: int = 1_024
  waiting: int = 32
  arrival_seconds: float = 10
  answer_seconds: float = 300
  drain_seconds: float = 30

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value, least = getattr(self, field.name), 0 if field.name == 'waiting' else 1
      if not isinstance(value, (int, float)) or not value >= least:
        raise UserError(f'LimitsConfig: {field.name} is {value!r}, expected a number, at least '
                        f'{least}')


async def read_body(request: Request, limits: LimitsConfig) -> bytes:
  """The whole body of a JSON request.

  Raises:
    ApiError: another type of content, too many bytes, or not there in time.
    ClientDisconnect: the client left.
  """
  kind = request.headers.get('content-type', '').split(';')[0].strip().lower()
  if kind != 'application/json':
    raise ApiError(415, f'content-type is {kind[:80]!r}; send application/json',
                   code='unsupported_media_type')
  size = request.headers.get('content-length', '')
  if size.isdigit() and int(size) > limits.body_bytes:
    raise _too_large(limits)
  body = bytearray()
  try:
    async with asyncio.timeout(limits.arrival_seconds):
      async for part in request.stream():
        body += part
        if len(body) > limits.body_bytes:
          raise _too_large(limits)
  except TimeoutError:
    raise ApiError(408, f'the body did not arrive within {limits.arrival_seconds:g} seconds',
                   code='timeout') from None
  return bytes(body)


def _too_large(limits: LimitsConfig) -> ApiError:
  return ApiError(413, f'the body has more than {limits.body_bytes:,} bytes',
                  code='request_too_large')
