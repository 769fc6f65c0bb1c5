"""Golden files: each shipped model's resolved configuration and placement under each recipe.

They say what a change of a gin file, a default or a rule does to every run that is launched.
`pytest tests/training/test_golden.py --update_golden` writes them anew; look at the difference.
"""

import math
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from retro_jax import configuration
from retro_jax.models.config import RetroConfig
from retro_jax.train import CONFIGURABLES
from retro_jax.training import optimizer, partitioning, state
from retro_jax.training.loop import TrainJob

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / 'tests' / 'golden'
MODELS = sorted(f.stem for f in (ROOT / 'gin/models').glob('*.gin')
                if 'GFLOP' in f.read_text())
RECIPES = sorted(f.stem for f in (ROOT / 'gin/recipes').glob('*.gin'))
DEVICES = 64
TENSOR_DEVICES = 4  # divides the heads of every size


def resolved(model, recipe, *settings) -> TrainJob:
  line = configuration.parse_arguments([
      f'--gin_file=gin/models/{model}.gin', '--gin_file=gin/machines/accelerator.gin',
      '--gin_file=gin/runs/pretrain.gin', f'--gin_file=gin/recipes/{recipe}.gin',
      '--gin.RUN_DIR=RUN_DIR', "--gin.TRAIN_DATA={'EXAMPLES': 1.0}", *settings])
  return configuration.resolve(TrainJob, CONFIGURABLES, line)


def placement(job: TrainJob) -> str:
  """The table of model-info.txt on devices that are not there."""
  sizes = [job.mesh.data, job.mesh.fsdp, job.mesh.tensor]
  devices = TENSOR_DEVICES if job.mesh.tensor == -1 else DEVICES
  left = devices // math.prod(s for s in sizes if s > 0)
  mesh = AbstractMesh(tuple(left if s < 0 else s for s in sizes), partitioning.MESH_AXES,
                      axis_types=(AxisType.Auto,) * 3)
  abstract = state.abstract_state(
      job.model, optimizer.make_optimizer(job.optimizer, 100), job.rules, mesh)
  partitioning.check_sharded(abstract.parameters, mesh, job.mesh.unsharded_share)
  return f'mesh {dict(mesh.shape)}\n{state.sharding_table(job.model, abstract)}'


def described(model: str) -> str:
  parts = [configuration.describe(resolved(model, 'fsdp'))]
  for recipe in RECIPES:
    parts.append(f'# recipe {recipe}\n{placement(resolved(model, recipe))}')
  return '\n\n'.join(parts) + '\n'


@pytest.mark.parametrize('model', MODELS)
def test_golden(model, request):
  found, path = described(model), GOLDEN / f'{model}.txt'
  if request.config.getoption('--update_golden'):
    path.write_text(found)
  assert path.exists(), 'no golden file; write it with --update_golden'
  assert found == path.read_text(), (
      'configuration or placement has changed; if that was meant, run with --update_golden')


def test_every_golden_file_has_its_model():
  assert sorted(f.stem for f in GOLDEN.glob('*.txt')) == MODELS and len(MODELS) == 8


def test_a_rule_that_is_missing_is_refused():
  job = resolved('retro_172m', 'fsdp', '--gin.ShardingRules.embed=None')
  with pytest.raises(partitioning.UserError, match='lie whole on every device .*embedding'):
    placement(job)


def test_config_of_a_golden_file_is_the_shipped_one():
  text = (GOLDEN / 'retro_172m.txt').read_text()
  assert f'd_model = {RetroConfig().d_model}' in text and 'bfloat16' in text
  assert jax.device_count() == 8  # and yet placed on 64
