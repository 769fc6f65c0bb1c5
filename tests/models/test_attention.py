"""Attention against loops, its masks, and the parts it is made of."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.models import attention, attention_kernels, placement, positions
from retro_jax.training.partitioning import MeshConfig, ShardingRules, make_mesh
from tests import reference, tiny_models

HEADS, WIDTH = 3, 4


def build(query_dim: int, context_dim: int, positions: str = 'relative'):
  """The module and its parameters, every one random."""
  return tiny_models.randomized(lambda: attention.Attention(
      query_dim, context_dim, HEADS, WIDTH, positions=positions, output_scale=1.0,
      rngs=nnx.Rngs(params=0)))


def make(query_dim: int, context_dim: int, positions: str = 'relative'):
  """The same, jitted."""
  module, p = build(query_dim, context_dim, positions)
  return jax.jit(module, static_argnames=('offset', 'key_groups')), p


@pytest.mark.parametrize('scheme', ['relative', 'rotary'])
@pytest.mark.parametrize('rows, columns, offset, groups', [
    (7, 7, 0, 1), (5, 9, 0, 1), (9, 5, 0, 1), (4, 8, 3, 1), (4, 8, 3, 3), (1, 6, -2, 2),
    (6, 1, 5, 1)])
def test_equals_loops(rows, columns, offset, groups, scheme):
  module, p = make(6, 10, scheme)
  rng = np.random.default_rng(rows * 100 + columns)
  x = rng.normal(size=(2, rows, 6)).astype(np.float32)
  context = rng.normal(size=(2, columns * groups, 10)).astype(np.float32)
  mask = rng.random((2, rows, columns * groups)) < 0.7
  got = module(x, context, mask, offset=offset, key_groups=groups)
  for b in range(2):
    expected = reference.attention(
        p, x[b].astype(np.float64), context[b].astype(np.float64),
        may_read=lambda i, j: mask[b, i - 1, j - 1],
        distance=lambda i, j: i - ((j - 1) % columns + 1) + offset)
    np.testing.assert_allclose(got[b], expected, rtol=1e-5, atol=1e-5)


def test_position_logits_do_not_depend_on_the_blocks_of_rows(monkeypatch):
  """In value and gradient, of rows that meet distances one by one, in pairs and all at once."""
  module, _ = build(6, 10)
  rng = np.random.default_rng(0)
  x, context, weights = (rng.normal(size=shape).astype(np.float32)
                         for shape in ((2, 3, 4, 6), (2, 3, 10, 10), (2, 3, 4, 6)))
  mask = rng.random((2, 3, 4, 10)) < 0.7
  structure, parameters = nnx.split(module)

  def run(together):
    monkeypatch.setattr(attention_kernels, '_TOGETHER', together)
    loss = lambda p, x: (nnx.merge(structure, p)(
        x, context, mask, offset=3, key_groups=2) * weights).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(parameters, x)

  wanted = jax.tree.leaves(run(4))
  for together in (1, 2):
    for leaf, of_all in zip(jax.tree.leaves(run(together)), wanted, strict=True):
      np.testing.assert_allclose(leaf, of_all, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('q, k, mask', [
    ((2, 5, 4, 8), (2, 7, 4, 8), (2, 5, 7)), ((5, 4, 8), (7, 4, 8), (1, 7)),
    ((2, 3, 2, 5, 4, 8), (2, 3, 1, 7, 4, 8), (2, 3, 1, 1, 7)),  # H of a chunk, its neighbours
    ((3, 2, 5, 4, 8), (3, 1, 7, 4, 8), (5, 7)), ((2, 1, 5, 4, 8), (2, 1, 7, 4, 8), (2, 1, 1, 7))])
@pytest.mark.parametrize('with_distances', [False, True])
def test_gradients_equal_those_of_a_plain_softmax(q, k, mask, with_distances):
  """Also where keys are shared and where rows read nothing."""
  rng = np.random.default_rng(0)
  draw = lambda shape: rng.normal(size=shape).astype(np.float32)
  mask = rng.random(mask) < 0.4
  arrays = [draw(q), draw(k), draw(k)]
  if with_distances:
    arrays.append(draw((q[-3] + k[-3], *q[-2:])))

  def plain(q, k, v, p=None):
    logits = jnp.einsum('...qhc,...shc->...hqs', q, k)
    if p is not None:
      rows, columns = q.shape[-3], k.shape[-3]
      index = rows - 1 - np.arange(rows)[:, None] + np.arange(columns)
      logits += jnp.einsum('...qhc,qshc->...hqs', q, p[index])
    kept = mask[..., None, :, :]
    weights = jax.nn.softmax(jnp.where(kept, logits, -1e30), axis=-1) * kept
    return jnp.einsum('...hqs,...shc->...qhc', weights, v)

  def ours(q, k, v, p=None):
    return attention_kernels.masked(q, k, v, mask, None if p is None else (q, p))

  cotangent = draw(q)
  run = lambda function: jax.jit(
      lambda *xs: (lambda y, back: (y, *back(cotangent)))(*jax.vjp(function, *xs)))(*arrays)
  for got, wanted in zip(run(ours), run(plain), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_projections_in_one_product_equal_those_one_by_one(monkeypatch):
  module, _ = build(6, 6)
  x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
  together = module._project(x, x)
  monkeypatch.setattr(attention, 'on_one_cpu', lambda: False)
  for got, wanted in zip(together, module._project(x, x), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('scheme', ['relative', 'rotary'])
def test_heads_first_on_a_mesh_equals_rows_first(scheme, monkeypatch):
  """What several GPUs run, in value and gradient."""
  if len(jax.devices()) < 4:
    pytest.skip('needs 4 devices')
  module = attention.Attention(8, 8, 2, 8, positions=scheme, output_scale=1.0,
                               rngs=nnx.Rngs(params=0))
  rng = np.random.default_rng(0)
  x, weights = (rng.normal(size=(2, 3, 6, 8)).astype(np.float32) for _ in range(2))
  mask = rng.random((2, 3, 6, 12)) < 0.6
  segments = np.repeat([[1, 2, 2], [3, 3, 0]], 2, axis=1).astype(np.int32)
  mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
  monkeypatch.setattr(attention_kernels, 'on_one_cpu', lambda: False)

  def run(heads_first):
    monkeypatch.setattr(attention_kernels, '_heads_first', lambda: heads_first)

    def loss(x):
      with placement.on(ShardingRules().activations(mesh)):
        y = module(x, jnp.tile(x, (1, 1, 2, 1)), mask, offset=3, key_groups=2)
        z = module.causal(x[:, 0], segments, 'blocked', 4) * (segments != 0)[..., None]
      return (y * weights).sum() + (z * weights[:, 1]).sum(), (y, z)

    (_, values), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    return *values, gradient

  for got, wanted in zip(run(True), run(False), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_rows_that_read_nothing_are_exactly_zero():
  module, _ = make(6, 6)
  x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
  mask = np.ones((5, 5), bool)
  mask[2] = False
  out = np.asarray(module(x, x, mask))
  assert (out[2] == 0).all() and (np.delete(out, 2, 0) != 0).all()


def test_gradient_is_finite_where_a_row_reads_nothing():
  module, _ = make(6, 6)
  x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
  mask = np.zeros((3, 3), bool)
  mask[0, 0] = True
  gradient = jax.jit(jax.grad(lambda x: (module(x, x, mask) ** 2).sum()))(x)
  assert np.isfinite(gradient).all() and np.abs(gradient[0]).max() > 0
  assert (np.asarray(gradient[1:]) == 0).all()


@pytest.mark.parametrize('scheme', ['relative', 'rotary'])
@pytest.mark.parametrize('kernel, block', [
    ('einsum', 0), ('blocked', 1), ('blocked', 3), ('blocked', 4), ('blocked', 9),
    ('dot_product', 0)])
def test_causal_kernels_equal_loops(kernel, block, scheme):
  """Also with blocks that do not divide the sequence; documents and padding inside it."""
  if kernel in attention_kernels.ROTARY_KERNELS and scheme != 'rotary':
    pytest.skip('knows no relative positions')
  module, p = build(6, 6, scheme)
  x = np.random.default_rng(3).normal(size=(2, 9, 6)).astype(np.float32)
  segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5, 5]], np.int32)
  got = jax.jit(lambda x, s: module.causal(x, s, kernel, block))(x, segments)
  for b in range(2):
    expected = reference.attention(
        p, x[b].astype(np.float64), x[b].astype(np.float64),
        may_read=lambda i, j: j <= i and segments[b, i - 1] == segments[b, j - 1],
        distance=lambda i, j: i - j)
    np.testing.assert_allclose(got[b], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('fused, scheme, block', [
    ('splash', 'rotary', 128), ('flash_relative', 'relative', 16)])
def test_fused_kernels_equal_the_reference_in_value_and_gradient(fused, scheme, block):
  """Interpreted, at the smallest size splash takes; on a mesh each device runs its part."""
  module = attention.Attention(128, 128, 2, 128, positions=scheme, output_scale=1.0,
                               rngs=nnx.Rngs(params=0))
  structure, parameters = nnx.split(module)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 256, 128)).astype(np.float32)
  segments = np.repeat([[1, 1, 2, 3], [4, 4, 4, 0]], 64, axis=1).astype(np.int32)
  weights = rng.normal(size=x.shape).astype(np.float32) * (segments != 0)[..., None]

  def value(kernel, mesh=None):
    def run(x, parameters):
      with placement.on(ShardingRules().activations(mesh)) if mesh else contextlib.nullcontext():
        y = nnx.merge(structure, parameters).causal(x, segments, kernel, block)
      return (y * weights).sum(), y
    (_, y), gradients = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(x, parameters)
    return [np.asarray(y)[segments != 0], *map(np.asarray, jax.tree.leaves(gradients))]

  expected, meshes = value('einsum'), [None]
  if len(jax.devices()) >= 4:
    meshes.append(make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4]))
  for mesh in meshes:
    for got, wanted in zip(value(fused, mesh), expected, strict=True):
      # Gradients of parameters are sums over 512 rows.
      np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * max(np.abs(wanted).max(), 10))


@pytest.mark.parametrize('scheme', ['relative', 'rotary'])
def test_absolute_position_does_not_matter(scheme):
  """Shifting rows and keys together by s positions shifts the output: only distances count."""
  module, _ = make(6, 6, scheme)
  x = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
  small = np.ones((5, 5), bool)
  large = np.zeros((8, 8), bool)
  large[3:, 3:] = small
  shifted = np.concatenate([np.full((3, 6), 9, np.float32), x])
  np.testing.assert_allclose(module(shifted, shifted, large)[3:], module(x, x, small),
                             rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('scheme', ['relative', 'rotary'])
def test_distance_matters(scheme):
  module, _ = make(6, 6, scheme)
  x = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
  mask = np.ones((5, 5), bool)
  assert np.abs(module(x, x, mask, offset=0) - module(x, x, mask, offset=1)).max() > 1e-3


@pytest.mark.parametrize('rows, columns, offset', [(4, 4, 0), (3, 7, 2), (6, 2, -1)])
def test_skew_puts_each_distance_at_its_key(rows, columns, offset):
  by_distance = np.broadcast_to(
      positions.distances(rows, columns, offset, causal=False), (rows, rows + columns))
  got = np.asarray(jax.jit(positions.skew, static_argnums=1)(by_distance, columns))
  for i in range(rows):
    for j in range(columns):
      assert got[i, j] == i - j + offset


def test_sinusoid_equals_the_formula():
  distances = np.array([126, 3, 0, -1, -64])
  expected = [reference.position_vector(int(d), 10) for d in distances]
  np.testing.assert_allclose(positions.sinusoid(distances, 10), expected, atol=1e-6)
