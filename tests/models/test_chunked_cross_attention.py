"""CCA against a loop over positions, and which positions read which chunk's neighbours."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from retro_jax.models import chunked_cross_attention as cca_lib
from tests import reference, tiny_models


@functools.cache
def make(config):
  """CCA from (h, E, segments, mask of the neighbours), jitted; the module; its parameters."""
  module, p = tiny_models.randomized(lambda: cca_lib.ChunkedCrossAttention(
      config, output_scale=1.0, rngs=nnx.Rngs(params=0)))

  @jax.jit
  def call(h, encoded, segments, neighbor_mask):
    return module(h, encoded, cca_lib.attending_mask(segments, neighbor_mask, config.chunk_length))

  return call, module, p


def inputs(config, seed, chunks, k, documents):
  rng = np.random.default_rng(seed)
  batch = tiny_models.batch(config, rng, chunks=chunks, k=k, documents=documents)
  h = rng.normal(size=(*batch.tokens.shape, config.d_model)).astype(np.float32)
  encoded = rng.normal(size=(*batch.mask.shape, config.encoder_d_model)).astype(np.float32)
  return batch, h, encoded


def run(config, batch, h, encoded):
  return np.asarray(make(config)[0](h, encoded, batch.segments, batch.mask))


@pytest.mark.parametrize('m, r, chunks, k, documents', [
    (4, 8, 4, 2, False), (4, 8, 4, 2, True), (3, 6, 5, 3, True), (4, 5, 3, 1, False),
    (2, 7, 6, 2, True), (1, 2, 5, 2, False), (4, 8, 1, 2, False)])
def test_equals_the_loop_over_positions(m, r, chunks, k, documents):
  config = tiny_models.tiny(chunk_length=m, retrieved_length=r)
  _, _, p = make(config)
  batch, h, encoded = inputs(config, 10 * m + chunks, chunks, k, documents)
  got = run(config, batch, h, encoded)
  for b in range(len(h)):
    expected = reference.chunked_cross_attention(
        p, h[b].astype(np.float64), encoded[b].astype(np.float64), batch.mask[b],
        batch.segments[b], m)
    np.testing.assert_allclose(got[b], expected, rtol=1e-5, atol=1e-5)


def test_without_positions_equals_the_loop_and_knows_no_order():
  config = tiny_models.tiny(cca_positions='none')
  _, _, p = make(config)
  assert not any('relative' in name or 'position' in name for name in p)
  batch, h, encoded = inputs(config, 3, 4, 2, True)
  got = run(config, batch, h, encoded)
  for b in range(len(h)):
    expected = reference.chunked_cross_attention(
        p, h[b].astype(np.float64), encoded[b].astype(np.float64), batch.mask[b],
        batch.segments[b], config.chunk_length, placeless=True)
    np.testing.assert_allclose(got[b], expected, rtol=1e-5, atol=1e-5)
  # The tokens of a neighbour may stand in any order.
  turned = dataclasses.replace(batch, mask=batch.mask[..., ::-1])
  np.testing.assert_allclose(run(config, turned, h, encoded[..., ::-1, :]), got, atol=1e-5)


def test_position_p_reads_chunk_floor_p_over_m():
  """By derivative: 63 identical, l - 1 full chunks, one last position, at the paper's n = 2048."""
  n, m = 2048, 64
  config = tiny_models.tiny(chunk_length=m, retrieved_length=1, num_heads=1, head_dim=2, d_model=2,
                            encoder_d_model=2)
  call, _, _ = make(config)
  rng = np.random.default_rng(0)
  h = rng.normal(size=(1, n, 2)).astype(np.float32)
  encoded = rng.normal(size=(1, n // m, 1, 1, 2)).astype(np.float32)
  masks = np.ones((1, n), np.int32), np.ones((1, n // m, 1, 1), bool)
  base = np.asarray(call(h, encoded, *masks))
  readers = []
  for u in range(n // m):
    changed = encoded.copy()
    changed[:, u] += 1
    moved = (np.asarray(call(h, changed, *masks)) != base).any(-1)[0]
    readers.append((np.flatnonzero(moved) + 1).tolist())  # positions from 1
  for u, positions in enumerate(readers, start=1):
    assert positions == [p for p in range(1, n + 1) if p // m == u]
  assert sum(map(len, readers)) == n - 63 and readers[-1] == [2048] and readers[0][0] == 64


@given(seed=st.integers(0, 10**6))
def test_positions_without_neighbours_are_exactly_identical(seed):
  """The first m - 1, padding, other documents, chunks whose neighbours are all missing."""
  config = tiny_models.TINY
  batch, h, encoded = inputs(config, seed, 4, 2, documents=True)
  out = run(config, batch, h, encoded)
  m = config.chunk_length
  for b in range(len(h)):
    for p in range(1, h.shape[1] + 1):
      u = p // m
      owner = batch.segments[b, (u - 1) * m] if u else 0
      reads = (u > 0 and owner != 0 and batch.segments[b, p - 1] == owner
               and batch.mask[b, u - 1].any())
      same = (out[b, p - 1] == h[b, p - 1]).all()
      assert same != reads, (b, p)


@given(seed=st.integers(0, 10**6))
def test_masked_content_has_no_influence(seed):
  config = tiny_models.TINY
  batch, h, encoded = inputs(config, seed, 4, 2, documents=True)
  changed = np.where(batch.mask[..., None], encoded, np.float32(1e3))
  np.testing.assert_array_equal(run(config, batch, h, encoded),
                                run(config, batch, h, changed))


def test_who_may_read_where_padding_stands_before_or_after_the_tokens():
  m, chunks, rng = 4, 3, np.random.default_rng(0)
  order = np.arange(m)
  shape = 2, 60, chunks, 1
  before, after = rng.integers(0, m + 1, shape) * (rng.random(shape) < 0.5)
  segments = np.where((before <= order) & (order < m - after), rng.integers(1, 3, before.shape), 0)
  owners, segments = segments.max(-1), segments.reshape(60, -1)
  neighbor_mask = rng.random((60, chunks, 2, 5)) < 0.7
  mask = np.asarray(cca_lib.attending_mask(segments, neighbor_mask, m))
  for b, u, i in np.ndindex(60, chunks, m):
    place = (u + 1) * m - 1 + i
    asks = segments[b, place] if place < chunks * m else 0
    expected = neighbor_mask[b, u] & (asks != 0 and asks == owners[b, u])
    np.testing.assert_array_equal(mask[b, u, i], expected)


def test_one_softmax_over_all_neighbours():
  """A neighbour given twice weighs as much as given once: weights sum to 1 over k r keys."""
  config = tiny_models.TINY
  batch, h, encoded = inputs(config, 0, 4, 1, documents=False)
  once = run(config, batch, h, encoded)
  batch.mask, encoded = np.repeat(batch.mask, 3, axis=2), np.repeat(encoded, 3, axis=2)
  np.testing.assert_allclose(run(config, batch, h, encoded), once, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter():
  config = tiny_models.TINY
  _, module, _ = make(config)
  batch, h, encoded = inputs(config, 0, 4, 2, documents=True)
  mask = cca_lib.attending_mask(batch.segments, batch.mask, config.chunk_length)
  structure, state = nnx.split(module)
  gradients = jax.jit(jax.grad(
      lambda state: (nnx.merge(structure, state)(h, encoded, mask) ** 2).sum()))(state)
  leaves = nnx.to_flat_state(gradients)
  assert len(leaves) == 8
  for path, leaf in leaves:
    value = np.asarray(leaf.get_value())
    assert np.isfinite(value).all() and (value != 0).any(), path
