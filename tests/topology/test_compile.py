"""The real compiler on a small step, through the tool, and what surrounds it.

What libtpu makes of a step is asserted as it is today: a new libtpu, or a change of the model
that adds a collective, is to be looked at before the numbers here are changed.
"""

import collections
import gzip
import json
import os

import pytest

from retro_jax.models import flops
from retro_jax.models.config import RetroConfig
from retro_jax.topology import chips, program, replay
from retro_jax.topology import compile as compiling
from retro_jax.training.compiler import CompilerConfig
from tests import tiny_models
from tests.topology.tool import ROOT, call, model_file, printed

SMALL = dict(vocab_size=4096, d_model=512, num_layers=4, num_heads=8, head_dim=64,
             cca_layers=(2, 4), encoder_d_model=256, encoder_layers=1, encoder_heads=4,
             encoder_head_dim=64, dtype='bfloat16', attention_kernel='einsum')

EXPECTED_COUNTS = {'all-gather': 86, 'all-reduce': 7, 'all-to-all': 2,
                   'collective-permute': 146, 'reduce-scatter': 2}


@pytest.fixture(scope='module')
def gin_file(tmp_path_factory):
  return model_file(tmp_path_factory.mktemp('gin') / 'small.gin', SMALL)


@pytest.fixture(scope='module')
def compiled(tmp_path_factory, gin_file):
  """(report, program, what the tool printed) of the small RETRO for four v5e."""
  pytest.importorskip('libtpu')
  folder = tmp_path_factory.mktemp('compiled')
  result = call('--topology=v5e:2x2', f'--gin_file={gin_file}', '--gin.BATCH_SIZE=16',
                '--gin.SEQUENCE_LENGTH=512', f'--output={folder}/out.json',
                f'--hlo={folder}/step.hlo.gz')
  assert result.returncode == 0, result.stderr[-3000:]
  text = gzip.decompress((folder / 'step.hlo.gz').read_bytes()).decode()
  return json.loads((folder / 'out.json').read_text()), program.parse(text), result.stdout


def test_the_small_step_fits(compiled):
  report, _, printed = compiled
  assert report['fits'] and report['hbm_capacity_bytes'] == 15.75 * 2 ** 30
  assert 0.1 < report['hbm_bytes_per_device'] / 2 ** 30 < 2
  # State: parameters and two moments in float32, a quarter of them on each device.
  assert report['memory']['arguments'] > 3 * 4 * 17e6 / 4
  assert report['memory']['aliased'] > 0.99 * report['memory']['outputs'], 'the state is donated'
  assert printed.startswith('v5e:2x2, 4 devices') and 'fits:' in printed


def test_its_collectives(compiled):
  report, _, _ = compiled
  assert report['collective_counts'] == EXPECTED_COUNTS
  assert report['collective_bytes_per_device'].keys() == EXPECTED_COUNTS.keys()


def test_the_mxu_computes_what_the_policy_implies(compiled):
  report, _, _ = compiled
  model = RetroConfig(**SMALL)
  computed = flops.forward_flops(model, 16, 512, as_computed=True)
  assert report['model_flops_per_step'] == flops.training_flops(model, 16, 512)
  assert report['mxu_flops_over_model_flops'] == pytest.approx(
      3 * computed.total / report['model_flops_per_step'], rel=0.01)
  # The same, part by part, from formulas that know nothing of the program.
  found = collections.Counter()
  for row in report['time_by_source']:
    found[row['part']] += 4 * row['mxu_flops'] / 3
  for part in ('attention', 'ffw', 'cca', 'encoder'):
    assert found[part] == pytest.approx(getattr(computed, part), rel=0.01), part
  assert found['loss'] == pytest.approx(computed.read, rel=0.01)


def test_everything_was_understood(compiled):
  report, parsed, _ = compiled
  assert report['doubts'] == [] and parsed.unparsed == ()
  run = replay.Replay(parsed, chips.parse('v5e:2x2'),
                      [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)])
  assert run.seconds == pytest.approx(report['estimated_step_seconds'], rel=0.01)
  assert not run.unmodelled
  # libtpu gives no cycles for tiny ops only.
  known = sum(op.estimated_cycles is not None for op in parsed.entry.ops)
  assert known > 500


