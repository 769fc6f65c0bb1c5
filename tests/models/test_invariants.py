"""What may depend on what, bit by bit: causality, neighbours, masks, RETRO[OFF]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_jax.models import retro
from tests import reference, tiny_models

# CCA reads before, and reaches later positions through, self-attention; the last layer is LM.
CONFIG = tiny_models.tiny(num_layers=3, cca_layers=(1, 2))
M = CONFIG.chunk_length
seeds = st.integers(0, 10**6)


@functools.cache
def model(config=CONFIG):
  """Parameters, and jitted logits of (parameters, tokens, segments, retrieval)."""
  return tiny_models.parameters(config), jax.jit(functools.partial(retro.apply, config))


def logits(batch, retrieval=True):
  parameters, call = model()
  return np.asarray(call(parameters, batch.tokens, batch.segments,
                         batch.retrieval if retrieval else None))


def batch_of(seed, documents=True):
  rng = np.random.default_rng(seed)
  return rng, tiny_models.batch(CONFIG, rng, size=2, chunks=4, documents=documents)


def moved(before, after):
  """Which positions changed in any bit, bool [b, n]."""
  return (before != after).any(-1)


def other(rng, tokens):
  """Tokens that all differ from those given."""
  return (tokens - 1 + rng.integers(1, CONFIG.vocab_size - 1, tokens.shape)
          ) % (CONFIG.vocab_size - 1) + 1


@given(seed=seeds, t=st.integers(0, 15))
def test_later_tokens_move_no_earlier_logit(seed, t):
  rng, batch = batch_of(seed)
  changed = batch.copy()
  changed.tokens[:, t:] = other(rng, batch.tokens[:, t:])
  difference = moved(logits(batch), logits(changed))
  assert not difference[:, :t].any()
  assert difference[:, t].all()


@given(seed=seeds, u=st.integers(1, 4))
def test_neighbours_move_no_logit_before_the_end_of_their_chunk(seed, u):
  """Changing a neighbour of chunk u (from 1): positions u m .. are the first that may move."""
  rng, batch = batch_of(seed)
  changed = batch.copy()
  changed.neighbors[:, u - 1] = other(rng, batch.neighbors[:, u - 1])
  difference = moved(logits(batch), logits(changed))
  assert not difference[:, :u * M - 1].any()
  for b in range(2):
    read = batch.mask[b, u - 1].any() and batch.segments[b, u * M - 1] != 0
    assert difference[b, u * M - 1] == read


@given(seed=seeds)
def test_other_documents_have_no_influence(seed):
  """Neither their tokens nor their neighbours; nor may their absence be told."""
  rng, batch = batch_of(seed)
  before = logits(batch)
  for document in range(1, batch.segments.max() + 1):
    changed = batch.copy()
    foreign = batch.segments != document
    changed.tokens[foreign] = other(rng, batch.tokens[foreign])
    chunks = batch.segments[:, ::M] != document
    changed.neighbors[chunks] = other(rng, batch.neighbors[chunks])
    changed.mask[chunks] = ~batch.mask[chunks]
    assert not moved(before, logits(changed))[~foreign].any()


@given(seed=seeds)
def test_masked_tokens_and_padding_have_no_influence(seed):
  rng, batch = batch_of(seed)
  changed = batch.copy()
  changed.neighbors = np.where(batch.mask, batch.neighbors, other(rng, batch.neighbors))
  changed.tokens = np.where(batch.segments == 0, other(rng, batch.tokens), batch.tokens)
  assert not moved(logits(batch), logits(changed))[batch.segments != 0].any()


@given(seed=seeds, left=st.integers(0, M))
def test_padding_before_a_text_has_no_influence_and_hides_no_neighbour(seed, left):
  """A question padded on the left: chunk 1 is read from its last token on, however long it is."""
  rng, batch = batch_of(seed, documents=False)
  batch = tiny_models.pad_left(batch, [left, M - 1])
  before, real = logits(batch), batch.segments != 0
  changed = batch.copy()
  changed.tokens = np.where(real, batch.tokens, other(rng, batch.tokens))
  assert not moved(before, logits(changed))[real].any()
  changed = batch.copy()
  changed.neighbors[:, 0] = other(rng, batch.neighbors[:, 0])
  difference = moved(before, logits(changed))
  assert not difference[:, :M - 1].any()
  assert difference[:, M - 1:].all(1).tolist() == [left < M, True]


@given(seed=seeds)
def test_chunk_without_neighbours_gets_exactly_nothing(seed):
  """All neighbours masked is RETRO[OFF] in another program: equal but for its rounding."""
  _, batch = batch_of(seed)
  batch.mask[:] = False
  np.testing.assert_allclose(logits(batch), logits(batch, retrieval=False), rtol=1e-4, atol=1e-4)


@given(seed=seeds)
def test_order_of_neighbours_does_not_matter(seed):
  _, batch = batch_of(seed)
  changed = batch.copy()
  changed.neighbors, changed.mask = batch.neighbors[:, :, ::-1], batch.mask[:, :, ::-1]
  np.testing.assert_allclose(logits(changed), logits(batch), rtol=1e-4, atol=5e-5)


@given(seed=seeds)
def test_sequences_of_a_batch_are_apart(seed):
  rng, batch = batch_of(seed)
  changed = batch.copy()
  changed.tokens[1] = other(rng, batch.tokens[1])
  changed.neighbors[1] = other(rng, batch.neighbors[1])
  assert not moved(logits(batch), logits(changed))[0].any()


def test_gradients_follow_the_same_rules():
  """d hidden(t) / d vector of each token and each retrieved token is 0 exactly where it must be."""
  config = tiny_models.tiny(num_layers=2, cca_layers=(1,), encoder_layers=1, vocab_size=80)
  parameters = tiny_models.parameters(config)
  n, k, r = 16, 2, config.retrieved_length
  chunks = n // M
  # Every token its own id, so that rows of the two tables are tokens of the inputs.
  tokens = 1 + np.arange(n, dtype=np.int32)[None]
  neighbors = np.arange(chunks * k * r, dtype=np.int32).reshape(1, chunks, k, r)
  mask = np.ones(neighbors.shape, bool)
  mask[0, 0, 1], mask[0, 2, 0, 5:] = False, False
  segments = np.repeat([1, 1, 1, 2], M)[None].astype(np.int32)

  @jax.jit
  def derivatives(parameters, tokens, segments, retrieval):
    def outputs(tables):
      hidden = retro.build(config, parameters | tables).hidden(tokens, segments, retrieval)
      return hidden[0] @ jnp.arange(1.0, config.d_model + 1)
    return jax.jacrev(outputs)({name: parameters[name] for name in (
        'embedding.table', 'encoder_embedding.table')})

  jacobian = derivatives(parameters, tokens, segments, retro.Retrieval(neighbors, mask))
  by_token = np.asarray(jacobian['embedding.table'])[:, 1:n + 1]
  by_retrieved = np.asarray(jacobian['encoder_embedding.table'])[:, :neighbors.size]
  influences = (by_token != 0).any(-1)
  expected = np.array([[s <= t and segments[0, s] == segments[0, t] for s in range(n)]
                       for t in range(n)])
  np.testing.assert_array_equal(influences, expected)

  # One CCA in layer 1 of 2: a neighbour moves the positions that read it, and then, by the
  # self-attention of layer 2, all later ones of the document.
  influences = (by_retrieved != 0).any(-1).reshape(n, chunks, k, r)
  for t in range(n):
    for u in range(1, chunks + 1):
      may = t + 1 >= u * M and segments[0, t] == segments[0, u * M - 1]
      np.testing.assert_array_equal(influences[t, u - 1], mask[0, u - 1] & may, f'{t} {u}')


def regrouped(parameters, config):
  """The decoder of RETRO parameters as parameters of the baseline, layer by layer."""
  layers = reference.decoder_layers(parameters, config.num_layers, config.cca_layers)
  result = {name: parameters[name] for name in ('embedding.table', 'decoder.norm.scale')}
  for name in layers[0]:
    if not name.startswith('cca.'):
      result[f'decoder.prefix.{name}'] = np.stack([p[name] for p in layers]).astype(np.float32)
  return result


@pytest.mark.parametrize('layers, pattern, dtype', [
    (5, (2, 4), 'float32'), (3, (2,), 'bfloat16')])
def test_off_is_the_plain_decoder_bit_for_bit(layers, pattern, dtype):
  """The same operations in the same order, though scanned in other groups.

  XLA fuses across the layers it does not scan, and fused code rounds less often: FMA in
  float32, no rounding to bfloat16 in between. Without fusion every operation rounds by
  itself, and the two programs, compiled apart, agree in every bit.
  """
  config = tiny_models.tiny(num_layers=layers, cca_layers=pattern, dtype=dtype)
  parameters = tiny_models.parameters(config)
  batch = tiny_models.batch(config, np.random.default_rng(0))
  options = {'xla_disable_hlo_passes': 'fusion,cpu-instruction-fusion',
             'xla_allow_excess_precision': False}
  run = lambda config, parameters: np.asarray(jax.jit(
      functools.partial(retro.apply, config, retrieval=None), compiler_options=options)(
          parameters, tokens=batch.tokens, segments=batch.segments))
  np.testing.assert_array_equal(run(config, parameters),
                                run(config.baseline(), regrouped(parameters, config)))


def test_off_is_the_plain_decoder_to_rounding_as_compiled_by_default():
  parameters, call = model()
  _, batch = batch_of(0)
  baseline = jax.jit(functools.partial(retro.apply, CONFIG.baseline()))
  np.testing.assert_allclose(
      call(parameters, batch.tokens, batch.segments, None),
      baseline(regrouped(parameters, CONFIG), batch.tokens, batch.segments, None),
      rtol=1e-4, atol=1e-4)


def test_off_does_not_read_what_retrieval_added():
  """NaN in every parameter of CCA and encoder leaves no trace in OFF, and ruins ON."""
  parameters, call = model()
  _, batch = batch_of(1, documents=False)
  ruined = {name: np.full_like(value, np.nan) if '.cca.' in name or name.startswith('encoder')
            else value for name, value in parameters.items()}
  off = lambda p: np.asarray(call(p, batch.tokens, batch.segments, None))
  np.testing.assert_array_equal(off(ruined), off(parameters))
  on = np.asarray(call(ruined, batch.tokens, batch.segments, batch.retrieval))
  assert np.isnan(on[:, M - 1:]).any() and np.isfinite(off(ruined)).all()
