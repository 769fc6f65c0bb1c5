"""Topologies by name, and figures of chips that have to agree with each other."""

import pytest

from retro_jax.errors import UserError
from retro_jax.topology import chips


@pytest.mark.parametrize('name, devices, wrap', [
    ('v5p:4x4x4', 64, (True, True, True)), ('v5p:2x4x4', 32, (False,) * 3),
    ('v4:4x4x8', 128, (True, True, True)), ('v4:2x2x1', 4, (False,) * 3),
    ('v5e:16x16', 256, (True, True, False)), ('v6e:8x16', 128, (False,) * 3),
    ('v5e:2x2', 4, (False,) * 3), ('tpu7x:2x2x1', 8, (False,) * 3)])
def test_names(name, devices, wrap):
  topology = chips.parse(name)
  assert (topology.num_devices, topology.wrap) == (devices, wrap)


@pytest.mark.parametrize('name, message', [
    ('v5q:4x4x4', r"no TPU generation 'v5q' \(did you mean 'v5p'\?\)"),
    ('v5p:4x4', 'v5p slices have 3 sides; write v5p:4x4x4'),
    ('v5e:0x2', 'v5e slices have 2 sides'), ('v5e', 'v5e slices have 2 sides')])
def test_unknown_names(name, message):
  with pytest.raises(UserError, match=message):
    chips.parse(name)


def test_clocks_follow_from_peaks():
  clocks = {name: chip.clock / 1e9 for name, chip in chips.CHIPS.items()}
  assert clocks == pytest.approx(
      {'v4': 1.05, 'v5e': 1.50, 'v5p': 1.75, 'v6e': 1.75, 'tpu7x': 2.2}, rel=0.01)
