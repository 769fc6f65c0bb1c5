"""Model FLOPs: against XLA's count of the forward pass, and against sums done by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from retro_jax.models import attention_kernels, flops, retro
from retro_jax.models.config import RetroConfig

# Two layers in a row never repeat, so no scan hides a layer from XLA's count.
SMALL = RetroConfig(
    vocab_size=512, d_model=128, num_layers=2, num_heads=4, head_dim=32, chunk_length=16,
    cca_layers=(1, 2), encoder_d_model=64, encoder_layers=2, encoder_heads=2, encoder_head_dim=32,
    attention_kernel='einsum')

PAPER_7B = RetroConfig(
    vocab_size=128_000, d_model=4096, num_layers=32, num_heads=32, head_dim=128, chunk_length=64,
    cca_layers=(6, 9, 12, 15, 18, 21, 24, 27, 30), encoder_d_model=896, encoder_layers=2,
    encoder_heads=16, encoder_head_dim=64)


@pytest.fixture
def plain(monkeypatch):
  """What accelerators run: on CPUs, fewer logits are computed that skewing drops."""
  monkeypatch.setattr(attention_kernels, '_TOGETHER', 0)  # a block of all rows


def counted_by_xla(config, b, n):
  m, k, r = config.chunk_length, config.num_neighbors, config.retrieved_length
  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
  neighbors = retro.Retrieval(array((b, n // m, k, r), jnp.int32),
                              array((b, n // m, k, r), jnp.bool_))
  parameters = jax.eval_shape(lambda: retro.init_parameters(config, jax.random.key(0)))
  forward = jax.jit(lambda *arguments: retro.apply(config, *arguments))
  lowered = forward.lower(parameters, array((b, n), jnp.int32), array((b, n), jnp.int32),
                          neighbors if config.has_retrieval else None)
  return lowered.cost_analysis()['flops']


@pytest.mark.parametrize('config', [
    SMALL, dataclasses.replace(SMALL, encoder_cross_attention_layers=(1, 2)),
    dataclasses.replace(SMALL, num_layers=1, cca_layers=())])
@pytest.mark.usefixtures('plain')
def test_agrees_with_xla_on_a_forward_pass(config):
  ours = flops.forward_flops(config, 2, 256, as_computed=True).total
  # XLA also counts softmax, norms and GELU, elementwise: a few percent at this width.
  assert 0.92 < ours / counted_by_xla(config, 2, 256) <= 1.0


@pytest.mark.usefixtures('plain')
def test_every_part_is_seen_by_xla():
  without = dataclasses.replace(SMALL, cca_layers=(1,))
  ours = [flops.forward_flops(c, 2, 256, as_computed=True).total for c in (SMALL, without)]
  xla = [counted_by_xla(c, 2, 256) for c in (SMALL, without)]
  assert ours[0] - ours[1] == pytest.approx(xla[0] - xla[1], rel=0.1)


def test_7b_by_hand():
  b, n, d = 1, 2048, 4096
  parts = flops.forward_flops(PAPER_7B, b, n)
  # 32 layers: four d x d projections a token; content, position and value products of the
  # causal half; R once for the batch.
  assert parts.attention == pytest.approx(
      32 * (2 * n * 4 * d * d + 3 * 2 * (n * n / 2) * d + 2 * n * d * d))
  assert parts.ffw == pytest.approx(32 * 2 * n * 2 * d * 4 * d)
  assert parts.read == pytest.approx(2 * n * d * 128_000)
  # 9 layers: Q and O of 2,048 tokens, K and V of 32 x 2 x 128 retrieved ones.
  neighbors = 32 * 2 * 128
  assert parts.cca == pytest.approx(9 * (
      2 * n * 2 * d * d + 2 * neighbors * 2 * 896 * d
      + 2 * 2 * n * 256 * d + 2 * n * 128 * d + 2 * (64 + 128 - 1) * d * d))
  assert parts.encoder == pytest.approx(
      2 * (2 * neighbors * 4 * 896 * 1024 + 3 * 2 * neighbors * 128 * 1024
           + 2 * 255 * 896 * 1024 + 2 * neighbors * 2 * 896 * 4 * 896)
      + (2 * neighbors * 2 * 896 * 1024 + 2 * n * 2 * d * 1024 + 3 * 2 * neighbors * 64 * 1024
         + 2 * 191 * 896 * 1024))


def test_training_is_three_forward_passes_and_grows_with_the_batch():
  one, eight = (flops.training_flops(PAPER_7B, b, 2048) for b in (1, 8))
  assert one == pytest.approx(3 * flops.forward_flops(PAPER_7B, 1, 2048).total)
  assert 7 < eight / one < 8  # the projection of the distances is shared by the batch
