"""Many training runs from one sweep file: what they are, running them, what they found.

  python launch/sweep.py gin/sweeps/cpu_ladder.toml --folder=runs/ladder ACTION [--gin.NAME=...]

The format of the file, and what each action does, is in docs/sweeps.md; the work is done in
retro_jax/sweeps/.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ['JAX_PLATFORMS'] = 'cpu'  # only shapes here: accelerators are for the runs

from retro_jax import configuration, files, storage  # pylint: disable=wrong-import-position
from retro_jax.errors import EXIT_CODE, UserError  # pylint: disable=wrong-import-position
from retro_jax.sweeps import (  # pylint: disable=wrong-import-position
    local,
    plan,
    summary,
    sweep_file,
)

_POD_OPTIONS = ('type', 'zone', 'project')


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__.splitlines()[0], allow_abbrev=False,
      epilog='--gin_file=FILE and --gin.NAME=VALUE are added to every run and override the sweep.')
  parser.add_argument('sweep', help='a TOML file, e.g. gin/sweeps/cpu_ladder.toml')
  parser.add_argument('--folder', required=True, help='each run gets a folder below it')
  action = parser.add_mutually_exclusive_group(required=True)
  action.add_argument('--dry_run', '--dry-run', action='store_true',
                      help='resolve every run, print table and commands, and stop')
  action.add_argument('--run', action='store_true', help='run them here, one after another')
  action.add_argument('--emit', choices=['pod'], help='print a launch/tpu_pod.sh line for each')
  action.add_argument('--collect', action='store_true',
                      help='gather what the runs have found so far')
  parser.add_argument('--devices', type=int, default=2, metavar='N',
                      help='fake CPU devices of each run (with --run; default 2)')
  parser.add_argument('--results', metavar='FOLDER',
                      help='where sweep.json, sweep.md and sweep.png go; default: --folder')
  for name in _POD_OPTIONS:
    parser.add_argument(f'--{name}', help=f'--{name} of launch/tpu_pod.sh (with --emit=pod)')
  options, rest = parser.parse_known_args()
  try:
    sys.exit(_main(options, rest))
  except UserError as error:
    print(f'error: {error}', file=sys.stderr, flush=True)
    sys.exit(EXIT_CODE)
  except local.Stopped as stopped:
    print(f'sweep: stopped by {stopped}; the same command goes on from here', file=sys.stderr,
          flush=True)
    sys.exit(128 + stopped.number)


def _main(options: argparse.Namespace, rest: list[str]) -> int:
  configuration.parse_arguments(rest)  # refuses what is neither file nor setting
  pairs = [argument.split('=', 1) for argument in rest]
  gin_files = [value for flag, value in pairs if flag == '--gin_file']
  settings = {flag.removeprefix('--gin.'): value for flag, value in pairs if flag != '--gin_file'}
  if options.devices < 1:
    raise UserError(f'--devices={options.devices}, expected at least 1')
  sweep = sweep_file.read(options.sweep)
  planned = plan.resolve(sweep, options.folder, gin_files, settings)
  if options.emit:
    return _emit(sweep, planned, options)
  if options.dry_run:
    return _dry_run(sweep, planned, options)
  if options.collect:
    _report(sweep, planned, options, {})
    return 0
  return _run(sweep, planned, options)


def _emit(sweep: sweep_file.Sweep, planned: list[plan.Planned], options: argparse.Namespace) -> int:
  pod = {name: getattr(options, name) for name in _POD_OPTIONS}
  missing = [f'--{name}=' for name, value in pod.items() if not value]
  if missing:
    raise UserError(f'--emit=pod needs {" ".join(missing)}, as launch/tpu_pod.sh does')
  for run in planned:  # nothing else goes to stdout: it can be piped to a shell
    print(shlex.join(run.pod_command(sweep.name, pod)))
  _warn(planned)
  return 0


def _dry_run(sweep: sweep_file.Sweep, planned: list[plan.Planned], options: argparse.Namespace
             ) -> int:
  print(f'{sweep.path}: {len(planned)} runs' + (f', {sweep.about}' if sweep.about else ''))
  print(_settings_table(planned) + '\n')
  for run in planned:
    print(shlex.join(run.local_command(options.devices)))
  _warn(planned)
  return 0


def _run(sweep: sweep_file.Sweep, planned: list[plan.Planned], options: argparse.Namespace) -> int:
  if files.is_remote(options.folder):
    raise UserError(f'{options.folder}: --run needs a folder on a disk; --emit=pod prints commands '
                    'for runs elsewhere')
  with storage.locked(options.folder):
    print(_settings_table(planned) + '\n', flush=True)
    _warn(planned)
    failures = local.run_all(planned, options.devices)
    _report(sweep, planned, options, {failure.name: failure.reason for failure in failures})
  for failure in failures:
    print(f'error: run {failure.name} failed ({failure.reason}); its log is {failure.log}',
          file=sys.stderr)
  if failures:
    print(f'error: {len(failures)} of {len(planned)} runs failed; the same command tries them '
          'again', file=sys.stderr, flush=True)
  return 1 if failures else 0


def _report(sweep: sweep_file.Sweep, planned: list[plan.Planned], options: argparse.Namespace,
            failed: dict[str, str]) -> None:
  results = options.results or options.folder
  if files.is_remote(results):
    raise UserError(f'{results}: results are written to a disk; give --results=FOLDER')
  found = summary.collect(sweep, planned, failed)
  written = summary.write(results, found)
  print(f'\n{summary.text(found)}\n\nsweep: wrote {", ".join(map(str, written))}', flush=True)


def _settings_table(planned: list[plan.Planned]) -> str:
  """Each run with what distinguishes it from the others, and its size."""
  shared = set.intersection(*(set(run.run.settings.items()) for run in planned))
  shared_files = set.intersection(*(set(run.run.gin_files) for run in planned))
  own = [' '.join([*(f for f in run.run.gin_files if f not in shared_files),
                   *(f'{k}={v}' for k, v in run.run.settings.items() if (k, v) not in shared)])
         for run in planned]
  parameters = [f'{run.parameters["non_embedding"] / 1e6:,.3f} M' for run in planned]
  return summary.markdown([('run', [run.name for run in planned]), ('non-embedding', parameters),
                           ('steps', [f'{run.steps:,}' for run in planned]), ('overrides', own)])


def _warn(planned: list[plan.Planned]) -> None:
  for line in plan.warnings(planned):
    print(f'note: {line}', file=sys.stderr, flush=True)


if __name__ == '__main__':
  main()
