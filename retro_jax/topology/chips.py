"""Figures of the TPU generations, and topologies like 'v5p:4x4x4' described without a TPU.

What a program costs on such a chip is in cost.py and network.py.

Sources. Peaks, HBM sizes, HBM bandwidths: Google Cloud's "TPU versions" pages. ICI: the same
pages' per-chip totals, and for one link the bandwidths that "How to Scale Your Model" (JAX
Scaling Book, "TPUs") uses. HBM a program may use: what libtpu 0.0.42.1 says is available when
a program is too large; it keeps a little for itself. Clocks: the published peak divided by the
FLOPs of all MXUs in a cycle, so that cycles / clock and FLOPs / peak agree.
"""

import dataclasses
import math
import re
from typing import Any

from retro_jax.errors import UserError, nearest

GIB = 2 ** 30
INSTALL_LIBTPU = "libtpu is missing; install it with: pip install '.[tpu]'"


@dataclasses.dataclass(frozen=True)
class Chip:
  """One generation; figures are of one JAX device, which on tpu7x is half a chip.

  Attributes:
    name: as in a topology's name.
    peak_flops: dense bfloat16 FLOP/s.
    flops_per_cycle: of all MXUs.
    hbm_bytes: that a program may use.
    hbm_bytes_per_second: published peak.
    link_bytes_per_second: of one ICI link, one way.
    dimensions: of the torus.
    ring_multiple: a slice whose every side is a multiple of this is a torus.
    devices_per_chip: JAX devices.
    chip_config_name: of libtpu's description, or '' for its default.
  """
  name: str
  peak_flops: float
  flops_per_cycle: int
  hbm_bytes: float
  hbm_bytes_per_second: float
  link_bytes_per_second: float
  dimensions: int
  ring_multiple: int
  devices_per_chip: int = 1
  chip_config_name: str = ''

  @property
  def clock(self) -> float:
    """Cycles a second."""
    return self.peak_flops / self.flops_per_cycle


CHIPS = {chip.name: chip for chip in (
    # Two cores that act as one device, 'megacore'.
    Chip('v4', 275e12, 262_144, 30.75 * GIB, 1.2e12, 45e9, 3, 4,
         chip_config_name='megacore'),
    Chip('v5e', 197e12, 131_072, 15.75 * GIB, 0.819e12, 45e9, 2, 16),
    Chip('v5p', 459e12, 262_144, 95.74 * GIB, 2.765e12, 90e9, 3, 4),
    Chip('v6e', 918e12, 524_288, 31.25 * GIB, 1.638e12, 90e9, 2, 16),
    # 2,307 TFLOP/s, 192 GB, 7.38 TB/s and links of 100 GB/s a chip, shared by its two devices.
    Chip('tpu7x', 2307e12 / 2, 524_288, 94.75 * GIB, 7.38e12 / 2, 50e9, 3, 4,
         devices_per_chip=2),
)}

# What JAX calls a device (`device_kind`), and what MFU is held against.
_KINDS = {'TPU v4': 'v4', 'TPU v5 lite': 'v5e', 'TPU v5e': 'v5e', 'TPU v5': 'v5p', 'TPU v5p': 'v5p',
          'TPU v6 lite': 'v6e', 'TPU v6e': 'v6e', 'TPU7x': 'tpu7x'}
# NVIDIA's data sheets, dense bfloat16.
_GPU_PEAKS = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12, 'B200': 2250e12}


def peak_flops(device_kind: str) -> float:
  """Dense bfloat16 FLOP/s of one JAX device by its kind; 0 when not known."""
  if device_kind in _KINDS:
    return CHIPS[_KINDS[device_kind]].peak_flops
  return next((peak for name, peak in _GPU_PEAKS.items() if name in device_kind), 0.0)


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice.

  Attributes:
    name: 'v5p:4x4x4'.
    chip: its generation.
    shape: chips along x, y, z.
    wrap: which of these axes are rings.
  """
  name: str
  chip: Chip
  shape: tuple[int, int, int]
  wrap: tuple[bool, bool, bool]

  @property
  def num_devices(self) -> int:
    return math.prod(self.shape) * self.chip.devices_per_chip


def parse(name: str) -> Topology:
  """The topology called `name`, 'v5p:4x4x4' or 'v5e:16x16'.

  Raises:
    UserError: a generation or a shape that does not exist.
  """
  generation, _, sizes = name.partition(':')
  if generation not in CHIPS:
    raise UserError(f'topology {name!r}: no TPU generation {generation!r}'
                    f'{nearest(generation, CHIPS)}; known are {", ".join(CHIPS)}')
  chip = CHIPS[generation]
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){%d}' % (chip.dimensions - 1), sizes):
    example = 'x'.join(['4'] * chip.dimensions)
    raise UserError(f'topology {name!r}: {generation} slices have {chip.dimensions} sides; '
                    f'write {generation}:{example}')
  sides = [int(size) for size in sizes.split('x')]
  # Below these sizes, and at others, a slice has no links around its back: v4 and v5p wrap in
  # cubes of 4 x 4 x 4, v5e and v6e only as the whole pod of 16 x 16.
  whole = all(side % chip.ring_multiple == 0 for side in sides)
  open_sides = 3 - len(sides)
  return Topology(name, chip, tuple(sides + [1] * open_sides),
                  tuple([whole] * len(sides) + [False] * open_sides))


def devices(topology: Topology) -> list[Any]:
  """The slice's JAX devices: they have coordinates and can be compiled for, not run on.

  Raises:
    UserError: no libtpu, or a slice that libtpu does not know.
  """
  from jax.experimental import topologies  # wakes libtpu
  settings: dict[str, Any] = {}
  if topology.chip.chip_config_name:
    settings['chip_config_name'] = topology.chip.chip_config_name
  if any(topology.wrap):
    # Without it libtpu describes an open mesh and compiles other, slower collectives.
    settings['wrap'] = topology.wrap
  try:
    import libtpu  # noqa: F401  pylint: disable=unused-import
  except ImportError:
    raise UserError(INSTALL_LIBTPU) from None
  try:
    found = topologies.get_topology_desc(
        platform='tpu', topology_name=topology.name, **settings).devices
  except Exception as error:  # libtpu's own error class is not public
    reason = str(error).strip().splitlines()[0]
    raise UserError(f'topology {topology.name!r}: libtpu refuses it: {reason}') from error
  assert len(found) == topology.num_devices, (topology, len(found))
  return list(found)
