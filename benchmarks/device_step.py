"""A training step on the devices at hand: RETRO beside its baseline, and where its time goes.

  python benchmarks/device_step.py --gin_file=gin/models/retro_425m.gin \\
      --gin_file=gin/models/rotary.gin --gin_file=gin/machines/gpu.gin --gin.BATCH_SIZE=16

Settings are those of tools/compile_for_topology.py (gin/runs/compile_for_topology.gin, read
first). Random tokens, real updates. Prints for each contender seconds a step, tokens a second, MFU
against the published peak and against large products that this run measured, and memory; with
--profile also the device's time by part of the model and by pass over it. On CPUs
benchmarks/train_step.py has the peer and counts CPU time.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import glob
import gzip
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# pylint: disable=wrong-import-position
from retro_jax import configuration, storage
from retro_jax.errors import UserError
from retro_jax.models import flops
from retro_jax.topology import chips, program
from retro_jax.topology import compile as compiling
from retro_jax.topology.sources import PARTS, Sources
from retro_jax.training import optimizer, partitioning, state

_WARM_UP = 3
_PROFILED = 2
_PROGRAM = 'program.hlo.gz'
# Rows of the square products that show what the device can do; CPUs would take minutes.
_SQUARE, _SQUARE_ON_CPU = 8192, 1024


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=10, help='in a round')
  parser.add_argument('--variant', action='append', default=[], metavar='NAME=VALUE[;NAME=VALUE]',
                      help='one more contender: RETRO with these settings of gin')
  parser.add_argument('--only', nargs='+', default=[], metavar='NAME', help='of these contenders')
  parser.add_argument('--profile', default='', metavar='FOLDER',
                      help='profile of the first contender: table, program, and for TensorBoard. '
                           'On GPUs set XLA_FLAGS=--xla_gpu_enable_command_buffer= for it')
  parser.add_argument('--output', default='', help='JSON file for the numbers')
  arguments, settings = parser.parse_known_args()
  configs = contenders(settings, arguments.variant)
  if unknown := set(arguments.only) - set(configs):
    parser.error(f'no contender {sorted(unknown)[0]!r}, only {", ".join(configs)}')
  configs = {name: configs[name] for name in arguments.only or configs}
  device = jax.devices()[0]
  model = next(iter(configs.values())).model
  rows = _SQUARE_ON_CPU if device.platform == 'cpu' else _SQUARE
  ceiling = product_flops(rows, model.compute_dtype)
  print(f'{len(jax.devices())} x {device.device_kind}, jax {jax.__version__}; products of '
        f'{rows:,} in {model.dtype}: {ceiling / 1e12:,.1f} TFLOP/s', flush=True)
  result: dict[str, Any] = {
      'device': device.device_kind, 'devices': len(jax.devices()), 'jax': jax.__version__,
      'settings': settings, 'product_flops_per_second': ceiling, 'contenders': {}}
  begin = time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor(len(configs)) as pool:
    compiled = dict(zip(configs, pool.map(compiled_step, configs.values())))
  result['compile_seconds'] = time.perf_counter() - begin
  print(f'compiled {len(configs)} steps in {result["compile_seconds"]:.0f} s', flush=True)
  for number, (name, config) in enumerate(configs.items()):
    folder = arguments.profile if number == 0 else ''
    measured = measure(config, compiled[name], arguments.rounds, arguments.steps, ceiling, folder)
    result['contenders'][name] = measured
    print(line(name, measured), flush=True)
    if arguments.output:
      storage.write_json(arguments.output, result)
  print(comparison(result['contenders']))
  if arguments.profile:
    print(profile_table(arguments.profile))


def contenders(settings: list[str], variants: list[str]) -> dict[str, compiling.StepConfig]:
  """Steps to measure by name."""

  def resolved(more: list[str]) -> compiling.StepConfig:
    line = configuration.parse_arguments([f'--gin_file={compiling.BASE}', *settings, *more])
    return configuration.resolve(compiling.StepConfig, compiling.CONFIGURABLES, line)

  retro = resolved([])
  known = {'RETRO': retro,
           'baseline': dataclasses.replace(retro, model=retro.model.baseline())}
  for variant in variants:
    known[f'RETRO, {variant}'] = resolved([f'--gin.{part}' for part in variant.split(';')])
  return known


def product_flops(rows: int, dtype: Any) -> float:
  """FLOP/s of a large square product, best of five times ten."""
  one, two = (jax.random.normal(jax.random.key(i), (rows, rows), dtype) for i in (0, 1))
  run = jax.jit(jnp.matmul)
  times = []
  for _ in range(5):
    begin = time.perf_counter()
    for _ in range(10):
      last = run(one, two)
    last.block_until_ready()
    times.append((time.perf_counter() - begin) / 10)
  return 2 * rows ** 3 / min(times)


def compiled_step(config: compiling.StepConfig) -> Any:
  """The step, or the error that it does not fit."""
  try:
    return compiling.lower(config, partitioning.make_mesh(config.mesh)).compile()
  except jax.errors.JaxRuntimeError as error:
    return error


def measure(config: compiling.StepConfig, compiled: Any, rounds: int, steps: int, ceiling: float,
            folder: str) -> dict[str, Any]:
  """One contender; `error` alone where it does not fit the device's memory."""
  mesh = partitioning.make_mesh(config.mesh)
  try:
    if isinstance(compiled, Exception):
      raise compiled
    steps_of = Steps(config, mesh, compiled)
    steps_of.take(_WARM_UP)
    seconds = [steps_of.take(steps) / steps for _ in range(rounds)]
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return {'error': 'does not fit: ' + str(error).strip().splitlines()[0]}
  memory = compiled.memory_analysis()
  tokens = config.batch_size * config.sequence_length
  model_flops = flops.training_flops(config.model, config.batch_size, config.sequence_length)
  median = statistics.median(seconds)
  peak = mesh.size * chips.peak_flops(jax.devices()[0].device_kind)
  if folder:
    with jax.profiler.trace(folder):
      steps_of.take(_PROFILED)
    with storage.atomic_file(f'{folder}/{_PROGRAM}', 'wb') as f:
      f.write(gzip.compress(compiled.as_text().encode()))
  return {
      'seconds_per_step': seconds, 'tokens_per_second': tokens / median,
      'model_flops_per_step': model_flops, 'mfu': model_flops / median / peak if peak else None,
      'of_measured_products': model_flops / median / (mesh.size * ceiling),
      'bytes_per_device': memory.argument_size_in_bytes + memory.temp_size_in_bytes,
      'losses': steps_of.losses}


