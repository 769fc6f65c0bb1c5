"""The checks on a worker, good and bad; workers meet over real sockets."""

import http.server
import socket
import subprocess
import sys
import threading
from importlib import metadata

import pytest

from retro_jax import preflight
from tests.launch import scripts


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def call(*arguments, **variables):
  return subprocess.run([sys.executable, '-m', 'retro_jax.preflight', *map(str, arguments)],
                        cwd=scripts.ROOT, text=True, capture_output=True, check=False, timeout=60,
                        env={'PYTHONPATH': str(scripts.ROOT), 'HOME': '/tmp', **variables})


def meet(numbers, hosts, seconds):
  """What each of the workers `numbers` says."""
  port, said = free_port(), {}

  def one(number):
    try:
      said[number] = preflight.check_workers(hosts, number, port, seconds)
    except preflight.Failed as error:
      said[number] = error

  threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return said


def test_all_is_well(tmp_path):
  result = call('--run_dir', tmp_path / 'run', '--min_free_gb', '0.01')
  lines = result.stdout.splitlines()
  assert result.returncode == 0, result.stdout + result.stderr
  assert [line.split(': ')[:3] for line in lines] == [
      ['preflight', name, 'ok'] for name in ('workers', 'versions', 'disk', 'run folder')]
  assert not list((tmp_path / 'run').iterdir())


def test_what_failed_is_named_with_what_to_do(tmp_path):
  (tmp_path / 'file').touch()
  result = call('--run_dir', tmp_path / 'file' / 'run', '--min_free_gb', '1e9')
  assert result.returncode == 2
  assert 'disk, run folder' in result.stderr and len(result.stderr.splitlines()) == 1
  assert 'free space there' in result.stdout and 'needs to read and write' in result.stdout


def test_other_versions_are_named(tmp_path):
  major, minor, *_ = sys.version_info
  (tmp_path / f'py{major}{minor}.txt').write_text('jax==0.0.1\nno-such==1\nflax==0.0.2\n')
  with pytest.raises(preflight.Failed, match='jax is [0-9.]+, expected 0.0.1; flax is') as error:
    preflight.check_versions(tmp_path)
  assert 'no-such' not in str(error.value) and 'make environment' in str(error.value)


def test_libtpu_is_the_one_that_jax_asks_for(monkeypatch):
  real = metadata.version
  for installed, words in (('0.0.1', 'libtpu is 0.0.1, expected =='), (None, 'libtpu is missing')):

    def version(name, installed=installed):
      if name != 'libtpu':
        return real(name)
      if installed is None:
        raise metadata.PackageNotFoundError(name)
      return installed

    monkeypatch.setattr(metadata, 'version', version)
    with pytest.raises(preflight.Failed, match=words):
      preflight.check_versions(tpu=True)


def test_another_python_is_named():
  with pytest.raises(preflight.Failed, match='Python 3.10, tested are 3.11, 3.12'):
    preflight.check_versions(python=(3, 10, 1))


def test_three_workers_meet():
  said = meet([2, 0, 1], ['127.0.0.1'] * 3, 20)
  assert said[0].startswith('all 3 workers') and said[2].startswith('worker 2 of 3'), said


def test_the_missing_worker_is_named():
  said = meet([0, 1], ['127.0.0.1', '127.0.0.1', '10.1.2.3'], 1)
  assert isinstance(said[0], preflight.Failed) and 'worker 2 (10.1.2.3)' in str(said[0])
  assert '1 (' not in str(said[0]) and isinstance(said[1], str)


def test_a_missing_worker_0_is_exit_code_69(tmp_path):
  result = call('--hosts', '127.0.0.1,127.0.0.1', '--process_id', '1', '--port', free_port(),
                '--seconds', '0.5', '--min_free_gb', '0.01')
  assert result.returncode == 69 and 'see that worker 0 is up' in result.stdout, result.stdout


def test_a_taken_port_is_said():
  with socket.create_server(('127.0.0.1', 0)) as taken:
    with pytest.raises(preflight.Failed, match='stop it first'):
      preflight.check_workers(['127.0.0.1'] * 2, 0, taken.getsockname()[1], 1)


def test_which_worker_this_is(monkeypatch):
  monkeypatch.delenv('TPU_WORKER_ID', raising=False)
  assert preflight.own_number(['203.0.113.1', '127.0.0.1'], None) == 1
  with pytest.raises(preflight.Failed, match='give --process_id'):
    preflight.own_number(['203.0.113.1', '203.0.113.2'], None)
  monkeypatch.setenv('TPU_WORKER_ID', '0')
  assert preflight.own_number(['203.0.113.1', '127.0.0.1'], None) == 0


@pytest.mark.parametrize('endpoints', ['10.0.0.7,127.0.0.1', 'a:1:10.0.0.7,b:2:127.0.0.1'])
def test_a_tpu_asks_the_metadata_server(monkeypatch, endpoints):
  said = {'worker-network-endpoints': endpoints, 'agent-worker-number': '1'}

  class Server(http.server.BaseHTTPRequestHandler):

    def do_GET(self):
      assert self.headers['Metadata-Flavor'] == 'Google'
      self.send_response(200)
      self.end_headers()
      self.wfile.write(said[self.path.rpartition('/')[2]].encode())

    def log_message(self, *_):
      pass

  with http.server.HTTPServer(('127.0.0.1', 0), Server) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('GCE_METADATA_IP', f'127.0.0.1:{server.server_port}')
    assert preflight.workers_of_slice() == (['10.0.0.7', '127.0.0.1'], 1)
    server.shutdown()
  assert preflight.workers_of_slice() == ([], None)


def test_the_port_is_that_of_jax():
  from jax._src.clusters import cloud_tpu_cluster
  assert cloud_tpu_cluster.coordinator_port == str(preflight.COORDINATOR_PORT)
