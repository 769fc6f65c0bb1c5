"""What must be true on a worker before a run starts: python -m retro_jax.preflight --help.

Checks versions, the run folder, free disk and that workers reach each other; a line for each.
Launchers run it on every worker at the same time. Nothing here touches an accelerator, which
only one process may hold.
"""

import argparse
import contextlib
import os
import shutil
import socket
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from packaging import requirements

from retro_jax import errors, files

# Where JAX's coordinator listens on a Cloud TPU; it is free before the run.
COORDINATOR_PORT = 8482
# Launchers may try again when a worker was missing, never when the worker itself is wrong.
WORKER_MISSING = errors.ProcessMissing.exit_code
REQUIRED = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'gin-config', 'tensorflow',
            'seqio', 'numpy')
_HELLO = b'retro_jax preflight '
_CONSTRAINTS = Path(__file__).resolve().parent.parent / 'constraints'


class Failed(Exception):
  """What is wrong and what to do, in one line."""


def check_versions(constraints: Path = _CONSTRAINTS, tpu: bool = False,
                   python: tuple[int, ...] = tuple(sys.version_info[:3])) -> str:
  """The installed packages are those that were tested together.

  Args:
    constraints: folder of the pinned versions, one file for each Python.
    tpu: whether libtpu must be there too.
    python: the interpreter's version.

  Raises:
    Failed: another Python, or packages of other versions or missing.
  """
  file = constraints / f'py{python[0]}{python[1]}.txt'
  if not file.exists():
    known = ', '.join(f'{f.stem[2]}.{f.stem[3:]}' for f in sorted(constraints.glob('py*.txt')))
    raise Failed(f'Python {python[0]}.{python[1]}, tested are {known}; '
                 'make environment PYTHON=python3.11')
  pinned = dict(line.strip().split('==') for line in file.read_text().splitlines()
                if '==' in line and not line.startswith('#'))
  pinned = {name.lower().replace('_', '-'): version for name, version in pinned.items()}
  wrong = []
  for name, version in pinned.items():
    try:
      found = metadata.version(name)
    except metadata.PackageNotFoundError:
      if name in REQUIRED:
        wrong.append(f'{name} is missing, expected {version}')
      continue
    if found != version:
      wrong.append(f'{name} is {found}, expected {version}')
  wrong += _wrong_libtpu() if tpu else []
  if wrong:
    more = f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''
    raise Failed(f'{"; ".join(wrong[:4])}{more} ({file.name}); install anew with make environment')
  return f'Python {".".join(map(str, python))}, jax {pinned.get("jax")}, all as in {file.name}'


def _wrong_libtpu() -> list[str]:
  """What is wrong with libtpu; no file pins it, the installed jax says which one it needs."""
  asked = next((r for r in map(requirements.Requirement, metadata.requires('jax') or ())
                if r.name == 'libtpu'), None)
  expected = str(asked.specifier) if asked else 'any'
  try:
    found = metadata.version('libtpu')
  except metadata.PackageNotFoundError:
    return [f'libtpu is missing, expected {expected} (make environment EXTRAS=tpu)']
  good = asked is None or asked.specifier.contains(found)
  return [] if good else [f'libtpu is {found}, expected {expected}']


def check_run_folder(run_dir: str) -> str:
  """A file can be written to `run_dir` and read again; leaves nothing behind.

  Raises:
    Failed: it cannot, or other bytes came back.
  """
  path = files.join(run_dir, f'.preflight-{uuid.uuid4().hex}')
  content = path.encode()
  try:
    if not files.is_remote(run_dir):
      os.makedirs(run_dir, exist_ok=True)
    files.write_bytes(path, content)
    back = files.read_bytes(path)
    files.remove_tree(path)
  except (errors.UserError, OSError) as error:
    raise Failed(f'{error}; the worker needs to read and write there (for a bucket: its service '
                 'account needs roles/storage.objectAdmin)') from None
  if back != content:
    raise Failed(f'{run_dir}: other bytes were read than written; choose another folder')
  return f'{run_dir} can be written and read'


def check_disk(folder: str, gigabytes: float) -> str:
  """There is room for caches and logs.

  Raises:
    Failed: less than `gigabytes` are free where `folder` lies.
  """
  free = shutil.disk_usage(folder).free / 1e9
  if free < gigabytes:
    raise Failed(f'{free:.1f} GB free in {folder}, expected {gigabytes:g}; free space there')
  return f'{free:.0f} GB free in {folder}'


def metadata_of_slice(name: str) -> str | None:
  """What a Cloud TPU's metadata server says, where JAX too reads it; None elsewhere."""
  server = os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')
  request = urllib.request.Request(
      f'http://{server}/computeMetadata/v1/instance/attributes/{name}',
      headers={'Metadata-Flavor': 'Google'})
  for _ in range(3):
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as response:
      return response.read().decode().strip()
  return None


def workers_of_slice() -> tuple[list[str], int | None]:
  """(addresses of all workers, which of them this is), as the metadata server says."""
  # An address each, or name:number:address.
  said = metadata_of_slice('worker-network-endpoints') or ''
  hosts = [entry.rsplit(':', 1)[-1].strip() for entry in said.split(',') if entry.strip()]
  number = metadata_of_slice('agent-worker-number') if hosts else None
  return hosts, int(number) if number and number.isdigit() else None


