"""The command: python -m retro_jax.serve, to the signal that ends it."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks import serving as load
from retro_jax import configuration, serve
from retro_jax.retrieval.embedders import BertEmbedder, LexicalEmbedder
from retro_jax.serving.limits import LimitsConfig
from tests.generation.test_generate import arguments as arguments  # the fixture

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def command(arguments) -> list[str]:
  databases = {'first': (arguments['DATABASE'], arguments['INDEX']),
               'second': (arguments['DATABASE'], arguments['INDEX'])}
  settings = {'RUN_DIR': arguments['RUN_DIR'], 'VOCABULARY': arguments['VOCABULARY'],
              'DATABASES': repr(databases), 'EMBEDDER': '@LexicalEmbedder()',
              'LexicalEmbedder.dimension': '16', 'SLOTS': '2', 'SEQUENCE_LENGTH': '32',
              'SERVE_PORT': '0', 'LimitsConfig.max_tokens': '5000'}
  return ['--gin_file=gin/runs/serve.gin',
          *(f'--gin.{name}={value}' for name, value in settings.items())]


def test_serves_until_a_signal_and_finishes_what_is_under_way(command):
  server = subprocess.Popen(
      [sys.executable, '-m', 'retro_jax.serve', *command], text=True, cwd=ROOT,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env=os.environ | {'XLA_FLAGS': '--xla_backend_optimization_level=0'})
  try:
    line = server.stdout.readline()
    assert 'serving retro at http://127.0.0.1:' in line and 'first, second' in line
    url = line.split(' at ')[1].split()[0].rstrip('/')
    ends, started = [], threading.Event()

    def ask() -> None:
      connection, response = load.post(url, {
          'prompt': 'a', 'max_tokens': 300, 'temperature': 0, 'stream': True, 'k': 1,
          'database': 'second'})
      for line in response:
        started.set()
        ends.append(line)
      connection.close()

    client = threading.Thread(target=ask)
    client.start()
    assert started.wait(timeout=300)
    server.send_signal(signal.SIGTERM)
    client.join()
    assert b'"finish_reason":"' in ends[-4] and ends[-2] == b'data: [DONE]\n'
    assert server.wait(timeout=60) == 0
    assert server.stdout.read() == 'ended\n' and 'Traceback' not in server.stderr.read()
  finally:
    server.kill()


def run(argv: list[str]) -> None:
  configuration.main(serve.ServeJob, serve.run, (LimitsConfig, BertEmbedder, LexicalEmbedder), argv)


@pytest.mark.parametrize('name, value, words', [
    ('DATABASES', "{'a': '/nowhere'}", 'expected a name and (DATABASE, INDEX)'),
    ('DATABASES', "{'a': ('/nowhere', '/nowhere')}", 'no chunk-database there'),
    ('DATABASES', '3', "expected {'NAME'"), ('SERVE_PORT', '99999', 'port'),
    ('SERVE_HOST', 'no.such.host.invalid', 'cannot listen'), ('SLOTS', '0', 'slots'),
    ('LimitsConfig.waiting', '-1', 'waiting'), ('LimitsConfig.max_tokens', 'many', 'max_tokens'),
    ('RUN_DIR', '/nowhere', 'no trained model'), ('SERVE_HOSTS', 'x', 'SERVE_HOST')])
def test_mistakes_end_with_one_line_and_code_2(command, capsys, name, value, words):
  with pytest.raises(SystemExit) as caught:
    run([*command, f'--gin.{name}={value}'])
  printed = capsys.readouterr().err
  assert caught.value.code == 2
  assert words in printed and printed.count('\n') == 1 and printed.startswith('error: ')


def test_a_port_in_use_is_said_before_anything_is_loaded(command, capsys):
  with socket.create_server(('127.0.0.1', 0)) as other:
    with pytest.raises(SystemExit) as caught:
      run([*command, f'--gin.SERVE_PORT={other.getsockname()[1]}', '--gin.RUN_DIR=/nowhere'])
  assert caught.value.code == 2
  assert 'cannot listen there (Address already in use)' in capsys.readouterr().err
