"""What gin/models says in its comments about parameters and FLOPs is what the code counts."""

import re
from pathlib import Path

import pytest

from retro_jax.models import flops
from tools import count_parameters

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / 'gin' / 'models').glob('*.gin'))


@pytest.mark.parametrize('file', [f for f in FILES if 'GFLOP' in f.read_text()],
                         ids=lambda f: f.stem)
def test_flops_of_the_header(file):
  config = count_parameters.model(file.stem)
  text = file.read_text()
  per_token = lambda c: flops.training_flops(c, 256, 2048) / 256 / 2048 / 1e9
  assert float(re.search(r'([\d.]+) GFLOP a token', text)[1]) == pytest.approx(
      per_token(config), abs=0.006)
  if match := re.search(r'the baseline: ([\d.]+) GFLOP', text):
    assert float(match[1]) == pytest.approx(per_token(config.baseline()), abs=0.006)
