"""Replays a schedule: one pass over the ops in order, with a clock for compute and one for links.

A collective between its start and its done runs beside compute; one without a start, and what
a done still has to wait for, is exposed. What an op costs is in arithmetic.py and network.py.

Two times of an op are kept:
  raw    libtpu's own `estimated_cycles` / clock
  blend  the same for ops bound by compute; for those bound by HBM the lower of raw and
         bytes / (0.8 x HBM bandwidth), because libtpu's estimate of them is too slow by far
The clock of the replay is blend.
"""

import collections
import copy
import dataclasses
import re
from collections.abc import Sequence

from retro_jax.topology import network
from retro_jax.topology.arithmetic import COLLECTIVE_CALLS, Arithmetic, kernel_flops
from retro_jax.topology.chips import Topology
from retro_jax.topology.program import HOST_SPACE, Computation, Op, Program
from retro_jax.topology.sources import Sources

# Fraction of the HBM bandwidth that a copy reaches, as published for v6e: 1,360 of 1,638 GB/s.
HBM_EFFICIENCY = 0.8
# Fraction of the MXU peak that a Pallas kernel is taken to reach; a guess.
KERNEL_EFFICIENCY = 0.55

# Ops that take no time of a core: names for values, and copies that DMA engines make meanwhile.
_FREE = frozenset((
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'iota', 'after-all',
    'partition-id', 'replica-id', 'opt-barrier', 'add-dependency', 'async-update', 'domain',
    'copy-start', 'copy-done', 'slice-start', 'slice-done', 'dynamic-slice-start',
    'dynamic-slice-done', 'dynamic-update-slice-start', 'dynamic-update-slice-done'))
_FREE_CALLS = frozenset((*COLLECTIVE_CALLS, 'ConcatBitcast', 'AssumeGatherIndicesInBound',
                         'GatherScatterIndicesBitpacked', 'Sharding', 'AllocateBuffer',
                         'PrepareAsyncCallStart', 'PrepareAsyncCallDone'))
_PALLAS = 'tpu_custom_call'
# Attributes of `Replay` that add up.
_SUMS = ('rows', 'traffic', 'loops', 'pallas', 'unknown_kernels', 'without_cycles', 'unmodelled',
         'hbm_bytes', 'host_bytes', 'kernel_seconds')


@dataclasses.dataclass
class Row:
  """Of one pass and part: seconds of compute (blend, raw), exposed seconds, MXU FLOPs."""
  seconds: float = 0.0
  seconds_raw: float = 0.0
  exposed_collective_seconds: float = 0.0
  mxu_flops: float = 0.0


@dataclasses.dataclass
class Traffic:
  """Of one kind of collective: how many, bytes a device sends, seconds on links, exposed ones."""
  count: int = 0
  num_bytes: float = 0.0
  seconds: float = 0.0
  exposed_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Flight:
  end: float
  kind: str
  source: tuple[str, str]


