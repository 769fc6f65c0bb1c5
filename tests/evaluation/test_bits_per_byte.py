"""Bits-per-byte: against one forward pass a sequence, and independent of batch and mesh."""

import math

import jax
import numpy as np
import pytest

from retro_jax.data import batches, tasks
from retro_jax.evaluation import bits_per_byte
from retro_jax.evaluation.bits_per_byte import Score, gain_interval
from retro_jax.models import retro
from retro_jax.models.config import RetroConfig
from retro_jax.training import partitioning, step
from tests import worlds

MODEL = RetroConfig(
    vocab_size=384, d_model=16, num_layers=2, num_heads=2, head_dim=8, chunk_length=8,
    cca_layers=(2,), encoder_d_model=16, encoder_layers=1, encoder_heads=2, encoder_head_dim=8)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  folder = tmp_path_factory.mktemp('bits')
  rows = worlds.documents(3, 14)
  store, examples = worlds.examples(folder, rows)
  tasks.register_task('bits', folder / 'examples', 2)
  parameters = jax.jit(lambda k: retro.init_parameters(MODEL, k))(jax.random.key(0))
  return rows, store, examples, parameters


def score(parameters, retrieval, batch_size=8, devices=1):
  mesh = partitioning.make_mesh(partitioning.MeshConfig(data=-1, fsdp=1), jax.devices()[:devices])
  shardings = {name: partitioning.replicated(mesh) for name in parameters}
  return bits_per_byte.score(
      step.make_evaluation_step(MODEL, mesh, shardings, retrieval), parameters,
      batches.evaluation_batches('bits', batch_size), step.batch_inputs(MODEL), mesh)


def slow_bits(store, examples, parameters, retrieval):
  """Bits by document, one sequence at a time, straight from the logits."""
  bits = dict.fromkeys(range(store.num_documents), 0.0)
  run = jax.jit(lambda t, s, r: jax.nn.log_softmax(retro.apply(MODEL, parameters, t, s, r)))
  for i in range(len(examples)):
    row = {name: value[0] for name, value in examples.read([i]).items()}
    tokens, documents = row['tokens'].astype(np.int32), np.repeat(row['documents'], 8)
    neighbors = row['neighbor_tokens'][:, :2].astype(np.int32)
    found = retro.Retrieval(neighbors[None], (neighbors != 0)[None]) if retrieval else None
    log_p = np.asarray(run(tokens[None], np.where(tokens != 0, documents + 1, 0)[None], found))[0]
    following = np.append(tokens, row['next_token'])
    for p, token in enumerate(tokens):
      same = p + 1 == len(tokens) or documents[p] == documents[p + 1]
      if token and following[p + 1] and same:
        bits[int(documents[p])] -= float(log_p[p, following[p + 1]]) / math.log(2)
  return bits


@pytest.mark.parametrize('retrieval', [False, True])
def test_equals_one_sequence_at_a_time(world, retrieval):
  rows, store, examples, parameters = world
  expected = slow_bits(store, examples, parameters, retrieval)
  got = score(parameters, retrieval)
  assert got.ordinals.tolist() == sorted(expected)
  np.testing.assert_allclose(got.bits, [expected[o] for o in got.ordinals], rtol=1e-5)
  total = sum(len(row.text.encode()) for row in rows)
  assert got.text_bytes.sum() == total
  np.testing.assert_allclose(got.bits_per_byte, sum(expected.values()) / total, rtol=1e-5)


def test_does_not_depend_on_batch_size_or_mesh(world):
  parameters = world[3]
  one = score(parameters, True)
  for batch_size, devices in ((1, 1), (16, 8), (8, 4)):
    other = score(parameters, True, batch_size, devices)
    np.testing.assert_allclose(other.bits, one.bits, rtol=1e-5)
    assert (other.tokens == one.tokens).all() and (other.text_bytes == one.text_bytes).all()


def test_every_token_but_bos_is_scored_once(world):
  _, store, _, parameters = world
  got = score(parameters, False)
  for ordinal, tokens in zip(got.ordinals, got.tokens):
    info = store.document_info(int(ordinal))
    ids = np.arange(info['first_chunk'], info['first_chunk'] + info['num_chunks'])
    assert tokens == store.valid_length(ids).sum() - 1


def test_intervals_cover_the_mean_and_see_a_paired_difference():
  rng = np.random.default_rng(0)
  text_bytes = rng.integers(100, 1000, 60).astype(float)
  bits = text_bytes * rng.normal(2, 0.3, 60)
  worse = Score(np.arange(60), bits, text_bytes, text_bytes)
  better = Score(np.arange(60), bits * 0.97, text_bytes, text_bytes)
  low, high = worse.interval()
  assert low < worse.bits_per_byte < high and high - low > 0.02
  low, high = gain_interval(better, worse)
  assert low == pytest.approx(0.03) and high == pytest.approx(0.03)
  part = worse.of([3, 7])
  assert part.bits_per_byte == pytest.approx((bits[3] + bits[7]) / (text_bytes[3] + text_bytes[7]))
