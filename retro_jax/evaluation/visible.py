"""Text of strangers made safe to show: what would act on a screen becomes a visible sign.

A document may hold the escape sequences of terminals, characters that turn the direction of
writing, or NUL. Nothing of the kind reaches a terminal or a page: every text of a document
goes through `visible`. What HTML means by '<' is html_page.py's business.
"""

import os
import sys
import unicodedata

# Line ends and tabs stay: they lay text out and do nothing else.
_KEPT = '\n\t'
# Unicode's bidirectional controls (UAX 9): they can make text read as what it is not.
_DIRECTION = {'LRE', 'RLE', 'LRO', 'RLO', 'PDF', 'LRI', 'RLI', 'FSI', 'PDI'}
_MARKS = '\u061c\u200e\u200f'


def _signs() -> dict[int, str]:
  """Every character that acts, with what is shown for it."""
  signs = {}
  for code in range(0x3000):
    character = chr(code)
    if code < 32 or code == 127:
      # Unicode has a picture of each, U+2400 and on: ESC is shown as U+241B.
      signs[code] = chr(0x2421 if code == 127 else 0x2400 + code)
    elif (unicodedata.category(character) in ('Cc', 'Zl', 'Zp') or character in _MARKS
          or unicodedata.bidirectional(character) in _DIRECTION):
      signs[code] = f'\\u{code:04x}'
  # Halves of characters, which UTF-8 cannot hold and neither can a file or a terminal.
  signs |= {code: f'\\u{code:04x}' for code in range(0xd800, 0xe000)}
  return {code: sign for code, sign in signs.items() if chr(code) not in _KEPT}


_SIGNS = _signs()


def visible(value: object) -> str:
  """`str(value)` in which nothing acts: controls are shown, as pictures or as '\\u202e'."""
  return str(value).translate(_SIGNS)


def colored(color: str = 'auto') -> bool:
  """Whether to colour what is printed: 'always', 'never', or 'auto', where a terminal shows it.

  NO_COLOR (no_color.org) is honoured.
  """
  if color != 'auto':
    return color == 'always'
  return sys.stdout.isatty() and not os.environ.get('NO_COLOR')
