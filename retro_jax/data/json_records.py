"""One line of JSON to one document: which values are taken, which are refused, and why.

Reading the files is corpus.py's business.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from retro_jax.data.vocabulary import clean_text
from retro_jax.errors import UserError, nearest

# Metadata is kept as JSON, whose readers have a limit of their own.
_DEEPEST = 50


class BadRecord(UserError):
  """What is wrong with a line, without its place."""


def parse(line: str) -> dict[str, Any]:
  """The object a line spells; of a key that stands twice, the last value counts.

  Raises:
    BadRecord: not JSON (NaN and Infinity are not), or something else than an object.
  """
  try:
    record = json.loads(line, parse_constant=_refuse_constant)
  except RecursionError:
    raise BadRecord('JSON nested too deeply; correct or remove the line') from None
  except ValueError as error:
    hint = ' (is a line end missing?)' if 'Extra data' in str(error) else ''
    reason = getattr(error, 'msg', str(error)).split(';')[0]
    at = f' at column {error.pos + 1}' if isinstance(error, json.JSONDecodeError) else ''
    raise BadRecord(f'not valid JSON: {reason}{at}{hint}; correct or remove the line') from None
  if not isinstance(record, dict):
    raise BadRecord(f'expected a JSON object, found {_kind(record)}; correct or remove the line')
  return record


def text_of(record: dict[str, Any], field: str) -> str:
  """The text in `field`, as it stands (lone surrogates too)."""
  value = record.get(field)
  if not isinstance(value, str):
    found = _kind(value) if field in record else f'no such field{nearest(field, record)}'
    raise BadRecord(f'expected text in field {field!r}, found {found}; set text_field')
  return value


def id_of(record: dict[str, Any], field: str) -> str | None:
  """Text or a whole number; None for a record without."""
  value = record.get(field)
  if value is None:
    return None
  if isinstance(value, bool) or not isinstance(value, (str, int)):
    raise BadRecord(f'expected text or a whole number in field {field!r}, found {_kind(value)}; '
                    'correct it or set id_field')
  if value == '':
    raise BadRecord(f'empty text in field {field!r}, expected an id; correct it or set id_field')
  return clean_text(str(value))


def title_of(record: dict[str, Any], field: str) -> str:
  """Text or a number; empty for a record without."""
  value = record.get(field)
  if value is None:
    return ''
  if isinstance(value, bool) or not isinstance(value, (str, int, float)):
    raise BadRecord(f'expected text in field {field!r}, found {_kind(value)}; '
                    'correct it or set title_field')
  return clean_text(str(value))


def metadata_of(record: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
  """The named fields that are there: any JSON, down to 50 levels."""
  return {name: _plain(record[name], name, _DEEPEST) for name in fields if name in record}


def _plain(value: Any, field: str, levels: int) -> Any:
  """`value` as it can be written again: UTF-8 text, finite numbers."""
  if isinstance(value, str):
    return clean_text(value)
  if isinstance(value, float) and not math.isfinite(value):
    raise BadRecord(f'number too large in field {field!r}; correct or remove the line')
  if isinstance(value, (dict, list)) and not levels:
    raise BadRecord(f'field {field!r} is nested more than {_DEEPEST} levels deep; '
                    'leave it out of metadata_fields')
  if isinstance(value, dict):
    return {clean_text(k): _plain(v, field, levels - 1) for k, v in value.items()}
  if isinstance(value, list):
    return [_plain(v, field, levels - 1) for v in value]
  return value


def _refuse_constant(name: str) -> Any:
  raise ValueError(f'{name} is no JSON number')


def _kind(value: Any) -> str:
  names = {dict: 'an object', list: 'a list', str: 'text', bool: 'true or false',
           int: 'a number', float: 'a number', type(None): 'null'}
  return names[type(value)]
