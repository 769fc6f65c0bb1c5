"""Kernels of our own through the TPU's real compiler: it takes them, and they count their FLOPs."""

import json

import pytest

from tests.topology.tool import call, model_file, printed

_FLASH_RELATIVE = """
from retro_jax.models import flash_relative
heads, n, width = 2, 512, 128
for name in ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'):
  topology = chips.parse(name)
  here = on_a_chip(topology)
  array = lambda *shape, dtype='bfloat16': jax.ShapeDtypeStruct(shape, dtype, sharding=here)
  x, p, segments = array(2, heads, n, width), array(heads, n, width), array(2, n, dtype='int32')
  loss = lambda q, position, k, v, p, segments: flash_relative.attend(
      q, position, k, v, p, segments).astype('float32').sum()
  compiled = jax.jit(jax.grad(loss, argnums=range(5))).lower(x, x, x, x, p, segments).compile()
  print(name, mxu_flops(compiled, topology) / (2 * 2 * heads * n * n / 2 * width))
"""


def test_the_kernel_for_relative_positions():
  """On every generation that has what it needs."""
  pytest.importorskip('libtpu')
  # Nine products in the backward pass, the permutation one of them, of tiles 1.25 times the causal
  # half. The forward kernel's result is not asked for, and it is not run.
  assert printed(_FLASH_RELATIVE) == ['v5e:2x2', '11.25', 'v5p:2x2x1', '11.25', 'v6e:2x2', '11.25',
                                      'tpu7x:2x2x1', '11.25']


_SMALL = dict(vocab_size=1024, d_model=256, num_layers=2, num_heads=2, head_dim=128, cca_layers=(),
              dtype='bfloat16', attention_kernel='flash_relative')


@pytest.mark.parametrize('topology', ['v5e:2x2', 'v4:2x2x1'])
def test_a_training_step_with_it(topology, tmp_path):
  """Sharded, recomputed; v4 is told what to do instead."""
  pytest.importorskip('libtpu')
  found = call(f'--topology={topology}', f"--gin_file={model_file(tmp_path / 'm.gin', _SMALL)}",
               '--gin.BATCH_SIZE=8', '--gin.SEQUENCE_LENGTH=256', f'--output={tmp_path}/out.json')
  if topology.startswith('v4'):
    assert found.returncode == 2 and "set RetroConfig.attention_kernel = 'blocked'" in found.stderr
    return
  assert found.returncode == 0, found.stderr[-3000:]
  report = json.loads((tmp_path / 'out.json').read_text())
  assert report['fits']
  assert report['doubts'][0].endswith('flash_relative_backward x 2, flash_relative_forward x 2')
  assert 'attention' in {row['part'] for row in report['time_by_source']}
