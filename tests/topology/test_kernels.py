"""Kernels of our own through the TPU's real compiler: it takes them, and they count what they compute."""

import json
import os
import subprocess
import sys

import pytest

from tests.topology.tool import ROOT, call, model_file

_FLASH_RELATIVE = """
import os
os.environ.update(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from retro_jax.models import flash_relative
from retro_jax.topology import chips, program, replay
heads, n, width = 2, 512, 128
for name in ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'):
  topology = chips.parse(name)
  here = NamedSharding(Mesh(np.array(chips.devices(topology)[:1]), ('x',)), PartitionSpec())
  array = lambda *shape, dtype='bfloat16': jax.ShapeDtypeStruct(shape, dtype, sharding=here)
  x, p, segments = array(2, heads, n, width), array(heads, n, width), array(2, n, dtype='int32')
  loss = lambda q, position, k, v, p, segments: flash_relative.attend(
      q, position, k, v, p, segments).astype('float32').sum()
  compiled = jax.jit(jax.grad(loss, argnums=range(5))).lower(x, x, x, x, p, segments).compile()
  run = replay.Replay(program.parse(compiled.as_text()), topology, [(0, 0, 0)])
  assert not run.unknown_kernels and not run.unmodelled, (run.unknown_kernels, run.unmodelled)
  print(name, run.mxu_flops / (2 * 2 * heads * n * n / 2 * width))
"""


def test_the_kernel_for_relative_positions():
  """On every generation that has what it needs."""
  pytest.importorskip('libtpu')
  result = subprocess.run(
      [sys.executable, '-c', _FLASH_RELATIVE], cwd=ROOT, text=True, capture_output=True, check=False,
      env={**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''})
  assert result.returncode == 0, result.stderr[-3000:]
  # Nine products in the backward pass, the permutation one of them, of tiles 1.25 times the causal
  # half. The forward kernel's result is not asked for, and it is not run.
  assert result.stdout.split() == ['v5e:2x2', '11.25', 'v5p:2x2x1', '11.25', 'v6e:2x2', '11.25',
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
