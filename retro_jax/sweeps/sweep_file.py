"""A sweep file (TOML): what it may say, and the runs that it stands for.

Nothing here knows what a setting means: that is found when a run's configuration is resolved
(plan.py). The format is described in docs/sweeps.md.
"""

import dataclasses
import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retro_jax.errors import UserError, nearest

_KEYS = ('about', 'gin_files', 'gin', 'product', 'zip', 'curves')
_AXIS_KEYS = ('name', 'setting', 'values')
_VALUE_KEYS = ('name', 'gin_files', 'gin')
# A run's name is a folder, and a part of the name of a machine.
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._]*(-[A-Za-z0-9._]+)*')


@dataclasses.dataclass(frozen=True)
class Value:
  """One value of an axis: its name, gin files, and settings as they stand on a command line."""
  name: str
  gin_files: tuple[str, ...] = ()
  settings: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Axis:
  """Attributes: `name`, and the `values` it goes through."""
  name: str
  values: tuple[Value, ...]


@dataclasses.dataclass(frozen=True)
class Run:
  """One run.

  Attributes:
    name: the names of its values, joined by '-'.
    labels: the name of its value on each axis.
    gin_files: in the order in which they are read.
    settings: override the files.
  """
  name: str
  labels: Mapping[str, str]
  gin_files: tuple[str, ...]
  settings: Mapping[str, str]

  def arguments(self, run_dir: str) -> list[str]:
    """The trainer's command line."""
    settings = {**self.settings, 'RUN_DIR': run_dir}
    return [*(f'--gin_file={file}' for file in self.gin_files),
            *(f'--gin.{name}={value}' for name, value in settings.items())]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A sweep file as read.

  Attributes:
    path: of the file.
    about: what the sweep is for.
    base: files and settings of every run.
    products: axes that are combined each with each, the first varying slowest.
    zips: axes that advance together; as a whole one more product axis, the fastest.
    curves: names of axes whose values get a curve each in the picture.
  """
  path: str
  about: str
  base: Value
  products: tuple[Axis, ...]
  zips: tuple[Axis, ...]
  curves: tuple[str, ...] = ()

  @property
  def name(self) -> str:
    return Path(self.path).stem

  def runs(self, gin_files: Sequence[str] = (), settings: Mapping[str, str] | None = None
           ) -> list[Run]:
    """Every run, in order.

    Args:
      gin_files: read after those of the sweep.
      settings: that override those of the sweep.

    Raises:
      UserError: two runs of one name.
    """
    groups = [[(value,) for value in axis.values] for axis in self.products]
    if self.zips:
      groups.append(list(zip(*(axis.values for axis in self.zips))))
    axes = [axis.name for axis in (*self.products, *self.zips)]
    last = Value('', tuple(gin_files), settings or {})
    result: dict[str, Run] = {}
    for combination in itertools.product(*groups):
      values = [value for group in combination for value in group]
      merged: dict[str, str] = {}
      for part in (self.base, *values, last):
        for name, value in part.settings.items():
          merged.pop(name, None)  # the last to set it also stands last
          merged[name] = value
      for setting in ('RUN_DIR', 'TrainJob.run_dir'):
        if setting in merged:
          raise UserError(f'{self.path}: {setting} is set, but it is --folder and the name of the '
                          'run; remove it')
      name = '-'.join(value.name for value in values)
      if name in result:
        raise UserError(f'{self.path}: two runs are called {name!r}; rename a value so that '
                        'joined names differ')
      files = tuple(f for part in (self.base, *values, last) for f in part.gin_files)
      result[name] = Run(name, dict(zip(axes, (value.name for value in values))), files, merged)
    return list(result.values())


def read(path: str) -> Sweep:
  """Reads a sweep file.

  Raises:
    UserError: no such file, not TOML, or not in the format; names the file and the place.
  """
  try:
    with open(path, 'rb') as f:
      content = tomllib.load(f)
  except OSError as error:
    raise UserError(f'{path}: no sweep file can be read there ({error.strerror}); '
                    'look in gin/sweeps/') from None
  except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
    raise UserError(f'{path}: not valid TOML ({error}); correct that line') from None
  try:
    return _parse(path, content)
  except _Wrong as error:
    raise UserError(f'{path}: {error}') from None


def overrides(table: Mapping[str, Any]) -> dict[str, str]:
  """A table of settings as they stand on a command line: {'RetroConfig.d_model': '64'}.

  `RetroConfig.d_model = 64` without quotes is a table in TOML and means the same setting; a
  table under a macro, whose name is in capitals, is its value.
  """
  result = {}
  for name, value in table.items():
    if isinstance(value, dict) and not name.isupper():
      result.update({f'{name}.{field}': _text(v, f'{name}.{field}') for field, v in value.items()})
    else:
      result[name] = _text(value, name)
  return result


class _Wrong(Exception):
  """What is wrong in a file whose name the caller adds."""


def _parse(path: str, content: dict[str, Any]) -> Sweep:
  _check_keys(content, _KEYS, 'the file')
  about = content.get('about', '')
  if not isinstance(about, str):
    raise _Wrong('about is no text; put it in quotes')
  base = _value({'name': 'base', **{k: content[k] for k in ('gin_files', 'gin') if k in content}},
                'the file')
  products, zips = _axes(content, 'product'), _axes(content, 'zip')
  if not products and not zips:
    raise _Wrong('has no axis; add a [[product]] or [[zip]] with a name and values')
  names = [axis.name for axis in (*products, *zips)]
  for name in names:
    if names.count(name) > 1:
      raise _Wrong(f'two axes are called {name!r}; rename one')
  lengths = {axis.name: len(axis.values) for axis in zips}
  if len(set(lengths.values())) > 1:
    told = ', '.join(f'{name!r} has {length}' for name, length in lengths.items())
    raise _Wrong(f'[[zip]] axes advance together, but {told} values; make them equally many')
  curves = content.get('curves', [])
  if not isinstance(curves, list):
    raise _Wrong('curves is no list; write curves = ["NAME OF AN AXIS"]')
  for name in curves:
    if name not in names:
      raise _Wrong(f'curves names {name!r}, which is no axis{nearest(str(name), names)}; '
                   'correct it')
  return Sweep(path, about, base, products, zips, tuple(curves))


def _axes(content: Mapping[str, Any], kind: str) -> tuple[Axis, ...]:
  tables = content.get(kind, [])
  if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
    raise _Wrong(f'{kind} is no list of tables; begin an axis with [[{kind}]]')
  return tuple(_axis(table, f'[[{kind}]] number {i}') for i, table in enumerate(tables, start=1))


def _axis(table: dict[str, Any], where: str) -> Axis:
  _check_keys(table, _AXIS_KEYS, where)
  name = _name(table, where)
  where = f'axis {name!r}'
  values = table.get('values')
  if not isinstance(values, list) or not values:
    raise _Wrong(f'{where} has no values; give it values = [...]')
  setting = table.get('setting')
  if setting is not None and not isinstance(setting, str):
    raise _Wrong(f'{where}: setting is no name; write setting = "SEED"')
  parsed = []
  for i, value in enumerate(values, start=1):
    if isinstance(value, dict):
      parsed.append(_value(value, f'{where}, value {i}'))
    elif setting is None:
      raise _Wrong(f'{where}, value {i} is {value!r}, expected {{name = ..., gin = {{...}}}}; '
                   'or say setting = "NAME" which all plain values of the axis set')
    else:
      text = _text(value, setting)
      short = name + text
      if not _NAME.fullmatch(short):
        raise _Wrong(f'{where}: {value!r} gives no name for a folder; write '
                     f'{{name = "...", gin = {{{setting} = ...}}}}')
      parsed.append(Value(short, (), {setting: text}))
  names = [value.name for value in parsed]
  for value in names:
    if names.count(value) > 1:
      raise _Wrong(f'{where} has two values called {value!r}; rename one')
  return Axis(name, tuple(parsed))


def _value(table: dict[str, Any], where: str) -> Value:
  if where != 'the file':
    _check_keys(table, _VALUE_KEYS, where)
  files, settings = table.get('gin_files', []), table.get('gin', {})
  if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
    raise _Wrong(f'{where}: gin_files is no list of paths; write gin_files = ["gin/..."]')
  if not isinstance(settings, dict):
    raise _Wrong(f'{where}: gin is no table of settings; write gin = {{NAME = value}}')
  return Value(_name(table, where), tuple(files), overrides(settings))


def _name(table: Mapping[str, Any], where: str) -> str:
  name = table.get('name')
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    raise _Wrong(f'{where}: name is {name!r}, expected letters, digits, "-", "_" and "."; '
                 'it becomes part of a folder')
  return name


def _check_keys(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
  for key in table:
    if key not in known:
      raise _Wrong(f'{where} has the key {key!r}{nearest(key, known)}; known are '
                   f'{", ".join(known)}')


def _text(value: Any, name: str, inside: bool = False) -> str:
  """A TOML value as gin reads it from a command line."""
  if isinstance(value, str):
    # Text needs no quotes on a command line, but does inside a list or a table.
    return repr(value) if inside and not value.startswith(('@', '%')) else value
  if isinstance(value, list):
    return '[' + ', '.join(_text(item, name, True) for item in value) + ']'
  if isinstance(value, dict):
    return '{' + ', '.join(f'{k!r}: {_text(v, name, True)}' for k, v in value.items()) + '}'
  if isinstance(value, (bool, int, float)):
    return repr(value)
  raise _Wrong(f'{name} is a {type(value).__name__}, which no setting takes; put it in quotes')
