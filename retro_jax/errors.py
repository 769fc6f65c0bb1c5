"""The one exception a person may be shown without a traceback.

Entry points catch `UserError`, print its single line and leave with exit code 2.
Everything else is a defect of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

EXIT_CODE = 2


class UserError(ValueError):
  """Bad input, said in one line: which file or setting, what was expected, what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
  """' (did you mean X?)' for the closest of `known`, or '' when nothing is close."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f' (did you mean {close[0]!r}?)' if close else ''
