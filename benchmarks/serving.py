"""A server under load: 8 clients for a minute, some of whom hang up; then a full queue.

  python benchmarks/serving.py [--seconds=60] [--clients=8] [--output=FILE.json] -- \\
      --gin_file=gin/runs/serve.gin --gin.RUN_DIR=... --gin.VOCABULARY=... --gin.DATABASES=...

Starts `python -m retro_jax.serve` with what follows `--`, on a free port of this machine. Each of
a set of requests (prompts, seeds, databases, neighbours or none) is first answered alone. Then
clients send them in random order; every streamed text must be the one written alone, a tenth of
the clients hang up after a few events, and the server's memory is read every second. Then more
requests come at once than may wait. Prints JSON; exit code 1 if a text was wrong or lost, an
answer was an error, memory grew by more than 5 % from the third quarter to the last, no request
was refused, a slot stayed taken or the server did not end with 0 on SIGTERM.
"""

import argparse
import dataclasses
import http.client
import json
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

PROMPTS = ('import numpy as np\n\n\ndef', 'class Layer:\n  """A layer.', '', 'for key, value in',
           'def build(self, input_shape):\n    self.built = True\n    return')
MOST_GROWTH = 0.05


@dataclasses.dataclass
class Counts:
  """What clients saw.

  Attributes:
    right: streams whose text was the one written alone.
    hung_up: streams that the client left.
    refused: answers 429 with the header Retry-After.
    wrong: everything else, in words.
    seconds: of the right ones.
  """
  right: int = 0
  hung_up: int = 0
  refused: int = 0
  wrong: list[str] = dataclasses.field(default_factory=list)
  seconds: list[float] = dataclasses.field(default_factory=list)


def connect(url: str) -> http.client.HTTPConnection:
  return http.client.HTTPConnection(urlparse(url).netloc, timeout=300)


def get(url: str, path: str) -> bytes:
  """The body of a page."""
  connection = connect(url)
  connection.request('GET', path)
  body = connection.getresponse().read()
  connection.close()
  return body