def test_every_part_has_its_time(compiled):
  report, _, _ = compiled
  found = {(row['pass_name'], row['part']) for row in report['time_by_source']}
  for part in ('attention', 'ffw', 'cca', 'encoder'):
    assert {('forward', part), ('backward', part)} <= found
  assert ('forward', 'loss') in found  # which makes its gradient at once
  assert ('update', 'optimizer') in found
  total = sum(row['seconds'] for row in report['time_by_source'])
  unknown = sum(row['seconds'] for row in report['time_by_source'] if row['part'] == 'other')
  assert unknown < 0.05 * total


def test_full_recomputation_shows_in_the_flops(tmp_path):
  pytest.importorskip('libtpu')
  settings = dict(vocab_size=512, d_model=128, num_layers=4, num_heads=2, head_dim=64,
                  cca_layers=(), dtype='bfloat16', remat='full', attention_kernel='einsum')
  file = model_file(tmp_path / 'm.gin', settings)
  result = call('--topology=v5e:2x2', f'--gin_file={file}', '--gin.BATCH_SIZE=8',
                '--gin.SEQUENCE_LENGTH=256', f'--output={tmp_path}/out.json')
  assert result.returncode == 0, result.stderr[-3000:]
  report = json.loads((tmp_path / 'out.json').read_text())
  computed = flops.forward_flops(RetroConfig(**settings), 8, 256, as_computed=True)
  # Everything inside the four layers again, but for the last product of each: no gradient
  # needs its result.
  expected = 3 * computed.total + computed.attention + computed.ffw / 2
  found = report['mxu_flops_over_model_flops'] * report['model_flops_per_step']
  assert found == pytest.approx(expected, rel=0.02)
  again = [row for row in report['time_by_source'] if row['pass_name'] == 'recompute']
  assert {row['part'] for row in again} >= {'attention', 'ffw'}


_SPLASH = """
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
topology = chips.parse('v5e:2x2')
heads, n, width = 4, 1024, 128
x = jax.ShapeDtypeStruct((2, heads, n, width), 'bfloat16', sharding=on_a_chip(topology))
causal = masks.MultiHeadMask([masks.CausalMask((n, n))] * heads)
for fused in (False, True):
  other = None if fused else 512
  sizes = kernel.BlockSizes(
      block_q=512, block_kv=512, block_kv_compute=512, block_q_dkv=512, block_kv_dkv=512,
      block_kv_dkv_compute=512, block_q_dq=other, block_kv_dq=other, use_fused_bwd_kernel=fused)
  attend = jax.vmap(kernel.make_splash_mha(causal, block_sizes=sizes, head_shards=1,
                                           q_seq_shards=1))
  loss = lambda q, k, v: attend(q, k, v).astype('float32').sum()
  compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
  print('products', mxu_flops(compiled, topology) / (2 * 2 * heads * n * n / 2 * width))
"""


def test_the_flops_of_real_splash_kernels():
  pytest.importorskip('libtpu')
  # Forward 2; backward 3 for dq and 4 for dk and dv, or 5 when one kernel makes all.
  assert printed(_SPLASH) == ['products', '9.0', 'products', '7.0']


def test_batches_are_those_of_the_feature_converter():
  from retro_jax.data.features import RetroFeatureConverter, task_feature_lengths
  model = tiny_models.TINY
  shapes = compiling.batch_shapes(model, 2, 16)
  features = RetroFeatureConverter.MODEL_FEATURES
  lengths = RetroFeatureConverter(model.chunk_length).get_model_feature_lengths(
      task_feature_lengths(16, model.chunk_length))
  for name, (shape, dtype) in shapes.items():
    assert shape[:2] == (2, lengths[name])
    assert len(shape) == features[name].rank + 1
    assert dtype.dtype.name == features[name].dtype.name
  assert 'neighbor_tokens' not in compiling.batch_shapes(model.baseline(), 2, 16)


@pytest.mark.parametrize('message, needed, capacity', [
    ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
     '(256.00G) exceeds available HBM (15.75G).', 256 * 2 ** 30, 15.75 * 2 ** 30),
    ('RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. '
     'Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.', 17.5 * 2 ** 30, 15.75 * 2 ** 30),
    ('RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 79.0M of 63.9M vmem.',
     None, None)])
