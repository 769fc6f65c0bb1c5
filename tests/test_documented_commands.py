"""Every `python …` command of the README and docs names a file and settings that exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from retro_jax import configuration
from retro_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def commands() -> list[tuple[str, list[str]]]:
  """(where, words after 'python') of each command in a code block; '…' stands for anything."""
  found = []
  for page in [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]:
    for block in re.findall(r'^```\w*\n(.*?)^```', page.read_text('utf-8'), re.S | re.M):
      for line in block.replace('\\\n', ' ').splitlines():
        if match := re.match(r'\s*(?:\.venv/bin/)?python (.*)', line):
          words = shlex.split(match[1], comments=True)
          found.append((page.name, [word for word in words if word not in ('…', '...')]))
  return found


def test_there_are_commands():
  assert len(commands()) > 15


@pytest.mark.parametrize('where, words', commands(), ids=lambda value: ' '.join(value)[:60]
                         if isinstance(value, list) else value)
def test_parses(where, words):
  name, arguments = (words[1], words[2:]) if words[0] == '-m' else (words[0], words[1:])
  name = name.removesuffix('.py').replace('/', '.')
  path = ROOT / (name.replace('.', '/') + '.py')
  assert path.exists(), where
  for word in arguments:
    if word.startswith('--gin_file=') and '…' not in word:
      assert (ROOT / word.split('=', 1)[1]).exists(), word
  settings = [word for word in arguments if word.startswith('--gin') and '…' not in word]
  call = re.search(r'configuration\.main\(\s*([\w.]+),(?:.*?([\w.]*CONFIGURABLES))?',
                   path.read_text('utf-8'), re.S)
  if not call or not settings:
    return  # its arguments are its own
  names = vars(importlib.import_module(name))
  job, configurables = (eval(part, names) if part else () for part in call.groups())
  try:
    configuration.resolve(job, configurables, configuration.parse_arguments(settings))
  except UserError as error:
    # What a reader has to complete lacks settings, and nothing else.
    assert 'is required' in str(error) or 'nothing to look at' in str(error), error
