"""Compiles the training step for a TPU slice that is not there, and says what it would cost.

  python tools/compile_for_topology.py --topology=v5p:4x4x4 --gin_file=gin/models/retro_7_5b.gin \\
      --gin_file=gin/machines/v5p.gin --output=out.json [--gin.BATCH_SIZE=256 ...]

  --topology=T    v4:XxYxZ, v5e:XxY, v5p:XxYxZ, v6e:XxY or tpu7x:XxYxZ, in chips
  --output=FILE   the report as JSON
  --hlo=FILE      also the compiler's program, gzipped
  --search        tries batch sizes x what is recomputed, each in a process of its own, and prints
                  the fastest that fits
  --batch_sizes=A,B --remat=A,B   what --search tries; else half, once and twice BATCH_SIZE, and
                  none, dots, full
  --gin_file, --gin.NAME=VALUE, --dry_run   as for training; gin/runs/compile_for_topology.gin is
                  read first and lists what can be set

Needs libtpu, no TPU. How to read the report, and how far to trust it: docs/topology.md.
"""

import argparse
import dataclasses
import gzip
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Before anything imports jax: the machine's own devices are not needed, no metadata server need
# be asked for a TPU, and another process may have libtpu loaded.
os.environ.update(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')
# libtpu's complaints that it finds no TPU here.
os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '3')
os.environ.setdefault('TPU_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# pylint: disable=wrong-import-position
from retro_jax import configuration, storage
from retro_jax.errors import EXIT_CODE, UserError, nearest
from retro_jax.models import flops
from retro_jax.topology import chips, cost
from retro_jax.topology import compile as compiling

_OPTIONS = ('--topology', '--output', '--hlo', '--search', '--batch_sizes', '--remat',
            '--gin_file', '--dry_run', '--help')
_REMAT = 'none,dots,full'


def main() -> None:
  try:
    _main(sys.argv[1:])
  except UserError as error:
    print(f'error: {error}', file=sys.stderr, flush=True)
    sys.exit(EXIT_CODE)


def _main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False, usage=argparse.SUPPRESS, add_help=False)
  parser.add_argument('--help', '-h', action='help', help=argparse.SUPPRESS)
  for name in ('--topology', '--output', '--hlo', '--batch_sizes'):
    parser.add_argument(name, default='', help=argparse.SUPPRESS)
  parser.add_argument('--remat', default=_REMAT, help=argparse.SUPPRESS)
  parser.add_argument('--search', action='store_true', help=argparse.SUPPRESS)
  known, settings = parser.parse_known_args(argv)
  for setting in settings:
    flag = setting.split('=', 1)[0]
    if flag not in _OPTIONS and not flag.startswith('--gin.'):
      raise UserError(f'unknown argument {setting!r}{nearest(flag, _OPTIONS)}; see --help')
  if not known.topology:
    raise UserError('--topology is required; for example --topology=v5p:4x4x4')
  topology = chips.parse(known.topology)
  line = configuration.parse_arguments([f'--gin_file={compiling.BASE}', *settings])
  config = configuration.resolve(compiling.StepConfig, compiling.CONFIGURABLES, line)
  if line.dry_run:
    model_flops = flops.training_flops(config.model, config.batch_size, config.sequence_length)
    print(configuration.describe(config))
    print(f'\nwould compile for {topology.name}: {topology.num_devices} devices, '
          f'rings along {[axis for axis, ring in zip("xyz", topology.wrap) if ring]}, '
          f'{model_flops / 1e12:,.2f} model TFLOP a step')
    return
  if known.search:
    _search(known, settings, config)
    return
  result = compiling.compile_step(config, topology)
  print(cost.table(result.cost), flush=True)
  if known.output:
    storage.write_json(known.output, result.cost.to_json() | {'config': dataclasses.asdict(config)})
  if known.hlo and result.text:
    with storage.atomic_file(known.hlo, 'wb') as f:
      f.write(gzip.compress(result.text.encode()))


def _search(known: argparse.Namespace, settings: list[str], config: compiling.StepConfig) -> None:
  """Tries every pair, each in its own process: a compiler that dies takes nothing with it."""
  sizes = ([int(size) for size in known.batch_sizes.split(',')] if known.batch_sizes else
           sorted({max(config.batch_size // 2, 1), config.batch_size, 2 * config.batch_size}))
  tried = []
  with tempfile.TemporaryDirectory() as folder:
    for remat in known.remat.split(','):
      for size in sizes:
        output = Path(folder) / f'{remat}-{size}.json'
        child = subprocess.run(
            [sys.executable, __file__, f'--topology={known.topology}', f'--output={output}',
             *settings, f'--gin.BATCH_SIZE={size}', f'--gin.RetroConfig.remat={remat}'],
            text=True, capture_output=True, check=False)
        report = storage.read_json(output, None) if child.returncode == 0 else None
        tried.append({'batch_size': size, 'remat': remat, 'report': report,
                      'error': '' if report else (child.stderr.strip() or '?').splitlines()[-1]})
        print(_tried_line(tried[-1]), flush=True)
  fitting = [t for t in tried if t['report'] and t['report']['fits']]
  best = max(fitting, key=lambda t: t['report']['estimated_mfu'], default=None)
  print('\nbest that fits: ' + (_tried_line(best) if best else 'none'))
  if known.output:
    storage.write_json(known.output, {'best': best, 'tried': tried})


def _tried_line(tried: dict[str, Any]) -> str:
  line = f'batch {tried["batch_size"]:6,d}  remat {tried["remat"]:5s} '
  report = tried['report']
  if report is None:
    return f'{line} failed: {tried["error"]}'
  if not report['fits']:
    return f'{line} does not fit: {report["reason"] or "too large"}'
  return (f'{line} {report["hbm_bytes_per_device"] / chips.GIB:7.2f} GiB  step '
          f'{report["estimated_step_seconds"] * 1e3:9.2f} ms  MFU {report["estimated_mfu"]:6.1%} '
          f'(raw {report["estimated_mfu_raw"]:.1%}), estimated')


if __name__ == '__main__':
  main()