def test_memory_in_messages(message, needed, capacity):
  assert compiling.memory_in_message(message) == (needed, capacity)
  report = compiling.too_large(message, chips.parse('v5e:2x2'), 1e12, 1.0)
  assert not report.fits and report.hbm_bytes_per_device == needed
  assert report.hbm_capacity_bytes == 15.75 * 2 ** 30 and report.reason == message


@pytest.mark.parametrize('arguments, message', [
    (['--topolgy=v5e:2x2'], "did you mean '--topology'?"),
    (['--topology=v6f:2x2'], "did you mean 'v6e'?"),
    (['--topology=v5e:2x2', '--gin.BATCH_SIZ=3'], "did you mean 'BATCH_SIZE'?"),
    (['--topology=v5e:2x2', '--gin.SEQUENCE_LENGTH=100'], 'a multiple of chunk_length 64'),
    (['--topology=v5e:2x2', '--gin.CompilerConfig.options={"--a": "1"}'], 'name without dashes'),
    ([], '--topology is required')])
def test_misspelt_settings_are_one_line(gin_file, arguments, message):
  result = call(*arguments, f'--gin_file={gin_file}')
  assert result.returncode == 2 and message in result.stderr
  assert result.stderr.startswith('error: ') and len(result.stderr.splitlines()) == 1


def test_dry_run_says_what_would_be_compiled(gin_file):
  result = call('--topology=v5p:4x4x4', f'--gin_file={gin_file}', '--dry_run')
  assert result.returncode == 0, result.stderr
  assert "would compile for v5p:4x4x4: 64 devices, rings along ['x', 'y', 'z']" in result.stdout


def test_without_libtpu_the_way_to_it_is_told(tmp_path, gin_file):
  # A module that cannot be imported stands in front of the installed one.
  (tmp_path / 'libtpu.py').write_text('raise ImportError("no libtpu")\n')
  result = call('--topology=v5e:2x2', f'--gin_file={gin_file}', '--gin.SEQUENCE_LENGTH=512',
                PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}')
  assert result.returncode == 2
  assert result.stderr.strip().splitlines()[-1].endswith("pip install '.[tpu]'")


def test_options_are_text_by_name():
  with pytest.raises(ValueError, match='expected a name without dashes and a value as text'):
    CompilerConfig({'xla_tpu_scoped_vmem_limit_kib': 65536})


@pytest.fixture(scope='module')
def one_layer(tmp_path_factory):
  path = tmp_path_factory.mktemp('gin') / 'one_layer.gin'
  settings = dict(vocab_size=256, d_model=128, num_layers=1, num_heads=1, head_dim=128,
                  cca_layers=(), dtype='bfloat16')
  path.write_text(''.join(f'RetroConfig.{name} = {value!r}\n' for name, value in settings.items()))
  return path


def test_a_step_that_does_not_fit(tmp_path, one_layer):
  pytest.importorskip('libtpu')
  result = call('--topology=v5e:2x2', f'--gin_file={one_layer}', '--gin.BATCH_SIZE=8388608',
                '--gin.SEQUENCE_LENGTH=128', f'--output={tmp_path}/out.json')
  assert result.returncode == 0, result.stderr[-3000:]
  report = json.loads((tmp_path / 'out.json').read_text())
  assert not report['fits'] and report['estimated_step_seconds'] is None
  assert report['hbm_bytes_per_device'] > report['hbm_capacity_bytes'] == 15.75 * 2 ** 30
  assert 'RESOURCE_EXHAUSTED' in report['reason'] and 'DOES NOT FIT' in result.stdout


def test_search_goes_on_after_failures_and_names_the_best(tmp_path, one_layer):
  pytest.importorskip('libtpu')
  result = call('--topology=v5e:2x2', f'--gin_file={one_layer}', '--gin.SEQUENCE_LENGTH=128',
                '--search', '--batch_sizes=6,8', '--remat=none', f'--output={tmp_path}/out.json')
  assert result.returncode == 0, result.stderr[-3000:]
  report = json.loads((tmp_path / 'out.json').read_text())
  assert [t['batch_size'] for t in report['tried']] == [6, 8]
  assert 'does not divide over' in report['tried'][0]['error']
  assert report['best'] == report['tried'][1] and report['best']['report']['fits']
  assert 'best that fits: batch      8' in result.stdout