def own_number(hosts: Sequence[str], number: int | None) -> int:
  """Which of `hosts` this is: as given, as TPU_WORKER_ID says, or whose address is ours.

  Raises:
    Failed: none of them.
  """
  if number is None and (variable := os.environ.get('TPU_WORKER_ID', '')).isdigit():
    number = int(variable)
  if number is None:
    for i, host in enumerate(hosts):
      with contextlib.suppress(OSError), socket.socket() as s:
        s.bind((host, 0))  # only an address of this machine can be bound
        return i
  if number is None or not 0 <= number < len(hosts):
    raise Failed(f'this worker is none of {", ".join(hosts)}; give --process_id')
  return number


def check_workers(hosts: Sequence[str], number: int, port: int, seconds: float) -> str:
  """Every worker reaches worker 0 at the coordinator's port; needs all to run this together.

  Worker 0 listens and answers, so that it too knows who did not come.

  Raises:
    Failed: the port is taken or closed, or workers are missing.
  """
  if len(hosts) < 2:
    return 'only one worker'
  deadline = time.monotonic() + seconds
  if number == 0:
    return _listen(hosts, port, deadline, seconds)
  problem = 'no answer'
  while time.monotonic() < deadline:
    try:
      with socket.create_connection((hosts[0], port), timeout=5) as s:
        s.sendall(_HELLO + f'{number}\n'.encode())
        if s.makefile('rb').readline() == _HELLO + b'ok\n':
          return f'worker {number} of {len(hosts)} reaches {hosts[0]}:{port}'
        problem = 'another program answers there'
    except OSError as error:
      problem = str(error)
    time.sleep(0.2)
  raise Failed(f'{hosts[0]}:{port} cannot be reached within {seconds:g} s ({problem}); see that '
               f'worker 0 is up, and that the network lets workers reach its port {port}')


def _listen(hosts: Sequence[str], port: int, deadline: float, seconds: float) -> str:
  missing = set(range(1, len(hosts)))
  with contextlib.ExitStack() as stack:
    try:
      server = stack.enter_context(socket.create_server(('', port), reuse_port=False))
    except OSError as error:
      raise Failed(f'port {port} cannot be listened at ({error.strerror}); an earlier run may '
                   'still be there: stop it first') from None
    while missing and (left := deadline - time.monotonic()) > 0:
      server.settimeout(left)
      with contextlib.suppress(OSError):
        connection, _ = server.accept()
        with connection:
          connection.settimeout(5)
          line = connection.makefile('rb').readline()
          if line.startswith(_HELLO) and line[len(_HELLO):].strip().isdigit():
            connection.sendall(_HELLO + b'ok\n')
            missing.discard(int(line[len(_HELLO):]))
  if missing:
    who = ', '.join(f'{i} ({hosts[i]})' for i in sorted(missing))
    raise Failed(f'nothing heard from worker {who} within {seconds:g} s; see that it is up and '
                 f'that the network lets it reach {hosts[0]}:{port}')
  return f'all {len(hosts)} workers reach {hosts[0]}:{port}'


def main(argv: Sequence[str] | None = None) -> int:
  """Runs all checks; 0, 2 when this worker is not as it should be, 69 when another is missing."""
  parser = argparse.ArgumentParser(prog='python -m retro_jax.preflight', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--run_dir', default='', help='the run folder, on a disk or in a bucket')
  parser.add_argument('--hosts', help='addresses of all workers in order, comma-separated '
                      '(default: $TPU_WORKER_HOSTNAMES, with --tpu the metadata server\'s, '
                      'else this worker is alone)')
  parser.add_argument('--process_id', type=int, help='which of them this is')
  parser.add_argument('--port', type=int, default=COORDINATOR_PORT, help='the coordinator\'s port')
  parser.add_argument('--seconds', type=float, default=120, help='to wait for the other workers')
  parser.add_argument('--min_free_gb', type=float, default=10, help='in the home folder')
  parser.add_argument('--tpu', action='store_true', help='this is a TPU\'s worker: it needs libtpu')
  options = parser.parse_args(argv)
  named = os.environ.get('TPU_WORKER_HOSTNAMES', '') if options.hosts is None else options.hosts
  hosts = [host.strip() for host in named.split(',') if host.strip()]

  def workers() -> str:
    everybody, number = hosts, options.process_id
    if not everybody and options.tpu:
      everybody, found = workers_of_slice()
      number = found if number is None else number
      if not everybody:
        raise Failed('neither TPU_WORKER_HOSTNAMES nor the metadata server names the workers; '
                     'give --hosts and --process_id')
    if not everybody:
      return 'only one worker is known; --hosts names them'
    return check_workers(everybody, own_number(everybody, number), options.port, options.seconds)

  # The others wait for this worker: they are told it is there before slower checks.
  checks: dict[str, Callable[[], str]] = {
      'workers': workers,
      'versions': lambda: check_versions(tpu=options.tpu),
      'disk': lambda: check_disk(os.path.expanduser('~'), options.min_free_gb),
  }
  if options.run_dir:
    checks['run folder'] = lambda: check_run_folder(options.run_dir)
  failed = []
  for name, check in checks.items():
    try:
      print(f'preflight: {name}: ok: {check()}', flush=True)
    except Failed as error:
      print(f'preflight: {name}: FAILED: {error}', flush=True)
      failed.append(name)
  if failed:
    print(f'error: preflight failed on {socket.gethostname()}: {", ".join(failed)}; see above',
          file=sys.stderr, flush=True)
    return WORKER_MISSING if failed == ['workers'] else errors.EXIT_CODE
  return 0


if __name__ == '__main__':
  sys.exit(main())
