"""Gin at the edge: from the command line to one resolved job, or one clear line of error.

Entry points call `main(job, run)`. Gin sees only dataclasses, registered here under their
class names; library code never imports gin. What gin would let pass is refused: a macro
that nothing uses, a command-line macro that no file defines, a binding that configures
nothing that is built.
"""

import ast
import dataclasses
import functools
import inspect
import os
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import gin
from gin import config as gin_config
from retro_jax.errors import EXIT_CODE, RunStopped, UserError, nearest

USAGE = """usage: {program} --gin_file=FILE [--gin_file=FILE ...] [--gin.NAME=VALUE ...] [--dry_run]

  --gin_file=FILE    settings, later files override earlier ones
  --gin.NAME=VALUE   one setting: a MACRO or Class.field; plain strings need no quotes
  --dry_run          print the resolved configuration and stop
"""
_SEARCH_PATHS = (Path(__file__).resolve().parent.parent,)


@dataclasses.dataclass(frozen=True)
class CommandLine:
  """Attributes: `files` in order, `bindings` as gin lines, `dry_run`."""
  files: tuple[str, ...]
  bindings: tuple[tuple[str, str], ...]
  dry_run: bool


def main(job: type, run: Callable[[Any], Any], configurables: Iterable[type] = (),
         argv: Sequence[str] | None = None, plan: Callable[[Any], str] | None = None) -> None:
  """Resolves the command line to a `job` and runs it; errors.py has the exits in one line.

  `plan` says what `run` would do; `--dry_run` prints it below the configuration.
  """
  argv = sys.argv[1:] if argv is None else list(argv)
  if '--help' in argv or '-h' in argv:
    print((sys.modules['__main__'].__doc__ or '').strip() + '\n')
    print(USAGE.format(program=f'python {os.path.basename(sys.argv[0])}'))
    return
  try:
    line = parse_arguments(argv)
    resolved = resolve(job, configurables, line)
    if line.dry_run:
      print(describe(resolved))
      if plan:
        print('\n' + plan(resolved))
      return
    run(resolved)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr, flush=True)
    _leave(EXIT_CODE)
  except RunStopped as stop:
    print(f'stopped: {stop}', file=sys.stderr, flush=True)
    _leave(stop.exit_code)


def _leave(code: int) -> None:
  """Ends the process; one of several does not wait for the others, who may never come."""
  jax = sys.modules.get('jax')
  if jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1:
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)


def parse_arguments(argv: Sequence[str]) -> CommandLine:
  """Splits the command line.

  Raises:
    UserError: an argument that is none of those in `USAGE`.
  """
  files, bindings, dry_run = [], [], False
  for argument in argv:
    if argument.startswith('--gin_file='):
      files.append(argument.split('=', 1)[1])
    elif match := re.fullmatch(r'--gin\.([\w./]+)=(.*)', argument, re.DOTALL):
      bindings.append((match[1], _quoted(match[2])))
    elif argument in ('--dry_run', '--dry-run'):
      dry_run = True
    else:
      flag = argument.split('=', 1)[0]
      raise UserError(f'unknown argument {argument!r}{nearest(flag, ["--gin_file", "--dry_run"])}; '
                      'expected --gin_file=FILE, --gin.NAME=VALUE or --dry_run')
  return CommandLine(tuple(files), tuple(bindings), dry_run)


def resolve(job: type, configurables: Iterable[type], line: CommandLine) -> Any:
  """Builds the `job` that the files and bindings describe.

  Raises:
    UserError: a missing file, a misspelt or unused setting, a required one not given, or
      values that a config refuses.
  """
  classes = {cls.__name__: cls for cls in (job, *configurables)}
  gin.clear_config(clear_constants=True)
  for cls in classes.values():
    _register(cls)
  for folder in _SEARCH_PATHS:
    gin.add_config_file_search_path(str(folder))
  _parse(line, classes)
  try:
    resolved = gin.get_configurable(job.__name__)()
  except UserError as error:
    # gin adds where in its files the config was made.
    raise UserError(str(error).splitlines()[0]) from None
  except (ValueError, TypeError, RuntimeError) as error:
    raise UserError(_one_line(error, classes)) from error
  _refuse_unused()
  return resolved


def describe(job: Any, indent: str = '') -> str:
  """A resolved job as readable lines, nested configs indented."""
  lines = [f'{indent}{type(job).__name__}:'] if not indent else []
  for field in dataclasses.fields(job):
    value = getattr(job, field.name)
    if dataclasses.is_dataclass(value):
      lines += [f'{indent}  {field.name}: {type(value).__name__}', describe(value, indent + '  ')]
    else:
      lines.append(f'{indent}  {field.name} = {value!r}')
  return '\n'.join(lines)


def _quoted(value: str) -> str:
  """A gin value: as given if it is a literal, a macro or a reference, else a string."""
  if value.startswith(('@', '%')):
    return value
  try:
    ast.literal_eval(value)
    return value
  except (ValueError, SyntaxError):
    # Containers may hold references; anything else that is no literal is plain text.
    return value if value and value[0] in '[({' else repr(value)


