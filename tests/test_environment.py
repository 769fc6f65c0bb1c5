"""The whole pinned set in one fresh process: what breaks first when a pin moves."""

import re
import subprocess
import sys
from pathlib import Path

import retro_jax

ROOT = Path(retro_jax.__file__).parents[1]
MODULES = ('jax', 'flax.nnx', 'optax', 'orbax.checkpoint', 'tensorflow', 'tensorflow_text', 'scann',
           'seqio', 'sentencepiece', 'google_crc32c', 'gin', 'apache_beam', 'tensorflow_datasets',
           'clu.metric_writers', 'tokenizers', 'safetensors', 'matplotlib', 'hypothesis', 'starlette',
           'uvicorn', 'prometheus_client')


def test_everything_pinned_imports_together_and_works():
  code = f"""
import importlib
for name in {MODULES!r}:
  importlib.import_module(name)
import jax.numpy as jnp, numpy as np, scann, tensorflow as tf
assert float(jnp.ones(3).sum()) == 3.0 and int(tf.reduce_sum(tf.ones(3))) == 3
found, _ = scann.scann_ops_pybind.builder(np.eye(8, dtype=np.float32), 1, 'squared_l2').score_brute_force().build().search(np.eye(8, dtype=np.float32)[3])
assert found[0] == 3
print('together')
"""
  result = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True, check=False)
  assert result.stdout.strip().endswith('together'), result.stderr[-2000:]


def test_importing_the_package_brings_neither_gin_nor_tensorflow():
  code = ('import sys, retro_jax.models.retro, retro_jax.training.loop; '
          'print(sorted({"gin", "tensorflow", "seqio", "scann"} & set(sys.modules)))')
  result = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True, check=False)
  assert result.stdout.strip() == '[]', result.stdout + result.stderr


def test_the_constraints_pin_what_setup_asks_for():
  asked = set(re.findall(r"^    '([A-Za-z0-9_-]+)", (ROOT / 'setup.py').read_text(), re.MULTILINE))
  for constraints in (ROOT / 'constraints').glob('py3*.txt'):
    pinned = {line.split('==')[0].lower().replace('_', '-')
              for line in constraints.read_text().splitlines() if '==' in line}
    missing = {name for name in asked if name.lower().replace('_', '-') not in pinned}
    assert not missing, f'{constraints.name} does not pin {missing}'
