"""The whole model equals Algorithm 1 written as loops, for several patterns of layers."""

import jax
import numpy as np
import pytest

from retro_jax.models import retro
from tests import reference, tiny_models


def reference_logits(config, parameters, batch, retrieval=True):
  return np.stack([
      reference.retro(
          parameters, batch.tokens[b], batch.segments[b],
          (batch.neighbors[b], batch.mask[b]) if retrieval else None,
          m=config.chunk_length, num_layers=config.num_layers, cca_layers=config.cca_layers,
          encoder_cross_layers=config.encoder_cross_attention_layers)
      for b in range(len(batch.tokens))])


def logits(config, parameters, batch, retrieval=True):
  call = jax.jit(lambda p, tokens, segments, found: retro.apply(config, p, tokens, segments, found))
  return np.asarray(call(parameters, batch.tokens, batch.segments,
                         batch.retrieval if retrieval else None))


@pytest.mark.parametrize('changes', [
    dict(num_layers=7, cca_layers=(2, 4, 6)),
    dict(num_layers=9, cca_layers=(1, 3, 6, 9)),
    dict(num_layers=5, cca_layers=(1, 2, 3), encoder_cross_attention_layers=(1, 2)),
    dict(num_layers=3, cca_layers=(2,), chunk_length=3, retrieved_length=5),
    dict(num_layers=2, cca_layers=(2,), encoder_d_model=8, share_embeddings=True),
    dict(num_layers=3, cca_layers=()),
    dict(num_layers=5, cca_layers=(2, 4), positions='rotary', attention_block=3),
    dict(num_layers=8, cca_layers=(2, 4, 6), scan_layers=False),
    dict(num_layers=6, cca_layers=(2, 4, 6), attention_kernel='einsum', remat='full'),
], ids=lambda c: 'L{}-P{}-{}'.format(c['num_layers'], ','.join(map(str, c['cca_layers'])),
                                     c.get('positions', 'relative')))
def test_equals_algorithm_1(changes):
  config = tiny_models.tiny(**changes)
  parameters = tiny_models.parameters(config)
  batch = tiny_models.batch(config, np.random.default_rng(config.num_layers), size=2, chunks=4)
  np.testing.assert_allclose(
      logits(config, parameters, batch), reference_logits(config, parameters, batch),
      rtol=1e-5, atol=1e-5 * 5)


def test_a_text_that_begins_inside_its_chunk_equals_algorithm_1():
  """As questions do: padding stands before them (paper, C.4)."""
  config = tiny_models.tiny(num_layers=3, cca_layers=(1, 3))
  parameters = tiny_models.parameters(config)
  made = tiny_models.batch(config, np.random.default_rng(2), size=3, chunks=2, documents=False)
  batch = tiny_models.pad_left(made, [1, 3, 4])
  expected, got = reference_logits(config, parameters, batch), logits(config, parameters, batch)
  real = batch.segments != 0
  np.testing.assert_allclose(got[real], expected[real], rtol=1e-5, atol=5e-5)


def test_k_at_evaluation_may_differ_from_training():
  config = tiny_models.tiny(num_neighbors=2)
  parameters = tiny_models.parameters(config)
  batch = tiny_models.batch(config, np.random.default_rng(1), size=1, k=3)
  np.testing.assert_allclose(
      logits(config, parameters, batch), reference_logits(config, parameters, batch),
      rtol=1e-5, atol=5e-5)


def test_off_equals_algorithm_1_without_neighbours():
  config = tiny_models.tiny()
  parameters = tiny_models.parameters(config)
  batch = tiny_models.batch(config, np.random.default_rng(0), size=1)
  np.testing.assert_allclose(
      logits(config, parameters, batch, retrieval=False),
      reference_logits(config, parameters, batch, retrieval=False), rtol=1e-5, atol=5e-5)


def test_names_and_axes_of_parameters():
  config = tiny_models.tiny(num_layers=7, cca_layers=(2, 4, 6))
  axes = retro.parameter_axes(config)
  shapes = {name: value.shape for name, value in tiny_models.parameters(config).items()}
  assert set(axes) == set(shapes)
  assert all(len(axes[name]) == len(shapes[name]) for name in shapes)
  assert axes['decoder.periods.0.retro.cca.attention.key'] == (
      'layers', 'embed', 'heads', 'head_dim')
  assert axes['decoder.entry.feed_forward.wo'] == ('mlp', 'embed')
  assert not any(name.startswith('encoder') for name in retro.parameter_axes(config.baseline()))
  shared = tiny_models.tiny(encoder_d_model=8, share_embeddings=True)
  assert set(retro.parameter_axes(tiny_models.tiny())) - set(retro.parameter_axes(shared)) == {
      'encoder_embedding.table'}


def test_fresh_parameters_have_the_stated_spread():
  config = tiny_models.tiny(vocab_size=500, d_model=64, d_ff=256, num_layers=8, cca_layers=())
  fresh = jax.jit(lambda: retro.init_parameters(config, jax.random.key(0)))()
  std = lambda name: float(np.std(fresh[name]))
  assert std('embedding.table') == pytest.approx(64 ** -0.5, rel=0.05)
  assert std('decoder.prefix.feed_forward.wi') == pytest.approx(64 ** -0.5, rel=0.05)
  assert std('decoder.prefix.feed_forward.wo') == pytest.approx(256 ** -0.5 / 4, rel=0.05)
  for name, value in fresh.items():
    if name.endswith('.scale'):
      assert (np.asarray(value) == 1).all()
    elif name.endswith('_bias'):
      assert not np.asarray(value).any()
    else:
      assert np.std(value) > 0, name
  stacked = np.asarray(fresh['decoder.prefix.feed_forward.wi'])
  assert len(stacked) == 8 and not np.allclose(stacked[0], stacked[1])


def test_sizes_that_do_not_fit_are_refused():
  config = tiny_models.tiny()
  parameters = tiny_models.parameters(config)
  batch = tiny_models.batch(config, np.random.default_rng(0))
  call = lambda tokens, found: jax.eval_shape(
      lambda: retro.apply(config, parameters, tokens, np.ones_like(tokens), found))
  with pytest.raises(ValueError, match='15 is no multiple of the chunk length 4'):
    call(batch.tokens[:, :-1], None)
  with pytest.raises(ValueError, match='for 2 sequences of 3 chunks'):
    call(batch.tokens[:, :-4], batch.retrieval)
