"""Attention as it is handed to cuDNN; where there is none, JAX's own attention stands in for it.

The stand-in has what a GPU showed of cuDNN: it takes 16-bit heads alone, and where a row may read
nothing it makes NaN of the gradients. On a GPU (tests/conftest.py) the kernel itself is tested.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from retro_jax.models import attention_kernels, placement, recomputation
from retro_jax.training.partitioning import MeshConfig, ShardingRules, make_mesh

# Of queries, of keys and of the mask: an encoder's own attention, its neighbours asking one chunk,
# and CCA.
SHAPES = [((2, 3, 2, 8, 2, 16), (2, 3, 2, 8, 2, 16), (2, 3, 2, 1, 8)),
          ((2, 3, 2, 8, 2, 16), (2, 3, 1, 4, 2, 16), (2, 3, 1, 1, 4)),
          ((2, 3, 4, 2, 16), (2, 3, 8, 2, 16), (2, 3, 4, 8)),
          ((8, 4, 2, 16), (8, 6, 2, 16), (1, 4, 6))]


@pytest.fixture
def on_a_gpu(monkeypatch):
  """Shapes that cuDNN, or what stands in for it, was called with."""
  calls, real = [], placement.has_cudnn()
  attend = jax.nn.dot_product_attention

  def stand_in(q, k, v, mask, scale, is_causal=False, implementation=None):
    if implementation == 'cudnn':
      assert q.dtype == k.dtype == v.dtype == jnp.bfloat16
      calls.append(q.shape)
      if real:
        return attend(q, k, v, mask=mask, scale=scale, is_causal=is_causal, implementation='cudnn')
    causal = np.tri(q.shape[1], k.shape[1], dtype=bool) if is_causal else True
    broken = ~(mask & causal).any(axis=-1)[:, 0, :, None, None]
    return attend(q, k, v, mask=mask, scale=scale, is_causal=is_causal,
                  implementation='xla') * jnp.where(broken, jnp.nan, 1).astype(v.dtype)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', stand_in)
  monkeypatch.setattr(attention_kernels, 'has_cudnn', lambda: True)
  monkeypatch.setattr(attention_kernels, 'on_one_cpu', lambda: False)
  return calls


def with_gradients(run, q, k, v, weights):
  loss = lambda *qkv: (run(*qkv).astype(jnp.float32) * weights).sum()
  return [np.asarray(x, np.float32)
          for x in (jax.jit(run)(q, k, v), *jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v))]


@pytest.mark.parametrize('devices', [1, 2])
@pytest.mark.parametrize('of_q, of_k, of_mask', SHAPES)
def test_equals_the_plain_one(of_q, of_k, of_mask, devices, on_a_gpu):
  if len(jax.devices()) < devices:
    pytest.skip(f'needs {devices} devices')
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in (of_q, of_k, of_k))
  mask, weights = rng.random(of_mask) < 0.6, rng.normal(size=of_q).astype(np.float32)
  mask[0, 0] = False
  mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
  here = lambda: (placement.on(ShardingRules().activations(mesh)) if devices > 1
                  else contextlib.nullcontext())

  def run(q, k, v):
    with here():
      return attention_kernels.masked(q, k, v, mask)

  got = with_gradients(run, q, k, v, weights)
  assert on_a_gpu
  expected = with_gradients(
      lambda q, k, v: attention_kernels.masked(*(x.astype(jnp.float32) for x in (q, k, v)), mask),
      q, k, v, weights)
  for one, other in zip(got, expected, strict=True):
    assert np.linalg.norm(one - other) < 0.01 * np.linalg.norm(other)
  # Whoever may read nothing gets 0, and 0 is the gradient.
  reads = np.broadcast_to(mask.any(-1), of_q[:-2])
  assert not reads.all() and (got[0][~reads] == 0).all() and (got[1][~reads] == 0).all()


def test_causal_attention_inside_documents(on_a_gpu):
  rng = np.random.default_rng(1)
  q, k, v = (jnp.asarray(rng.normal(size=(2, 12, 2, 8)), jnp.bfloat16) for _ in range(3))
  segments = np.repeat([[1, 1, 2, 3], [4, 4, 4, 0]], 3, axis=1).astype(np.int32)
  weights = (segments != 0)[..., None, None].astype(np.float32)
  run = lambda kernel: with_gradients(
      lambda q, k, v: attention_kernels.causal(q, k, v, segments, None, kernel) * weights,
      q, k, v, weights)
  expected = run('einsum')
  run('blocked')
  assert not on_a_gpu  # the reference stays one
  for one, other in zip(run('dot_product'), expected, strict=True):
    assert np.linalg.norm(one - other) < 0.01 * np.linalg.norm(other)
  assert on_a_gpu


@pytest.mark.parametrize('dtype, width, rows', [
    (jnp.float32, 16, 4), (jnp.bfloat16, 12, 4), (jnp.bfloat16, 136, 4), (jnp.bfloat16, 16, 5)])
def test_what_cudnn_does_not_take_is_left_to_xla(dtype, width, rows, on_a_gpu):
  x = jnp.ones((1, rows, 2, width), dtype)
  assert attention_kernels.masked(x, x, x, np.ones((rows, rows), bool)).shape == x.shape
  segments = np.ones((1, rows), np.int32)
  assert attention_kernels.causal(x, x, x, segments, None, 'dot_product').shape == x.shape
  assert not on_a_gpu


@pytest.mark.parametrize('remat, forward', [
    ('none', 1), ('dots', 1), ('projections', 1), ('attention', 1), ('full', 2)])
def test_backward_pass_has_what_cudnn_gave(remat, forward, monkeypatch):
  """Traced, not run: how often the forward kernel is in the program of a gradient."""
  monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(cudnn, 'check_compute_capability', lambda capability: True)
  monkeypatch.setattr(cudnn, 'is_cuda_compute_capability_equal', lambda capability: False)

  class Layer(nnx.Module):
    def __call__(self, x):
      return jax.nn.dot_product_attention(x, x, x, implementation='cudnn')

  run = recomputation.recomputed(Layer(), remat)
  program = str(jax.make_jaxpr(jax.grad(lambda x: run(x).astype(jnp.float32).sum()))(
      jnp.ones((1, 4, 2, 8), jnp.bfloat16)))
  assert program.count('dot_product_attention_fwd_wrapper[') == forward
  assert program.count('dot_product_attention_bwd_wrapper[') == 1
