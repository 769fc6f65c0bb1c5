"""The layer pattern, what a config refuses, and parameter counts against the paper's Table 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from retro_jax.models.config import LayerPlan, RetroConfig, layer_plan
from tests import tiny_models

ROOT = Path(__file__).resolve().parents[2]
# Millions without embeddings: baseline, RETRO.
TABLE_2 = {'retro_172m': (132, 172), 'retro_425m': (368, 425), 'retro_1_5b': (1309, 1451),
           'retro_7_5b': (6982, 7532)}
WIDTHS = {'retro_172m': 896, 'retro_425m': 1536, 'retro_1_5b': 2048, 'retro_7_5b': 4096}


@pytest.mark.parametrize('layers, pattern, expected', [
    (12, (6, 9, 12), LayerPlan(5, True, ((2, 2),), 0)),
    (7, (2, 4, 6), LayerPlan(1, True, ((1, 2),), 1)),
    (9, (1, 3, 6, 9), LayerPlan(0, True, ((1, 1), (2, 2)), 0)),
    (8, (1, 2, 5, 6, 7), LayerPlan(0, True, ((0, 1), (2, 1), (0, 2)), 1)),
    (4, (2,), LayerPlan(1, True, (), 2)),
    (4, (), LayerPlan(4, False, (), 0)),
    (32, tuple(range(6, 33, 3)), LayerPlan(5, True, ((2, 8),), 2)),
])
def test_layer_plan(layers, pattern, expected):
  plan = layer_plan(RetroConfig(num_layers=layers, cca_layers=pattern))
  assert plan == expected
  counted = (plan.prefix + plan.has_entry + plan.tail
             + sum((lm + 1) * repeats for lm, repeats in plan.periods))
  assert counted == layers


@pytest.mark.parametrize('changes, message', [
    (dict(cca_layers=(4, 2)), 'rising'), (dict(cca_layers=(2, 2)), 'rising'),
    (dict(cca_layers=(0,)), 'from 1 to 4'), (dict(cca_layers=(5,)), 'from 1 to 4'),
    (dict(encoder_cross_attention_layers=(3,)), 'from 1 to 2'),
    (dict(share_embeddings=True), 'd_model = encoder_d_model'), (dict(d_model=7), 'even'),
    (dict(dtype='float16'), 'dtype'), (dict(remat='some'), 'remat'),
    (dict(chunk_length=0), 'chunk_length')])
def test_impossible_configs_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny_models.tiny(**changes)


def test_defaults_are_those_of_the_paper():
  config = RetroConfig()
  assert (config.d_ff, config.encoder_d_ff, config.retrieved_length) == (3584, 3584, 128)
  assert config.has_retrieval and not config.baseline().has_retrieval
  assert RetroConfig(cca_layers=[6, 9]).cca_layers == (6, 9)


@pytest.fixture(scope='module')
def counts(tmp_path_factory):
  """What `tools/count_parameters.py` leaves with --output."""
  path = tmp_path_factory.mktemp('counts') / 'counts.json'
  run = subprocess.run([sys.executable, 'tools/count_parameters.py', f'--output={path}'], cwd=ROOT,
                       capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr
  assert json.loads(run.stdout) == json.loads(path.read_text())
  return json.loads(path.read_text())


@pytest.mark.parametrize('name', TABLE_2)
def test_parameter_counts_are_those_of_table_2(counts, name):
  baseline, with_retrieval = TABLE_2[name]
  assert counts[name]['baseline_non_embedding'] == pytest.approx(baseline * 1e6, rel=0.003)
  assert counts[name]['retro_non_embedding'] == pytest.approx(with_retrieval * 1e6, rel=0.003)
  assert counts[name]['embedding'] == 128_000 * WIDTHS[name]
  assert counts[name]['encoder_embedding'] == 128_000 * 896
  # Norm scales and biases, which Table 2 leaves out, are small change.
  assert 0 < counts[name]['retro_vectors'] < 5e-4 * counts[name]['retro_non_embedding']


def test_count_is_of_every_array():
  from tools import count_parameters
  config = tiny_models.tiny()
  total = sum(value.size for value in tiny_models.parameters(config).values())
  assert sum(count_parameters.count(config).values()) == total


def test_baseline_files_are_the_retro_files_without_cca():
  from tools import count_parameters
  for retro_name, baseline_name in count_parameters.MODELS.items():
    with_retrieval = count_parameters.model(retro_name)
    assert with_retrieval.cca_layers == tuple(range(6, with_retrieval.num_layers + 1, 3))
    assert count_parameters.model(baseline_name) == with_retrieval.baseline()