@functools.cache  # gin registers a name once in a process
def _register(cls: type) -> None:
  """Lets gin build `cls`: as a function, because gin would subclass a class."""

  @functools.wraps(cls, updated=())
  def build(*args: Any, **kwargs: Any) -> Any:
    return cls(*args, **kwargs)

  build.__signature__ = inspect.signature(cls)
  # A program may know a class twice, as __main__'s and as its module's: the last one counts.
  with gin_config.interactive_mode():
    gin.external_configurable(build, name=cls.__name__, module='retro_jax')


def _parse(line: CommandLine, classes: dict[str, type]) -> None:
  for file in line.files:
    if not any((folder / file).exists() for folder in (Path(), *_SEARCH_PATHS)):
      raise UserError(f'{file}: no such gin file; look in gin/')
  try:
    for file in line.files:
      gin.parse_config_file(file)
    known = _macros()
    for name, _ in line.bindings:
      if '.' not in name and name not in known:
        raise UserError(f'--gin.{name}: no file defines this macro{nearest(name, known)}')
    gin.parse_config([f'{name} = {value}' for name, value in line.bindings])
  except UserError:
    raise
  except (ValueError, SyntaxError, OSError, RuntimeError, TypeError, tokenize.TokenError) as error:
    raise UserError(_one_line(error, classes)) from error
  _refuse_missing()
  unused = _macros() - _referenced()
  if unused:
    name = min(unused)
    close = nearest(name, _macros() - unused)
    raise UserError(f'macro {name} is defined but nothing uses it{close}; '
                    'correct its name or remove it')


def _refuse_missing() -> None:
  """Fails on a setting that is still `%gin.REQUIRED`; gin looks only when it finalizes."""
  for (scope, selector), parameters in gin_config._CONFIG.items():
    for name, value in parameters.items():
      if isinstance(value, gin_config.ConfigurableReference) and str(value) == '%gin.REQUIRED':
        setting = scope if selector == 'gin.macro' else f'{selector.rsplit(".", 1)[-1]}.{name}'
        raise UserError(f'{setting} is required; give it by --gin.{setting}=VALUE')


def _macros() -> set[str]:
  """Names of the macros defined so far."""
  return {scope for scope, selector in gin_config._CONFIG if selector == 'gin.macro'}


def _referenced() -> set[str]:
  """Names of the macros that some binding refers to."""
  found: set[str] = set()

  def visit(value: Any) -> None:
    if isinstance(value, gin_config.ConfigurableReference):
      found.add(value.scoped_selector.rsplit('/', 1)[0])  # a macro's name is its scope
    elif isinstance(value, dict):
      for item in (*value.keys(), *value.values()):
        visit(item)
    elif isinstance(value, (list, tuple)):
      for item in value:
        visit(item)

  for parameters in gin_config._CONFIG.values():
    visit(list(parameters.values()))
  return found


def _refuse_unused() -> None:
  """Fails on a binding of something that was not built."""
  for (scope, selector), parameters in gin_config._CONFIG.items():
    if selector == 'gin.macro' or not parameters:
      continue
    operative = gin_config._OPERATIVE_CONFIG.get((scope, selector), {})
    missing = [p for p in parameters if p not in operative]
    # A binding without a scope also serves the scoped uses of its configurable.
    if missing and not scope:
      operative = {p for (_, s), built in gin_config._OPERATIVE_CONFIG.items() if s == selector
                   for p in built}
      missing = [p for p in parameters if p not in operative]
    if missing:
      name = selector.rsplit('.', 1)[-1]
      others = [s.rsplit('.', 1)[-1] for _, s in gin_config._OPERATIVE_CONFIG]
      setting = '/'.join(filter(None, (scope, name))) + '.' + missing[0]
      raise UserError(f'{setting} is set, but no {name} is built by this command'
                      f'{nearest(name, others)}; remove it or use another file')


def _one_line(error: Exception, classes: dict[str, type]) -> str:
  """Gin's message without its traceback lines, with the nearest real name."""
  text = str(error)
  first = ' '.join(text.strip().splitlines()[:1]) or type(error).__name__
  if match := re.search(r"doesn't have a parameter named '(\w+)'", text):
    cls = next((c for n, c in classes.items() if f"'{n}'" in text or n in text), None)
    fields = [f.name for f in dataclasses.fields(cls)] if cls else []
    who = cls.__name__ if cls else 'a configurable'
    return f'{who} has no parameter {match[1]!r}{nearest(match[1], fields)}'
  if match := re.search(r"No configurable matching '([\w./]+)'", text):
    name = match[1].split('/')[-1]
    return f'nothing called {name!r} can be configured here{nearest(name, classes)}'
  if match := re.search(r"No macro matching '?(\w+)|Missing value for macro '?(\w+)", text):
    name = match[1] or match[2]
    return f'macro {name} is used but not defined{nearest(name, _macros())}'
  if "missing" in text and "required" in text:
    return re.sub(r'\s+', ' ', text).split(' No values supplied')[0][:300]
  return first