class Replay:
  """The result of replaying a program on one device.

  Attributes:
    rows: by (pass, part).
    traffic: by kind of collective.
    loops: (name, trips) as met.
    pallas: kernels by name, how often each runs.
    unknown_kernels: those of them whose FLOPs are not known; they count as waiting for HBM.
    without_cycles: by opcode, ops of which libtpu gives no cycles; counted at the roofline.
    unmodelled: custom calls that are not known and counted as nothing, by target.
    hbm_bytes, host_bytes: moved by compute; moved to or from the host, not timed.
    kernel_seconds: in Pallas kernels.
  """

  def __init__(self, program: Program, topology: Topology,
               coordinates: Sequence[Sequence[int]]):
    self._program, self._topology, self._coordinates = program, topology, coordinates
    self._arithmetic, self._sources = Arithmetic(program), Sources(program)
    self._collectives: dict[str, list[tuple[Computation, Op]]] = {}
    self.rows: dict[tuple[str, str], Row] = collections.defaultdict(Row)
    self.traffic: dict[str, Traffic] = collections.defaultdict(Traffic)
    self.loops: list[tuple[str, int]] = []
    self.pallas: collections.Counter[str] = collections.Counter()
    self.unknown_kernels: collections.Counter[str] = collections.Counter()
    self.without_cycles: collections.Counter[str] = collections.Counter()
    self.unmodelled: collections.Counter[str] = collections.Counter()
    self.hbm_bytes = self.host_bytes = self.kernel_seconds = 0.0
    self.seconds = self._computation(program.entry, 1)

  @property
  def exposed_collective_seconds(self) -> float:
    return sum(row.exposed_collective_seconds for row in self.rows.values())

  @property
  def seconds_raw(self) -> float:
    """The step by libtpu's cycles, with the exposed collectives of the blended clock."""
    return sum(row.seconds_raw for row in self.rows.values()) + self.exposed_collective_seconds

  @property
  def mxu_flops(self) -> float:
    return sum(row.mxu_flops for row in self.rows.values())

  def _computation(self, computation: Computation, runs: int) -> float:
    """Seconds of one run; sums are counted `runs` times."""
    now = links_free = 0.0
    flying: dict[str, _Flight] = {}  # by channel
    started: dict[str, list[str]] = {}  # op -> channels

    def wait(channel: str) -> None:
      nonlocal now
      flight = flying.pop(channel)
      exposed = max(0.0, flight.end - now)
      self.rows[flight.source].exposed_collective_seconds += runs * exposed
      self.traffic[flight.kind].exposed_seconds += runs * exposed
      now += exposed

    for op in computation.ops:
      if op.opcode in _FREE:
        self._count_host(computation, op, runs)
        if op.opcode == 'async-update':
          started[op.name] = started.get(op.operands[0], [])
      elif op.opcode == 'while':
        trips = self._program.trip_count(op)
        self.loops.append((op.name, trips))
        for body in self._program.called(op):
          now += trips * self._computation(body, runs * trips)
      elif op.opcode == 'conditional':
        now += self._longest(self._program.called(op), runs)
      else:
        collectives = self._collectives_of(computation, op)
        starts, ends = self._ends(op)
        if ends and op.operands:
          for channel in started.get(op.operands[0], ()):
            if channel in flying:
              wait(channel)
        for where, collective in collectives:
          if collective.channel in flying:  # its middle, or its end
            if ends:
              wait(collective.channel)
            continue
          cost = network.transfer(where, collective, self._topology, self._coordinates)
          self._count_transfer(cost, runs)
          links_free = max(now, links_free) + cost.seconds
          source = (self._sources.of(where, collective) if collective.op_name
                    else self._sources.of(computation, op))
          flying[collective.channel] = _Flight(links_free, cost.kind, source)
          started.setdefault(op.name, []).append(collective.channel)
          if not starts:
            wait(collective.channel)
        if op.opcode in ('call', 'async-start', 'call-start') and not collectives:
          # Other work that is called, beside the core perhaps: counted as if it were not beside.
          now += sum(self._computation(body, runs) for body in self._program.called(op))
        elif not ends and not network.kind_of(op):
          now += self._compute(computation, op, runs, bool(collectives))
        elif op.estimated_cycles is not None:
          now += self._compute(computation, op, runs, bool(collectives))
    for channel in list(flying):
      wait(channel)
    return now

  def _longest(self, branches: Sequence[Computation], runs: int) -> float:
    """Seconds of the branch that takes most; only that one stays in the sums."""
    before = {name: getattr(self, name) for name in _SUMS}
    longest, kept = -1.0, before
    for branch in branches:
      vars(self).update(copy.deepcopy(before))
      seconds = self._computation(branch, runs)
      if seconds > longest:
        longest, kept = seconds, {name: getattr(self, name) for name in _SUMS}
    vars(self).update(kept)
    return longest

  def _ends(self, op: Op) -> tuple[bool, bool]:
    """Whether an op only starts, or ends, something asynchronous."""
    starts, ends = op.opcode.endswith('-start'), op.opcode.endswith('-done')
    if op.opcode == 'fusion':
      targets = {inner.target for body in self._program.called(op) for inner in body.ops}
      starts, ends = (call in targets for call in COLLECTIVE_CALLS)
    return starts, ends

  def _collectives_of(self, computation: Computation, op: Op) -> list[tuple[Computation, Op]]:
    if network.kind_of(op):
      return [(computation, op)]
    found = []
    if op.opcode in ('fusion', 'call', 'async-start', 'call-start'):
      for body in self._program.called(op):
        if body.name not in self._collectives:
          self._collectives[body.name] = [
              pair for inner in body.ops for pair in self._collectives_of(body, inner)]
        found += self._collectives[body.name]
    return found

  def _count_transfer(self, cost: network.Transfer, runs: int) -> None:
    traffic = self.traffic[cost.kind]
    traffic.count += runs
    traffic.num_bytes += runs * cost.num_bytes
    traffic.seconds += runs * cost.seconds

  def _count_host(self, computation: Computation, op: Op, runs: int) -> None:
    ends = [*op.results, *(a for x in computation.inputs(op) for a in x.results)]
    if op.opcode.endswith('-start') and any(a.space == HOST_SPACE for a in ends):
      # What moves is the smallest of source, target and slice, their flags aside.
      self.host_bytes += runs * min(a.num_bytes for a in ends if len(a.dims) > 0)

  def _compute(self, computation: Computation, op: Op, runs: int, network_too: bool) -> float:
    """Seconds of an op on the cores, counted in the sums."""
    if op.opcode == 'custom-call' and op.target != _PALLAS:
      if op.target not in _FREE_CALLS:
        self.unmodelled[op.target] += runs
      return 0.0
    if network_too and op.estimated_cycles is None:
      return 0.0  # a fusion that is nothing but a collective
    chip = self._topology.chip
    moved = self._arithmetic.hbm_bytes(computation, op)
    from_hbm = moved / (HBM_EFFICIENCY * chip.hbm_bytes_per_second)
    if op.opcode == 'custom-call':
      flops = kernel_flops(computation, op)
      name = re.sub(r'[.\d]+$', '', op.name)
      self.pallas[name] += runs
      if not flops:
        self.unknown_kernels[name] += runs
      seconds = raw = max(flops / (chip.peak_flops * KERNEL_EFFICIENCY), from_hbm)
      self.kernel_seconds += runs * seconds
    else:
      flops = self._arithmetic.flops(computation, op)
      at_peak = flops / chip.peak_flops
      if op.estimated_cycles is None:
        seconds = raw = max(at_peak, moved / chip.hbm_bytes_per_second)
        if seconds:
          self.without_cycles[op.opcode] += runs
      else:
        raw = op.estimated_cycles / chip.clock
        seconds = raw if at_peak >= from_hbm else min(raw, from_hbm)
    row = self.rows[self._sources.of(computation, op)]
    row.seconds += runs * seconds
    row.seconds_raw += runs * raw
    row.mxu_flops += runs * flops
    self.hbm_bytes += runs * moved
    return seconds
