"""launch/gke.sh: what it would have xpk do, and a stand-in xpk that does it."""

import json
import os
import sys

import pytest

from tests.launch import scripts

FLAGS = ('--name', 'r1', '--cluster', 'c', '--zone', 'us-west4-a', '--project', 'p')
TRAINING = ('--', 'retro_jax.train', "--gin.X=b c's")


def options(line):
  """The flags of a printed command."""
  return {word.split('=', 1)[0]: word.split('=', 1)[1] for word in scripts.words(line)
          if word.startswith('--') and '=' in word}


def dry(*arguments, **variables):
  result = scripts.run('gke.sh', *arguments, '--dry_run', **variables)
  assert result.returncode == 0, result.stderr
  return result.stdout.splitlines()


def test_create_with_a_base_image():
  result = scripts.run('gke.sh', 'create', *FLAGS, '--type', 'v5litepod-16', '--bucket', 'gs://b/',
                       '--env', 'A=b c', '--spot', '--dry_run', *TRAINING)
  line, = result.stdout.splitlines()
  words, found = scripts.words(line), options(line)
  assert words[3:6] == ['xpk', 'workload', 'create'] and '--spot' in words
  expected = {
      '--workload': 'r1', '--cluster': 'c', '--zone': 'us-west4-a', '--project': 'p',
      '--tpu-type': 'v5litepod-16', '--restart-on-exit-codes': '69,75', '--max-restarts': '50',
      '--base-docker-image': 'python:3.11', '--script-dir': str(scripts.ROOT)}
  assert expected.items() <= found.items(), found
  assert '--docker-image' not in found
  assert {'--env=RETRO_NUM_PROCESSES=auto', '--env=A=b c', '--env=JAX_PLATFORMS=tpu,cpu'} <= set(
      words)
  install, preflight, train = found['--command'].split(' && ')
  assert install == 'make environment EXTRAS=tpu'
  assert preflight == '.venv/bin/python -m retro_jax.preflight --tpu --run_dir=gs://b/r1'
  assert scripts.words(train) == [
      'exec', '.venv/bin/python', '-u', '-m', 'retro_jax.train', "--gin.X=b c's",
      '--gin.RUN_DIR=gs://b/r1']


def test_create_with_an_image():
  result = scripts.run('gke.sh', 'create', *FLAGS, '--image', 'i', '--dry_run', *TRAINING,
                       RETRO_TYPE='v6e-8')
  found = options(result.stdout)
  assert found['--docker-image'] == 'i' and '--base-docker-image' not in found
  assert found['--command'].startswith('python -m retro_jax.preflight --tpu && exec python -u -m')
  assert found['--tpu-type'] == 'v6e-8'


def test_the_other_commands():
  line, = dry('status', *FLAGS)
  assert line.endswith('xpk workload list --cluster=c --zone=us-west4-a --project=p '
                       '--filter-by-job=r1')
  line, = dry('delete', *FLAGS)
  assert 'xpk workload delete --workload=r1 --cluster=c' in line and line.endswith('--force')
  line, = dry('wait', *FLAGS, RETRO_WAIT='60')
  assert line.endswith('--wait-for-job-completion=r1 --timeout=60') and ' 360 xpk ' in line
  credentials, logs = dry('logs', *FLAGS, '--follow')
  assert 'gcloud container clusters get-credentials c --location=us-west4 ' in credentials
  assert '--selector=jobset.sigs.k8s.io/jobset-name=r1' in logs and logs.endswith('--follow')


@pytest.mark.parametrize('arguments, words', [
    ((), 'usage'), (('make',), "unknown command 'make'"),
    (('create', *FLAGS), '--type is required'),
    (('create', *FLAGS, '--type', 't'), 'expected a module'),
    (('create', *FLAGS, '--type', 't', '--', 'retro_jax.train', 'a\nb'), 'line end'),
    (('status', '--name', 'r1'), '--cluster is required'), (('status', *FLAGS, '--x'), '--x'),
    (('delete', *FLAGS, '--', 'retro_jax.train'), 'takes no training command')])
def test_wrong_arguments_are_exit_code_2(arguments, words):
  result = scripts.run('gke.sh', *arguments)
  assert result.returncode == 2 and words in result.stderr and not result.stdout, result.stderr


def test_xpk_gets_the_words_and_its_exit_code_is_kept(tmp_path):
  for name in ('xpk', 'gcloud', 'kubectl'):
    (tmp_path / name).write_text(f'#!{sys.executable}\nimport json, sys\n'
                                 f'json.dump(sys.argv[1:], open("{tmp_path}/said", "w"))\n'
                                 'sys.exit(125)\n')
    (tmp_path / name).chmod(0o755)
  arguments = ('create', *FLAGS, '--type', 't', *TRAINING)
  result = scripts.run('gke.sh', *arguments, PATH=f'{tmp_path}:{os.environ["PATH"]}')
  assert result.returncode == 125, result.stderr
  printed = scripts.words(scripts.run('gke.sh', 'create', '--dry_run', *arguments[1:]).stdout)
  assert json.loads((tmp_path / 'said').read_text()) == printed[4:]
