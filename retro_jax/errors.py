"""The exceptions a person may be shown without a traceback, and the exit codes they end in.

Entry points catch them, print their single line and leave with their code, by which a
launcher knows whether to start again (docs/pods.md): 2 input, 3 a gate that was not passed
(evaluation/gate.py), and those below. Everything else is a defect of ours and
keeps its traceback.
"""

import difflib
from collections.abc import Iterable

EXIT_CODE = 2


class UserError(ValueError):
  """Bad input, said in one line: which file or setting, what was expected, what to do."""


class RunStopped(Exception):
  """A run that ended before its last step for a reason other than its input, said in one line."""

  exit_code = 1


class ProcessMissing(RunStopped):
  """Not all processes of the job were there at its start; starting it again may help."""

  exit_code = 69


class Diverged(RunStopped):
  """Numbers that are no numbers; starting again would end the same way."""

  exit_code = 70


class Preempted(RunStopped):
  """SIGTERM came and a checkpoint was saved; the same command goes on from there."""

  exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
  """' (did you mean X?)' for the closest of `known`, or '' when nothing is close."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f' (did you mean {close[0]!r}?)' if close else ''