def post(url: str, body: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
  """Sends a completion request; the answer is still to be read."""
  connection = connect(url)
  connection.request('POST', '/v1/completions', json.dumps(body),
                     {'content-type': 'application/json'})
  return connection, connection.getresponse()


def stream(url: str, body: Mapping[str, Any], leave_after: int = 0
           ) -> tuple[int, Mapping[str, str], list[Any]]:
  """Status, headers and events of a streamed completion.

  Args:
    url: of the server.
    body: of the request, but 'stream'.
    leave_after: hangs up after so many events; 0 reads all.
  """
  connection, response = post(url, {**body, 'stream': True})
  try:
    if response.status != 200:
      return response.status, dict(response.headers), [json.loads(response.read())]
    events = []
    for line in response:
      if not line.startswith(b'data: '):
        continue
      data = line[6:].strip()
      events.append(data.decode() if data == b'[DONE]' else json.loads(data))
      if len(events) == leave_after:
        break
    return 200, dict(response.headers), events
  finally:
    response.close()
    connection.close()


def text_of(events: Sequence[Any]) -> str | None:
  """The text of a whole stream; None if it did not end well."""
  if not events or events[-1] != '[DONE]' or 'error' in events[-2]:
    return None
  return ''.join(event['choices'][0]['text'] for event in events[:-1])


def make_requests(url: str, tokens: int) -> list[dict[str, Any]]:
  """Requests of all kinds that the server answers."""
  model = json.loads(get(url, '/v1/models'))['data'][0]
  ways = [{'retrieval': False}]
  for database in model['databases']:
    ways += [{'database': database}, {'database': database, 'k': 1}]
  return [{'prompt': prompt, 'max_tokens': tokens - 3 * i, 'temperature': 0.8, 'seed': seed, **way}
          for i, prompt in enumerate(PROMPTS) for seed, way in enumerate(ways)]


def alone(url: str, requests: Sequence[Mapping[str, Any]]) -> list[str]:
  """The text of each request, one after another."""
  texts = []
  for request in requests:
    connection, response = post(url, request)
    texts.append(json.loads(response.read())['choices'][0]['text'])
    connection.close()
  return texts


def load(url: str, requests: Sequence[Mapping[str, Any]], texts: Sequence[str], seconds: float,
         clients: int) -> Counts:
  """Clients that send requests until the time is over."""
  counts, lock, end = Counts(), threading.Lock(), time.monotonic() + seconds

  def client(number: int) -> None:
    rng = random.Random(number)
    while time.monotonic() < end:
      which = rng.randrange(len(requests))
      leaves = rng.randint(1, 5) if rng.random() < 0.1 else 0
      begin = time.perf_counter()
      try:
        status, headers, events = stream(url, requests[which], leaves)
      except (OSError, http.client.HTTPException, ValueError) as error:
        status, headers, events = 0, {}, [repr(error)]
      with lock:
        if status == 200 and leaves and len(events) == leaves:
          counts.hung_up += 1
        elif status == 200 and text_of(events) == texts[which]:
          counts.right += 1
          counts.seconds.append(time.perf_counter() - begin)
        elif status == 429 and headers.get('retry-after', '').isdigit():
          counts.refused += 1
        else:
          counts.wrong.append(f'{status}: {requests[which]} gave {events[-2:]}'[:1000])

  threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return counts


def taken(url: str) -> float:
  """Requests that have a slot or wait for one, by the server's metrics."""
  lines = get(url, '/metrics').decode().splitlines()
  return sum(float(line.rsplit(' ', 1)[1]) for line in lines
             if line.startswith(('retro_queue_length', 'retro_active_slots')))


def becomes_free(url: str, seconds: float = 30) -> bool:
  """Whether no request has a slot or waits any more, within some seconds."""
  end = time.monotonic() + seconds
  while taken(url):
    if time.monotonic() > end:
      return False
    time.sleep(0.05)
  return True


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--seconds', type=float, default=60)
  parser.add_argument('--clients', type=int, default=8)
  parser.add_argument('--tokens', type=int, default=48, help='of the longest text')
  parser.add_argument('--output', type=Path, help='JSON file for the numbers')
  parser.add_argument('server', nargs='+', help='settings of the server, after --')
  args = parser.parse_args()
  server = subprocess.Popen(
      [sys.executable, '-m', 'retro_jax.serve', *args.server, '--gin.SERVE_PORT=0',
       '--gin.LimitsConfig.waiting=8'], stdout=subprocess.PIPE, text=True)
  try:
    result = measure(server, args)
  finally:
    server.kill()
  print(json.dumps(result, indent=2))
  if args.output:
    args.output.write_text(json.dumps(result, indent=2) + '\n')
  sys.exit(0 if result['passed'] else 1)


def measure(server: subprocess.Popen, args: argparse.Namespace) -> dict[str, Any]:
  line = server.stdout.readline()
  if ' at http' not in line:
    raise SystemExit(f'the server did not start: {line}')
  url = line.split(' at ')[1].split()[0]
  while b'"ready"' not in get(url, '/readyz'):
    time.sleep(0.2)
  requests = make_requests(url, args.tokens)
  texts = alone(url, requests)
  memory, over = [], threading.Event()

  def watch() -> None:
    while not over.wait(1):
      memory.append(_resident(server.pid))

  watcher = threading.Thread(target=watch)
  watcher.start()
  counts = load(url, requests, texts, args.seconds, args.clients)
  over.set()
  watcher.join()
  free = becomes_free(url)
  # Everybody at once, to one database: a slot or a place in the queue, or a refusal.
  crowd = load(url, requests[:1], texts[:1], 1, 64)
  free = becomes_free(url) and free
  tokens = [line for line in get(url, '/metrics').decode().splitlines() if 'tokens_written' in line]
  server.send_signal(signal.SIGTERM)
  code = server.wait(timeout=60)
  # Memory goes up and down with the garbage of requests, so that quarters are compared.
  third, last = (memory[len(memory) * i // 4:len(memory) * (i + 1) // 4] for i in (2, 3))
  growth = statistics.median(last) / statistics.median(third) - 1
  return {
      'passed': not counts.wrong and not crowd.wrong and free and code == 0 and counts.right > 0
                and crowd.refused > 0 and growth <= MOST_GROWTH,
      'clients': args.clients, 'seconds': args.seconds, 'right': counts.right,
      'hung_up': counts.hung_up, 'wrong': counts.wrong + crowd.wrong,
      'refused_under_load': counts.refused, 'median_seconds': statistics.median(counts.seconds),
      'crowd': {'right': crowd.right, 'refused': crowd.refused}, 'slots_free_again': free,
      'resident_mib': [round(value / 2**20) for value in memory], 'growth_of_last_quarter': growth,
      'tokens': tokens[2:], 'exit_code': code}


def _resident(pid: int) -> int:
  """Bytes of a process in memory."""
  pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
  return pages * 4096


if __name__ == '__main__':
  main()
