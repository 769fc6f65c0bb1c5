"""When documents were written, as far as their metadata says: for time cut-offs (policies.py).

A date is rarely an instant: '2015-03-01' is a day, 2015 a year. Each is kept as its first and
last microsecond, so that whoever compares can take the end that is safe.
"""

import datetime
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from retro_jax.retrieval.database import ChunkDatabase

# What `Dates` returns for a document without a readable date.
UNDATED = -1
_UNREAD = 0
_FIRST = datetime.datetime.min
_MICROSECOND = datetime.timedelta(microseconds=1)
_UNIX = datetime.datetime(1970, 1, 1)
_YEAR_OR_MONTH = re.compile(r'(\d{4})(?:-(\d{2}))?')


class Moments(NamedTuple):
  """First and last microsecond of a date, counted from 1 at the start of the year 1."""

  first: int
  last: int


def read_date(value: Any) -> Moments | None:
  """What a date in metadata means; None when it is none.

  Args:
    value: a string in ISO 8601 ('2015', '2015-03', '2015-03-01', '2015-03-01T10:30:00+02:00'
      and its other forms; UTC where there is no offset), or a number: a whole one from 1 to
      9999 is a year, every other one is seconds since 1970 in UTC.
  """
  try:
    if isinstance(value, str):
      return _of_text(value.strip())
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      if 1 <= value <= 9999 and value == int(value):
        return _year(int(value))
      return _instant(_UNIX + datetime.timedelta(seconds=value))
  except (ValueError, OverflowError):  # not a date, or none that the calendar has
    pass
  return None


def _of_text(text: str) -> Moments:
  if match := _YEAR_OR_MONTH.fullmatch(text):
    year, month = int(match[1]), match[2]
    if month is None:
      return _year(year)
    first = datetime.datetime(year, int(month), 1)
    days = (first.replace(day=28) + datetime.timedelta(days=4)).replace(day=1) - first
    return _period(first, days)
  try:
    day = datetime.date.fromisoformat(text)
  except ValueError:
    return _instant(datetime.datetime.fromisoformat(text))
  return _period(datetime.datetime.combine(day, datetime.time()), datetime.timedelta(days=1))


def _year(year: int) -> Moments:
  first = datetime.datetime(year, 1, 1)
  return _period(first, datetime.datetime(year, 12, 31) - first + datetime.timedelta(days=1))


def _period(first: datetime.datetime, length: datetime.timedelta) -> Moments:
  begin = _count(first)
  return Moments(begin, begin + length // _MICROSECOND - 1)


def _instant(moment: datetime.datetime) -> Moments:
  if moment.tzinfo is not None:
    moment = moment.astimezone(datetime.timezone.utc).replace(tzinfo=None)
  return Moments(_count(moment), _count(moment))


def _count(moment: datetime.datetime) -> int:
  return (moment - _FIRST) // _MICROSECOND + 1


class Dates:
  """The dates of a store's documents, read from its metadata once and only when asked for."""

  def __init__(self, database: ChunkDatabase, field: str):
    """Use `dates_of`, which keeps what was read."""
    self._info: Callable[[int], dict[str, Any]] = database.document_info
    self._field = field
    # 16 bytes a document at most: pages of zeros take no memory until they are written.
    self._moments = np.zeros((database.num_documents, 2), np.int64)

  def __call__(self, documents: np.ndarray) -> np.ndarray:
    """First and last moment of documents, by ordinal.

    Args:
      documents: ordinals, int [...].

    Returns:
      int64 [..., 2] as in `Moments`, both `UNDATED` where there is no readable date.
    """
    for ordinal in np.unique(documents[self._moments[documents, 0] == _UNREAD]):
      metadata = self._info(int(ordinal))['metadata']
      self._moments[ordinal] = read_date(metadata.get(self._field)) or (UNDATED, UNDATED)
    return self._moments[documents]


@functools.lru_cache(maxsize=8)
def dates_of(database: ChunkDatabase, field: str) -> Dates:
  """The dates in metadata field `field`; one object per open store."""
  return Dates(database, field)
