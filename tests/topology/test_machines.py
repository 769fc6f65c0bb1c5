"""What gin/machines says of a small step is what the compiler makes of it today.

Each file of a TPU has a line such as

  # Small step on v5e:2x2: 10.5 MiB a device, all-gather 30, all-reduce 7.

of the step below. A new libtpu, or other options, are to be looked at before it is changed.
"""

import json
import re

import pytest

from tests.topology.tool import ROOT, call, model_file

MACHINES = ('v4', 'v5e', 'v5p', 'v6e', 'tpu7x')
SMALL = dict(vocab_size=1024, d_model=256, num_layers=2, num_heads=2, head_dim=128, cca_layers=(),
             positions='rotary', attention_kernel='einsum')


@pytest.mark.parametrize('name', MACHINES)
def test_the_small_step(name, tmp_path):
  pytest.importorskip('libtpu')
  text = (ROOT / 'gin' / 'machines' / f'{name}.gin').read_text()
  stated = re.search(r'Small step on (\S+): ([\d.]+) MiB a device, (.*)\.$', text, re.MULTILINE)
  counts = dict(part.split() for part in stated[3].split(', '))
  found = call(
      f'--topology={stated[1]}', f"--gin_file={model_file(tmp_path / 'model.gin', SMALL)}",
      f'--gin_file=gin/machines/{name}.gin', '--gin.BATCH_SIZE=16', '--gin.SEQUENCE_LENGTH=256',
      f'--output={tmp_path}/out.json')
  assert found.returncode == 0, found.stderr[-3000:]
  report = json.loads((tmp_path / 'out.json').read_text())
  assert report['fits']
  assert report['hbm_bytes_per_device'] / 2 ** 20 == pytest.approx(float(stated[2]), rel=0.02)
  assert report['collective_counts'] == {kind: int(count) for kind, count in counts.items()}


def test_all_machines_are_here():
  files = {file.stem for file in (ROOT / 'gin' / 'machines').glob('*.gin')}
  assert files == {*MACHINES, 'cpu', 'gpu', 'accelerator'}
