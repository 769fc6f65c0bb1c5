"""Strided scoring: against one forward pass a token; independent of batch, mesh and order."""

import math

import jax
import numpy as np
import pytest

from retro_jax.data import windows
from retro_jax.data.records import Examples
from retro_jax.data.windows import Documents, Reading
from retro_jax.errors import UserError
from retro_jax.evaluation import bits_per_byte, token_scores
from retro_jax.models import retro
from retro_jax.models.config import RetroConfig
from retro_jax.training import partitioning, step
from tests import tiny_models, worlds

MODEL = RetroConfig(
    vocab_size=384, d_model=16, num_layers=2, num_heads=2, head_dim=8, chunk_length=8,
    cca_layers=(2,), encoder_d_model=16, encoder_layers=1, encoder_heads=2, encoder_head_dim=8)
N, M = 32, 8


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """Documents from a few tokens to many windows; records of 4 chunks, which cut them anywhere."""
  folder = tmp_path_factory.mktemp('token_scores')
  rows = worlds.documents(3, 12, longest=60)
  store, examples = worlds.examples(folder, rows, N)
  parameters = {name: jax.numpy.asarray(value)
                for name, value in tiny_models.parameters(MODEL, 1).items()}
  return rows, store, examples, token_scores.fingerprinted(MODEL, parameters)


def mesh_of(devices=1, **sizes):
  return partitioning.make_mesh(partitioning.MeshConfig(**{'data': -1, 'fsdp': 1, **sizes}),
                                jax.devices()[:devices])


def scored(world, reading=Reading(2), devices=1, batch_size=8, **settings):
  return token_scores.score(world[3], Documents(world[2]), reading, mesh_of(devices),
                            batch_size=batch_size, **settings)


def bits_of(scores):
  return np.concatenate(list(scores.shards))


