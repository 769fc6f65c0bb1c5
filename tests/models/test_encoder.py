"""The neighbour encoder against loops, and what each neighbour may depend on."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.models import encoder as encoder_lib
from tests import reference, tiny_models


@functools.cache
def make(config):
  """The encoder, jitted, and its parameters."""
  module, p = tiny_models.randomized(
      lambda: encoder_lib.NeighborEncoder(config, rngs=nnx.Rngs(params=0)))
  return jax.jit(module), p


def inputs(config, seed, chunks=3, documents=True):
  rng = np.random.default_rng(seed)
  batch = tiny_models.batch(config, rng, chunks=chunks, documents=documents)
  h = rng.normal(size=(*batch.tokens.shape, config.d_model)).astype(np.float32)
  embedded = rng.normal(size=(*batch.mask.shape, config.encoder_d_model)).astype(np.float32)
  return batch, h, embedded


def run(config, batch, h, embedded):
  by_chunk = lambda x: x.reshape(len(x), -1, config.chunk_length, *x.shape[2:])
  encoder = make(config)[0]
  return np.asarray(encoder(embedded, batch.mask, by_chunk(h), by_chunk(batch.segments != 0)))


@pytest.mark.parametrize('m, r, layers, conditioned, documents', [
    (4, 8, 2, (1,), False), (4, 8, 2, (1,), True), (3, 5, 3, (2, 3), True), (4, 8, 1, (), False)])
def test_equals_loops(m, r, layers, conditioned, documents):
  config = tiny_models.tiny(chunk_length=m, retrieved_length=r, encoder_layers=layers,
                            encoder_cross_attention_layers=conditioned)
  _, p = make(config)
  batch, h, embedded = inputs(config, m * 10 + layers, documents=documents)
  got = run(config, batch, h, embedded)
  for b in range(len(h)):
    expected = reference.encode(p, embedded[b].astype(np.float64), batch.mask[b],
                                h[b].astype(np.float64), batch.segments[b], m, conditioned)
    np.testing.assert_allclose(got[b], expected, rtol=1e-5, atol=1e-5)


def test_neighbours_are_encoded_apart_and_see_their_own_chunk_only():
  config = tiny_models.TINY
  batch, h, embedded = inputs(config, 0, documents=False)
  base = run(config, batch, h, embedded)

  changed = embedded.copy()
  changed[:, 1, 0, 5] += 1
  moved = (run(config, batch, h, changed) != base).any(-1)
  expected = np.zeros_like(moved)
  expected[:, 1, 0] = True  # bidirectional: every token of this neighbour, and no other
  np.testing.assert_array_equal(moved, expected)

  changed = h.copy()
  changed[:, config.chunk_length * 2 - 1] += 1  # the last token of C_2
  moved = (run(config, batch, changed, embedded) != base).any(-1)
  expected = np.zeros_like(moved)
  expected[:, 1] = True
  np.testing.assert_array_equal(moved, expected)


def test_padding_has_no_influence():
  config = tiny_models.TINY
  for seed in range(5):
    batch, h, embedded = inputs(config, seed)
    base = run(config, batch, h, embedded)
    h = np.where(batch.segments[..., None] == 0, np.float32(7), h)
    embedded = np.where(batch.mask[..., None], embedded, np.float32(-7))
    np.testing.assert_array_equal(run(config, batch, h, embedded)[batch.mask],
                                  base[batch.mask])


def test_unconditioned_encoder_ignores_h():
  config = tiny_models.tiny(encoder_cross_attention_layers=())
  batch, h, embedded = inputs(config, 0)
  np.testing.assert_array_equal(run(config, batch, h, embedded),
                                run(config, batch, h + 1, embedded))
