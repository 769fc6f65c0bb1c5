"""The report: what a compiled training step would cost, as a dataclass, as JSON, as a table.

Where the figures come from: replay.py. How far to trust them: docs/topology.md.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from retro_jax.topology import replay
from retro_jax.topology.chips import GIB, Topology
from retro_jax.topology.program import Program
from retro_jax.topology.sources import PARTS, PASSES

_KERNEL_NAMES = re.compile(r'splash_m[hq]a_|/pallas_call')


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes in the HBM of one device, as the compiler planned them.

  Attributes:
    arguments: state and batch.
    temporaries: activations, gathered parameters, gradients.
    outputs: the new state and metrics.
    aliased: outputs that take the place of arguments.
    code: the program; not in `total`.
  """
  arguments: int
  temporaries: int
  outputs: int
  aliased: int
  code: int = 0

  @property
  def total(self) -> int:
    return self.arguments + self.temporaries + self.outputs - self.aliased


@dataclasses.dataclass(frozen=True)
class SourceRow:
  """One line of the table: a pass over a part of the model; seconds and FLOPs of one device."""
  pass_name: str
  part: str
  seconds: float
  seconds_raw: float
  exposed_collective_seconds: float
  mxu_flops: float


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one training step of a program would cost on a topology.

  Figures are of one device and one step unless they say otherwise; those that need a program
  are None when the compiler ran out of memory.

  Attributes:
    topology, num_devices: the slice.
    fits: whether the program was compiled and its memory is within the device's.
    reason: the compiler's words when it does not fit.
    hbm_bytes_per_device: arguments + temporaries + outputs - aliased; when it does not fit,
      what the compiler says it would need.
    hbm_capacity_bytes: that a program may use.
    memory: the parts of `hbm_bytes_per_device`.
    model_flops_per_step: of all devices together, by formula (models/flops.py).
    mxu_flops_over_model_flops: what the program computes against it; recomputation and the
      masked half of attention make it more than 1.
    collective_bytes_per_device: bytes a device sends, by kind.
    collective_counts: collectives a device takes part in, by kind.
    collective_seconds: that links are busy, hidden or not.
    exposed_collective_seconds: that compute waits for links.
    estimated_step_seconds: by the blend of cycles and HBM bandwidth: the optimistic end.
    estimated_step_seconds_raw: by libtpu's cycles alone: the pessimistic end.
    estimated_mfu, estimated_mfu_raw: model FLOPs / (step seconds x peak of all devices).
    kernel_seconds: in Pallas kernels, at an assumed fraction of the peak.
    hbm_traffic_bytes, host_traffic_bytes: moved by compute; to and from the host, not timed.
    compile_seconds: wall time of the compiler on this machine.
    time_by_source: the table, longest first.
    doubts: what was counted on assumption or not at all, one sentence each.
  """
  topology: str
  num_devices: int
  fits: bool
  hbm_capacity_bytes: float
  model_flops_per_step: float
  compile_seconds: float
  reason: str = ''
  hbm_bytes_per_device: float | None = None
  memory: Memory | None = None
  mxu_flops_over_model_flops: float | None = None
  collective_bytes_per_device: dict[str, float] = dataclasses.field(default_factory=dict)
  collective_counts: dict[str, int] = dataclasses.field(default_factory=dict)
  collective_seconds: float | None = None
  exposed_collective_seconds: float | None = None
  estimated_step_seconds: float | None = None
  estimated_step_seconds_raw: float | None = None
  estimated_mfu: float | None = None
  estimated_mfu_raw: float | None = None
  kernel_seconds: float | None = None
  hbm_traffic_bytes: float | None = None
  host_traffic_bytes: float | None = None
  time_by_source: tuple[SourceRow, ...] = ()
  doubts: tuple[str, ...] = ()

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


def of_program(program: Program, topology: Topology, coordinates: Sequence[Sequence[int]],
               memory: Memory, model_flops: float, compile_seconds: float) -> Cost:
  """Prices a compiled program.

  Args:
    program: parsed text.
    topology: the slice.
    coordinates: of the devices on the torus, in mesh order.
    memory: the compiler's plan.
    model_flops: of one step on all devices.
    compile_seconds: that compiling took.
  """
  run = replay.Replay(program, topology, coordinates)
  peak = topology.chip.peak_flops * topology.num_devices
  rows = [SourceRow(pass_name, part, **dataclasses.asdict(row))
          for (pass_name, part), row in run.rows.items()]
  rows.sort(key=lambda row: -(row.seconds + row.exposed_collective_seconds))
  traffic = dict(sorted(run.traffic.items()))
  return Cost(
      topology=topology.name, num_devices=topology.num_devices,
      fits=memory.total <= topology.chip.hbm_bytes,
      hbm_capacity_bytes=topology.chip.hbm_bytes, hbm_bytes_per_device=memory.total,
      memory=memory, model_flops_per_step=model_flops,
      mxu_flops_over_model_flops=run.mxu_flops * topology.num_devices / model_flops,
      collective_bytes_per_device={kind: t.num_bytes for kind, t in traffic.items()},
      collective_counts={kind: t.count for kind, t in traffic.items()},
      collective_seconds=sum(t.seconds for t in traffic.values()),
      exposed_collective_seconds=run.exposed_collective_seconds,
      estimated_step_seconds=run.seconds, estimated_step_seconds_raw=run.seconds_raw,
      estimated_mfu=model_flops / peak / run.seconds if run.seconds else None,
      estimated_mfu_raw=model_flops / peak / run.seconds_raw if run.seconds_raw else None,
      kernel_seconds=run.kernel_seconds, hbm_traffic_bytes=run.hbm_bytes,
      host_traffic_bytes=run.host_bytes, compile_seconds=compile_seconds,
      time_by_source=tuple(rows), doubts=_doubts(program, run))


def _doubts(program: Program, run: replay.Replay) -> tuple[str, ...]:
  doubts = []
  if program.unparsed:
    doubts.append(f'{len(program.unparsed)} lines of the text were not understood, the first: '
                  f'{program.unparsed[0][:100]}')
  if run.pallas:
    doubts.append(f'{run.kernel_seconds * 1e3:.2f} ms are Pallas kernels, taken to reach '
                  f'{replay.KERNEL_EFFICIENCY:.0%} of the peak: {_counts(run.pallas)}')
  if run.unknown_kernels:
    doubts.append('Pallas kernels of unknown FLOPs, counted as waiting for HBM: '
                  + _counts(run.unknown_kernels))
  if not run.pallas and any(_KERNEL_NAMES.search(op.op_name) for computation in
                            program.computations.values() for op in computation.ops):
    doubts.append('there is code of Pallas kernels but no kernel: they were lowered in interpreted '
                  'form, perhaps because the code asked for the default backend, which is the CPU')
  if run.unmodelled:
    doubts.append(f'custom calls counted as nothing: {_counts(run.unmodelled)}')
  if run.host_bytes:
    doubts.append(f'{run.host_bytes / 1e9:.1f} GB to or from the host are not timed')
  return tuple(doubts)


def _counts(counter: dict[str, int]) -> str:
  return ', '.join(f'{name} x {count}' for name, count in sorted(counter.items()))


def table(cost: Cost) -> str:
  """The report as lines for people."""
  lines = [f'{cost.topology}, {cost.num_devices} devices, '
           f'{cost.model_flops_per_step / 1e12:,.2f} model TFLOP a step, '
           f'compiled in {cost.compile_seconds:,.0f} s']
  capacity = f'{cost.hbm_capacity_bytes / GIB:.2f} GiB'
  if cost.hbm_bytes_per_device is None:
    return '\n'.join([*lines, f'does not compile for {capacity} a device: {cost.reason}'])
  lines.append(f'{"fits" if cost.fits else "DOES NOT FIT"}: '
               f'{cost.hbm_bytes_per_device / GIB:.2f} of {capacity} HBM a device')
  if cost.reason:
    lines.append(f'  {cost.reason}')
  if cost.estimated_step_seconds is None:
    return '\n'.join(lines)
  lines += [
      f'step, estimated  {cost.estimated_step_seconds * 1e3:10.2f} ms (blend)  '
      f'{cost.estimated_step_seconds_raw * 1e3:10.2f} ms (raw cycles)',
      f'MFU, estimated   {cost.estimated_mfu:10.1%}    (blend)  '
      f'{cost.estimated_mfu_raw:10.1%}    (raw cycles)',
      f'MXU FLOPs / model FLOPs {cost.mxu_flops_over_model_flops:.3f}',
      f'collectives: {cost.collective_seconds * 1e3:.2f} ms on the links, '
      f'{cost.exposed_collective_seconds * 1e3:.2f} ms exposed']
  for kind, sent in cost.collective_bytes_per_device.items():
    lines.append(f'  {kind:22s}{cost.collective_counts[kind]:7,d} x {sent / 1e9:11.3f} GB a device')
  lines += ['', _by_source(cost), *(f'note: {doubt}' for doubt in cost.doubts)]
  return '\n'.join(lines)


def _by_source(cost: Cost) -> str:
  """Milliseconds of compute and exposed collectives: parts down, passes across."""
  cell = {(row.pass_name, row.part): row for row in cost.time_by_source}
  passes = [p for p in PASSES if any(key[0] == p for key in cell)]
  lines = [f'{"ms of compute":14s}' + ''.join(f'{p:>11s}' for p in passes) + f'{"exposed":>11s}']
  for part in PARTS:
    rows = [cell.get((p, part)) for p in passes]
    if any(rows):
      exposed = sum(row.exposed_collective_seconds for row in rows if row)
      lines.append(f'{part:14s}' + ''.join(
          f'{row.seconds * 1e3:11.2f}' if row else ' ' * 11 for row in rows)
          + f'{exposed * 1e3:11.2f}')
  return '\n'.join(lines)