@pytest.fixture(scope='module')
def one_at_a_time(world):
  """Bits of every token by a forward pass of its own, from the store and the records alone."""
  _, store, examples, model = world
  run = jax.jit(lambda t, s, r: jax.nn.log_softmax(
      retro.apply(MODEL, model.parameters, t, s, r), axis=-1))

  def bits(stride, retrieval):
    result = np.zeros((store.num_chunks, M))
    for ordinal in range(store.num_documents):
      info = store.document_info(ordinal)
      first, size = info['first_chunk'], info['num_chunks']
      chunks = np.arange(first, first + size)
      text = store.tokens(chunks).reshape(-1)
      for t in range(1, store.valid_length(chunks).sum()):
        # The first window holds positions 0..n-1 and predicts tokens 1..n; each further one
        # begins a stride later and predicts the tokens that the one before did not reach.
        window = max(0, -(-(t - N) // stride)) * stride
        context = np.zeros(N, np.int32)
        context[:t - window] = text[window:t]  # exactly what it may depend on
        neighbors = np.zeros((N // M, 2, 2 * M), np.int32)
        for u in range(N // M):
          chunk = first + window // M + u
          if chunk < first + size and (u + 1) * M <= t - window:  # only whole chunks retrieve
            row = examples.read([chunk // (N // M)])
            neighbors[u] = row['neighbor_tokens'][0, chunk % (N // M), :2]
        found = retro.Retrieval(neighbors[None], (neighbors != 0)[None]) if retrieval else None
        log_p = run(context[None], (context != 0)[None].astype(np.int32), found)
        result[first + t // M, t % M] = -float(log_p[0, t - window - 1, text[t]]) / math.log(2)
    return result

  return bits


@pytest.mark.parametrize('stride, retrieval', [(0, True), (24, True), (0, False)])
def test_equals_one_forward_pass_a_token(world, one_at_a_time, stride, retrieval):
  expected = one_at_a_time(stride or N // 2, retrieval)
  got = scored(world, Reading(2 if retrieval else 0), stride=stride)
  np.testing.assert_allclose(bits_of(got), expected, atol=1e-5, rtol=1e-5)
  rows, store = world[0], world[1]
  score = got.score()
  assert score.ordinals.tolist() == list(range(store.num_documents))
  total = sum(len(row.text.encode()) for row in rows)
  assert score.bits_per_byte == pytest.approx(expected.sum() / total, rel=1e-6)


def test_does_not_depend_on_batch_mesh_or_shards(world):
  one = bits_of(scored(world))
  for devices, batch_size, more in ((8, 16, {}), (4, 4, {'chunks_a_shard': 5}), (1, 1, {}),
                                    (1, 3, {'chunks_a_shard': 1})):
    np.testing.assert_allclose(bits_of(scored(world, devices=devices, batch_size=batch_size,
                                              **more)), one, atol=1e-5, rtol=1e-5)
  again = bits_of(scored(world))
  assert (again == one).all()


def test_every_token_but_the_first_is_scored_once(world):
  _, store, examples, _ = world
  documents = Documents(examples)
  for stride in (1, 2, 3, 4):
    seen = np.zeros((documents.num_chunks, M), int)
    for row in windows.rows(documents, 0, len(documents), stride):
      weights = windows.arrays(documents, [row], Reading(0), examples)['loss_weights']
      chunks = np.where(row.chunks < 0, 0, row.chunks)
      np.add.at(seen, chunks, weights.reshape(-1, M).astype(int))
    valid = store.valid_length(np.arange(store.num_chunks))
    ends = np.cumsum(np.diff(documents.starts)) - 1
    expected = (np.arange(M) < valid[:, None]).astype(int)
    expected[ends, valid[ends] - 1] = 0  # nothing follows a document's last token
    np.testing.assert_array_equal(seen, expected)
    assert documents.targets.sum() == expected.sum()


def test_windows_have_half_a_window_of_context(world):
  documents = Documents(world[2])
  half = N // M // 2
  for row in windows.rows(documents, 0, len(documents), half):
    for place in np.flatnonzero(row.scored):
      chunk = row.chunks[place]
      begin = documents.starts[documents.document[chunk]]
      before = min(half, chunk - begin)
      assert row.chunks[place - before:place + 1].tolist() == list(
          range(chunk - before, chunk + 1))


def test_stride_n_is_the_stored_sequences(world):
  """The same numbers as the cheap scoring of records that training uses."""
  from retro_jax.data import batches, tasks
  _, _, examples, model = world
  tasks.register_task('stored', examples.folder, 2)
  mesh = mesh_of()
  shardings = {name: partitioning.replicated(mesh) for name in model.parameters}
  expected = bits_per_byte.score(
      step.make_evaluation_step(MODEL, mesh, shardings, True), model.parameters,
      batches.evaluation_batches('stored', 8), step.batch_inputs(MODEL), mesh)
  got = scored(world, stride=N).score()
  np.testing.assert_allclose(got.bits, expected.bits, rtol=1e-6)
  assert (got.tokens == expected.tokens).all() and (got.text_bytes == expected.text_bytes).all()


def test_order_of_the_documents_does_not_matter(world, tmp_path):
  rows = world[0]
  _, examples = worlds.examples(tmp_path, rows[::-1], N)
  other = token_scores.score(world[3], Documents(examples), Reading(0), mesh_of(), batch_size=8)
  one = scored(world, Reading(0)).score()
  np.testing.assert_allclose(other.score().bits[::-1], one.bits, rtol=1e-5)


def test_finished_shards_are_kept_and_changes_noticed(world, tmp_path, monkeypatch, capsys):
  first = scored(world, folder=tmp_path, chunks_a_shard=10)
  shards = sorted(p.name for p in tmp_path.iterdir())
  assert len(shards) == len(first.shards) > 2 and shards[0] == 'shard-00000'
  (tmp_path / shards[1] / 'manifest.json').unlink()  # as if it had been killed in between
  made = []
  real = token_scores._score_shard
  monkeypatch.setattr(token_scores, '_score_shard',
                      lambda *a, **k: made.append(a[2:4]) or real(*a, **k))
  again = scored(world, folder=tmp_path, chunks_a_shard=10, batch_size=2)
  assert len(made) == 1
  np.testing.assert_allclose(bits_of(again), bits_of(first), rtol=1e-5, atol=1e-6)
  parameters = dict(world[3].parameters)
  name = sorted(parameters)[0]
  parameters[name] = parameters[name] * 1.5
  other = (*world[:3], token_scores.fingerprinted(MODEL, parameters))
  made.clear()
  capsys.readouterr()
  changed = scored(other, folder=tmp_path, chunks_a_shard=10)
  assert len(made) == len(shards) and 'stale: model changed' in capsys.readouterr().out
  assert not np.allclose(bits_of(changed), bits_of(first))
  made.clear()
  scored(other, Reading(1), folder=tmp_path, chunks_a_shard=10)
  assert 'stale: reading changed' in capsys.readouterr().out and len(made) == len(shards)


def test_only_the_first_documents(world):
  whole = Documents(world[2])
  part = Documents(world[2], max_examples=2)
  assert 0 < len(part) < len(whole)
  assert part.num_chunks == whole.starts[len(part)] >= 2 * N // M
  got = token_scores.score(world[3], part, Reading(2), mesh_of(), batch_size=8)
  np.testing.assert_allclose(bits_of(got), bits_of(scored(world))[:part.num_chunks], rtol=1e-5,
                             atol=1e-5)


def test_parts_of_neighbours_and_shuffling(world):
  off = bits_of(scored(world, Reading(0)))
  on, n_only, f_only, neither = (bits_of(scored(world, Reading(2, parts)))
                                 for parts in ('NF', 'N', 'F', ''))
  np.testing.assert_allclose(neither, off, rtol=1e-4, atol=1e-5)
  pairs = [(on, n_only), (on, f_only), (n_only, f_only), (on, off)]
  assert all(np.abs(a - b).max() > 1e-3 for a, b in pairs)
  shuffled = bits_of(scored(world, Reading(2, shuffled=True)))
  assert np.abs(shuffled - on).max() > 1e-3
  documents = Documents(world[2])
  chunks = np.arange(documents.num_chunks)
  source = documents.shuffled(chunks, 0)
  assert (documents.document[source] != documents.document).all()
  assert (source == documents.shuffled(chunks, 0)).all()
  assert (source != documents.shuffled(chunks, 1)).any()
  one = windows.arrays(documents, [windows.Row(chunks[:4], np.ones(4, bool))],
                       Reading(2, shuffled=True), world[2])['neighbor_tokens'][0]
  expected = [world[2].read([c // 4])['neighbor_tokens'][0, c % 4, :2] for c in source[:4]]
  np.testing.assert_array_equal(one, expected)


@pytest.mark.parametrize('stride', [4, 12, 40, -8])
def test_strides_that_do_not_fit_are_refused(world, stride):
  with pytest.raises(UserError, match='multiple of 8 up to 32'):
    scored(world, stride=stride)


def test_neighbours_of_other_texts_are_refused(world, tmp_path):
  _, other = worlds.examples(tmp_path, worlds.documents(9, 12, longest=60), N)
  with pytest.raises(UserError, match='same queries'):
    scored(world, neighbors=Examples(other.folder))
