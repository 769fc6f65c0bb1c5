"""Cuts HLO text into logical lines and bracketed parts; what they mean is in program.py."""

import re
from collections.abc import Iterable, Iterator

OP = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = ')
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[(){}\[\]]', re.DOTALL)


class ProgramError(ValueError):
  """A text that is not the scheduled HLO known here: our defect, or a new libtpu."""


def logical_lines(lines: Iterable[str]) -> Iterator[str]:
  """Joins the lines of an op whose attributes contain newlines, as those of Pallas do.

  An op is complete when its brackets are closed and its strings have ended; looking for the
  next line that resembles an op would stop at a '}' inside an attribute.
  """
  pending = ''
  for line in lines:
    if not pending and not OP.match(line):
      yield line
      continue
    pending = f'{pending}\n{line}' if pending else line
    bare = _STRING.sub('', pending)
    if '"' not in bare and all(bare.count(a) <= bare.count(b) for a, b in ('()', '[]', '{}')):
      yield pending
      pending = ''
  if pending:
    raise ProgramError(f'an op does not end: {pending[:120]}')


def closing(text: str, opening: int) -> int:
  """The index behind the bracket that closes the one at `opening`."""
  depth = 0
  for match in _BRACKET.finditer(text, opening):
    if match[0] in '([{':
      depth += 1
    elif match[0] in ')]}':
      depth -= 1
      if depth == 0:
        return match.end()
  raise ProgramError(f'a bracket is not closed: {text[opening:opening + 120]}')


def split(text: str) -> list[str]:
  """Splits at commas outside brackets."""
  parts, depth, last = [], 0, 0
  for match in re.finditer(r'[(){}\[\],]', text):
    if match[0] in '([{':
      depth += 1
    elif match[0] in ')]}':
      depth -= 1
    elif depth == 0:
      parts.append(text[last:match.start()])
      last = match.end()
  return [part for part in (*parts, text[last:]) if part.strip()]