class Steps:
  """A state, a batch, and steps on them."""

  def __init__(self, config: compiling.StepConfig, mesh: jax.sharding.Mesh, compiled: Any):
    rule = optimizer.make_optimizer(config.optimizer, compiling.SCHEDULE)
    abstract = state.abstract_state(config.model, rule, config.rules, mesh)
    self._state = state.init_state(config.model, rule, 0, abstract)
    self._run, self._batch = compiled, random_batch(config, mesh)
    self.losses: list[float] = []

  def take(self, count: int) -> float:
    """Seconds of so many steps."""
    begin = time.perf_counter()
    for _ in range(count):
      self._state, metrics = self._run(self._state, self._batch)
    self.losses.append(float(metrics['loss']))
    return time.perf_counter() - begin


def random_batch(config: compiling.StepConfig, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """Sequences of two documents each, all neighbours there."""
  rng = np.random.default_rng(0)
  examples = partitioning.batch_sharding(mesh)
  batch = {}
  shapes = compiling.batch_shapes(config.model, config.batch_size, config.sequence_length)
  for name, (shape, dtype) in shapes.items():
    if name == 'documents':
      value = np.arange(shape[1])[None] * 2 // shape[1] + np.zeros(shape)
    elif name in ('tokens', 'targets', 'neighbor_tokens'):
      value = rng.integers(1, config.model.vocab_size, shape)
    else:
      value = np.full(shape, 4 * config.model.chunk_length if name == 'text_bytes' else 1)
    batch[name] = jax.device_put(value.astype(dtype), examples)
  return batch


def profile_table(folder: str) -> str:
  """The first device's time in the profile there, and the ops that took longest."""
  found = sorted(glob.glob(f'{folder}/plugins/profile/*/*.xplane.pb'))
  with gzip.open(f'{folder}/{_PROGRAM}', 'rt') as f:
    parsed = program.parse(f.read())
  owners = {op.name: (computation, op) for computation in parsed.computations.values()
            for op in computation.ops}
  sources, by_part, by_op = Sources(parsed), collections.Counter(), collections.Counter()
  for name, kernel, seconds in device_times(found[-1]):
    source = sources.of(*owners[name]) if name in owners else ('unknown', 'other')
    by_part[source] += seconds / _PROFILED
    by_op[(*source, name or kernel)] += seconds / _PROFILED
  return by_part_table(by_part) + '\n' + longest(by_op, {
      name: op for name, (_, op) in owners.items()})


def device_times(path: str) -> list[tuple[str, str, float]]:
  """(HLO op or '', kernel, seconds) of what ran on the first device, loops themselves left out."""
  planes = list(jax.profiler.ProfileData.from_file(path).planes)
  devices = [plane for plane in planes if plane.name.startswith('/device:')]
  times = []
  for plane in devices[:1] or planes:
    for timeline in plane.lines:
      if devices and not timeline.name.startswith(('Stream', 'XLA Ops')):
        continue
      for event in timeline.events:
        stats = dict(event.stats)
        name = str(stats.get('hlo_op', '')).lstrip('%')
        if (devices or name) and not name.startswith(('while', 'call', 'conditional')):
          times.append((name, event.name, event.duration_ns / 1e9))
  return times


def by_part_table(by_part: collections.Counter) -> str:
  """Milliseconds a step: parts of the model down, passes across."""
  passes = sorted({source[0] for source in by_part})
  parts = sorted(PARTS, key=lambda part: -sum(by_part[p, part] for p in passes))
  whole = sum(by_part.values())
  rows = [f'{"ms a step":12s}' + ''.join(f'{p:>12s}' for p in passes)
          + f'{"sum":>10s}{"share":>8s}']
  for part in parts:
    values = [by_part[p, part] for p in passes]
    rows.append(f'{part:12s}' + ''.join(f'{1e3 * v:12.2f}' for v in values)
                + f'{1e3 * sum(values):10.2f}{sum(values) / whole:8.1%}')
  return '\n'.join([*rows, f'{"sum":12s}' + ''.join(
      f'{1e3 * sum(by_part[p, part] for part in parts):12.2f}' for p in passes)
                    + f'{1e3 * whole:10.2f}'])


def longest(by_op: collections.Counter, ops: dict[str, program.Op], count: int = 40) -> str:
  """The ops that take longest, with what they are of."""
  rows = []
  for (of_pass, part, name), seconds in by_op.most_common(count):
    op = ops.get(name)
    what = f'{op.opcode} {op.target} {op.type[:60]} {op.op_name[-90:]}' if op else ''
    rows.append(f'{1e3 * seconds:8.2f} ms {of_pass:10s} {part:10s} {name:44s} {what}')
  return '\n'.join(rows)


def line(name: str, measured: dict[str, Any]) -> str:
  if 'error' in measured:
    return f'{name}: {measured["error"]}'
  low, high = min(measured['seconds_per_step']), max(measured['seconds_per_step'])
  mfu = f'MFU {measured["mfu"]:.1%}, ' if measured['mfu'] else ''
  return (f'{name}: {1e3 * low:,.1f} to {1e3 * high:,.1f} ms a step, '
          f'{measured["tokens_per_second"]:,.0f} tokens/s, {mfu}'
          f'{measured["of_measured_products"]:.1%} of measured products, '
          f'{measured["bytes_per_device"] / chips.GIB:.1f} GiB, '
          f'loss {measured["losses"][0]:.3f} to {measured["losses"][-1]:.3f}')


def comparison(measured: dict[str, Any]) -> str:
  """Time of each over the baseline, beside the ratio of model FLOPs."""
  base = measured.get('baseline', {})
  rows = []
  for name, one in measured.items():
    if name != 'baseline' and 'seconds_per_step' in one and 'seconds_per_step' in base:
      times = statistics.median(one['seconds_per_step']) / statistics.median(
          base['seconds_per_step'])
      needed = one['model_flops_per_step'] / base['model_flops_per_step']
      rows.append(f'{name} over baseline: time {times:.3f}, model FLOPs {needed:.3f}: '
                  f'{times / needed:.3f}')
  return '\n'.join(rows)


if __name__ == '__main__':
  try:
    main()
  except UserError as error:
    sys.exit(f'error: {error}')
