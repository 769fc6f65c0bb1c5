"""Every command in README and docs is one: its program exists and takes these arguments.

Nothing is run: the programs are entered as from a command line, and left when their arguments
were taken and their configuration was resolved.
"""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import retro_jax
from retro_jax import configuration
from retro_jax.errors import UserError

ROOT = Path(retro_jax.__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
_COMMAND = re.compile(r'(?:python|\.venv/bin/python|make|launch/\S+)\s')
_LEFT_OUT = ('…', '...', 'ACTION')


def documented():
  """(page, command line) of each command in a fence or between backticks."""
  for page in PAGES:
    text = page.read_text(encoding='utf-8')
    fences = re.findall(r'^```\w*\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for fence in fences for line in fence.replace('\\\n', ' ').splitlines()]
    lines += [span.replace('\n', ' ') for span in re.findall(r'`([^`]+)`', prose)]
    for line in lines:
      if _COMMAND.match(line.strip() + ' '):
        yield str(page.relative_to(ROOT)), line.strip()


COMMANDS = sorted(set(documented()))


class Taken(BaseException):
  """The arguments were taken; no Exception, so that no program keeps it."""


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
  def main(job, run, configurables=(), argv=None, plan=None):
    del run, plan
    line = configuration.parse_arguments(sys.argv[1:] if argv is None else argv)
    configuration.resolve(job, configurables, line)
    raise Taken

  parse = argparse.ArgumentParser.parse_known_args

  def parse_known_args(self, args=None, namespace=None):
    found = parse(self, args, namespace)
    if sys._getframe(1).f_code.co_name != 'parse_args':
      configuration.parse_arguments([word for word in found[1] if '--dry_run' not in word])
    elif found[1]:
      self.error(f'unrecognized arguments: {found[1]}')
    raise Taken

  monkeypatch.setattr(configuration, 'main', main)
  monkeypatch.setattr(argparse.ArgumentParser, 'parse_known_args', parse_known_args)
  monkeypatch.chdir(ROOT)


def enter(monkeypatch, words):
  """Runs a program until it has taken its arguments."""
  monkeypatch.setattr(sys, 'argv', words[1:] if words[0] == '-m' else words)
  if words[0] != '-m':
    monkeypatch.syspath_prepend(ROOT / Path(words[0]).parent)  # as Python does
  with pytest.raises(Taken):
    if words[0] == '-m':
      runpy.run_module(words[1], run_name='__main__', alter_sys=True)
    else:
      runpy.run_path(words[0], run_name='__main__')


def test_there_are_commands():
  assert len(COMMANDS) > 30 and {page for page, _ in COMMANDS} >= {'README.md', 'docs/pods.md'}


@pytest.mark.filterwarnings('ignore:.*found in sys.modules')
@pytest.mark.parametrize('page, command', COMMANDS)
def test_is_one(page, command, monkeypatch, capsys):
  del page
  words = shlex.split(command, comments=True)
  abridged = any(mark in word for word in words for mark in _LEFT_OUT)
  program, *words = [word for word in words if not any(mark in word for mark in _LEFT_OUT)]
  if program == 'make':
    targets = re.findall(r'^([a-z]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    assert {word for word in words if '=' not in word} <= set(targets)
    return
  if program.startswith('launch/'):
    assert (ROOT / program).is_file()
    modules = [i for i, word in enumerate(words) if re.fullmatch(r'retro_jax\.\w+', word)]
    if not modules:
      return  # the launchers' own tests hold their flags
    words = ['-m', *words[modules[0]:]]
  if words[0] == '-m':
    assert importlib.util.find_spec(words[1])
  else:
    assert (ROOT / words[0]).is_file()
  if words[-1] in words[:2]:
    return  # a program's name in a sentence
  try:
    enter(monkeypatch, words)
  except UserError as error:
    # What was left out of it is missed, and nothing else.
    assert abridged and re.search('is required|no file defines', str(error)), error
  except SystemExit as left:
    # Arguments that name what is not there yet.
    complaint = capsys.readouterr().err
    assert abridged or any(word.lstrip('@') in complaint for word in words[2:]), (left, complaint)
