"""Decoding against full forward passes of the model, with real retrieval from a real store."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.data.vocabulary import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from retro_jax.errors import UserError
from retro_jax.generation import decode, written
from retro_jax.generation.live_retrieval import LiveRetriever
from retro_jax.models import decoding, retro
from retro_jax.models.config import RetroConfig
from retro_jax.retrieval import pipeline
from tests import worlds

M, K = 8, 2
PROMPT = 'def return self\n    import class True the of a model layer'
# One window for all tests, so that few shapes are compiled: it just holds PROMPT and NEW tokens.
NEW = 20
WINDOW = -(-(1 + len(worlds.vocabulary().encode(PROMPT)) + NEW) // M) * M
_apply = jax.jit(retro.apply, static_argnums=0)


def make_config(**changes) -> RetroConfig:
  defaults = dict(vocab_size=worlds.vocabulary().size + 8, d_model=16, num_layers=2, num_heads=2,
                  head_dim=8, chunk_length=M, num_neighbors=K, cca_layers=(2,),
                  encoder_d_model=16, encoder_layers=1, encoder_heads=2, encoder_head_dim=8)
  return RetroConfig(**(defaults | changes))


def random_parameters(config: RetroConfig) -> dict[str, jax.Array]:
  """Large enough that every input shows in every logit; no initialiser to compile."""
  rng = np.random.default_rng(3)
  shapes = jax.eval_shape(lambda: retro.init_parameters(config, jax.random.key(0)))
  return {name: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32)
          for name, leaf in shapes.items()}


@pytest.fixture(scope='module')
def retriever(tmp_path_factory) -> LiveRetriever:
  folder = tmp_path_factory.mktemp('world')
  database = worlds.store(folder / 'db', worlds.documents(0, 12))
  index = pipeline.build_index(folder / 'index', database)
  return LiveRetriever(database, index, worlds.embedder(), worlds.vocabulary(), K)


@pytest.fixture(scope='module')
def model() -> tuple[RetroConfig, dict]:
  config = make_config()
  return config, random_parameters(config)


def full_logits(model, tokens, retriever) -> np.ndarray:
  """Logits of every position by one teacher-forced pass, neighbours found chunk by chunk."""
  config, parameters = model
  length = WINDOW
  padded = np.zeros((1, length), np.int32)
  padded[0, :len(tokens)] = tokens
  retrieval = None
  if retriever is not None:
    found = np.zeros((1, length // M, K, 2 * M), np.int32)
    for u in range(len(tokens) // M):  # the last, incomplete chunk asks for nothing
      text = worlds.vocabulary().decode(tokens[u * M:(u + 1) * M])
      vector = worlds.embedder().embed([text])[0]
      database = retriever.database
      distances = np.sum((database.embedding(np.arange(database.num_chunks)) - vector) ** 2, -1)
      for place, chunk in enumerate(np.argsort(distances, kind='stable')[:K]):
        found[0, u, place, :M] = database.tokens(chunk)
        following = min(chunk + 1, database.num_chunks - 1)
        if following > chunk and database.document(chunk) == database.document(following):
          found[0, u, place, M:] = database.tokens(following)
    retrieval = retro.Retrieval(jnp.asarray(found), jnp.asarray(found != 0))
  logits = _apply(config, parameters, jnp.asarray(padded), jnp.asarray(padded != 0, jnp.int32),
                  retrieval)
  return np.array(logits)[0, :len(tokens)]


def test_retrieval_off_is_the_argmax_of_the_full_model_step_by_step(model):
  config, parameters = model
  made = decode.generate(config, parameters, worlds.vocabulary(), None, PROMPT, NEW, temperature=0)
  tokens = [BOS_ID] + worlds.vocabulary().encode(PROMPT)
  for token in made.tokens:
    logits = full_logits(model, tokens, None)[-1]
    logits[[PAD_ID, BOS_ID, UNK_ID]] = -np.inf
    assert token == np.argmax(logits[:worlds.vocabulary().size])
    tokens.append(token)
  assert made.ended or len(made.tokens) == NEW
  assert made.text == worlds.vocabulary().decode(made.tokens)
  assert all(not chunk.neighbors for chunk in made.chunks)


def test_every_position_reads_the_neighbors_of_the_chunk_before_it(model, retriever):
  config, parameters = model
  tokens = [BOS_ID] + worlds.vocabulary().encode(PROMPT * 2)
  tokens = tokens[:3 * M + 3]
  context = decode.Context(config, parameters, retriever, WINDOW)
  stepwise = [context.logits()]
  for token in tokens[1:]:
    context.append(token)
    stepwise.append(context.logits())
  expected = full_logits(model, tokens, retriever)
  np.testing.assert_allclose(np.stack(stepwise), expected, atol=1e-4)
  # The comparison sees a difference if there is one.
  assert np.abs(expected - full_logits(model, tokens, None))[M - 1:].max() > 1e-2
  assert sorted(context.retrieved) == [0, 1, 2]


def test_greedy_generation_with_retrieval_is_the_argmax_of_the_full_pass(model, retriever):
  config, parameters = model
  made = decode.generate(
      config, parameters, worlds.vocabulary(), retriever, PROMPT, NEW, temperature=0)
  tokens = [BOS_ID] + worlds.vocabulary().encode(PROMPT) + list(made.tokens)
  logits = full_logits(model, tokens, retriever)[:, :worlds.vocabulary().size]
  logits[:, [PAD_ID, BOS_ID, UNK_ID]] = -np.inf
  start = len(tokens) - len(made.tokens)
  assert np.argmax(logits[start - 1:-1], -1).tolist() == list(made.tokens)


def test_chunks_tell_what_was_read(model, retriever):
  config, parameters = model
  made = decode.generate(
      config, parameters, worlds.vocabulary(), retriever, PROMPT, NEW, temperature=0)
  tokens = [BOS_ID] + worlds.vocabulary().encode(PROMPT) + list(made.tokens)
  assert [t for chunk in made.chunks for t in chunk.tokens] == tokens
  assert b''.join(worlds.vocabulary().decode_bytes(chunk.tokens) for chunk in made.chunks) == (
      PROMPT.encode() + worlds.vocabulary().decode_bytes(made.tokens))
  database = retriever.database
  for chunk in made.chunks[:-1]:
    assert len(chunk.tokens) == M and len(chunk.neighbors) == K
    for neighbor in chunk.neighbors:
      ordinal = int(database.document(neighbor.chunk_id))
      assert neighbor.document_id == database.document_ids[ordinal]
      assert neighbor.title == neighbor.document_id.replace('doc-', 'Title ')
      tokens_of = database.tokens(neighbor.chunk_id)
      assert neighbor.text == worlds.vocabulary().decode(tokens_of.tolist())
    assert chunk.neighbors[0].distance <= chunk.neighbors[1].distance
  assert made.chunks[-1].neighbors == ()  # nobody came after it to read them


def test_a_long_context_drops_whole_chunks_from_the_left(model, retriever):
  config, parameters = model
  tokens = [BOS_ID] + worlds.vocabulary().encode(PROMPT * 4)
  assert len(tokens) > WINDOW + 2 * M + 1
  context = decode.Context(config, parameters, retriever, WINDOW)
  for count, token in enumerate(tokens[1:], start=2):
    context.append(token)
    if count >= WINDOW and count % M <= 1:
      start = max(0, -(-(count - WINDOW) // M)) * M
      # As a training sequence that begins at `start`: nothing from before it is read.
      expected = full_logits(model, tokens[start:count], retriever)[-1]
      np.testing.assert_allclose(context.logits(), expected, atol=1e-4)


def test_one_compilation_for_all_tokens(model, retriever):
  config, parameters = model
  decode.generate(config, parameters, worlds.vocabulary(), retriever, PROMPT, NEW, seed=1)
  programs = decoding.advance, decoding.extend
  before = [program._cache_size() for program in programs]
  decode.generate(
      config, parameters, worlds.vocabulary(), retriever, PROMPT + ' x', NEW - 3, seed=2)
  assert [program._cache_size() for program in programs] == before and min(before) >= 1


def test_same_seed_same_text_and_another_seed_another(model, retriever):
  config, parameters = model
  texts = [decode.generate(config, parameters, worlds.vocabulary(), retriever, PROMPT, NEW,
                           temperature=1.5, seed=seed).text for seed in (5, 5, 6)]
  assert texts[0] == texts[1] != texts[2]


def test_stops_at_eos_and_leaves_it_out(model):
  config, parameters = model
  # An eos whose embedding is that of the best token, only longer, wins the first choice.
  context = decode.Context(config, parameters, None, M)
  name = 'embedding.table'
  best = int(np.argmax(context.logits()))
  table = np.array(parameters[name])
  table[EOS_ID] = 3 * table[best]
  made = decode.generate(config, parameters | {name: jnp.asarray(table)}, worlds.vocabulary(), None,
                         '', NEW, temperature=0)
  assert made.ended and made.tokens == () and made.text == ''
  assert [chunk.tokens for chunk in made.chunks] == [(BOS_ID,)]


def test_ids_that_are_no_text_are_never_written(model):
  config, parameters = model
  made = decode.generate(
      config, parameters, worlds.vocabulary(), None, PROMPT, NEW, temperature=50., seed=2)
  assert all(t < worlds.vocabulary().size and t not in (PAD_ID, BOS_ID, UNK_ID, EOS_ID)
             for t in made.tokens)


@pytest.mark.parametrize('name, value', [
    ('max_new_tokens', 0), ('temperature', -1.0), ('top_k', -1), ('top_p', 0.0), ('top_p', 1.5),
    ('seed', -1), ('sequence_length', M + 1)])
def test_bad_settings_are_one_line(model, name, value):
  config, parameters = model
  with pytest.raises(UserError, match=name):
    decode.generate(config, parameters, worlds.vocabulary(), None, PROMPT, **{name: value})


def test_parts_that_do_not_fit_are_refused(model, retriever):
  config, parameters = model
  for changed, words in (
      (make_config(chunk_length=4), 'chunks of 8 tokens, but the model works with 4'),
      (make_config(retrieved_length=24), 'reads 24 tokens'),
      (config.baseline(), 'baseline'),
      (make_config(vocab_size=worlds.vocabulary().size - 1), 'vocabulary')):
    with pytest.raises(UserError, match=words):
      decode.generate(changed, parameters, worlds.vocabulary(), retriever, PROMPT)


def test_missing_neighbors_are_masked_not_read(model, retriever):
  """With more neighbours asked for than there are, the empty places change nothing."""
  config, parameters = model
  index = retriever._index

  class TwoAtMost:
    size, method, database = index.size, index.method, index.database

    def search(self, queries, k, effort=1):
      ids, distances = index.search(queries, 2)
      spare = ((0, 0), (0, k - 2))
      return (np.pad(ids, spare, constant_values=-1),
              np.pad(distances, spare, constant_values=np.inf))

  wider = LiveRetriever(retriever.database, TwoAtMost(), worlds.embedder(), worlds.vocabulary(), 5)
  made = [decode.Context(config, parameters, r, WINDOW) for r in (retriever, wider)]
  for context in made:
    for token in worlds.vocabulary().encode(PROMPT)[:M + 2]:
      context.append(token)
  np.testing.assert_allclose(made[0].logits(), made[1].logits(), atol=1e-5)
  assert len(written.describe_neighbors(made[1].retrieved[0], wider, worlds.vocabulary())) == 2
  assert dataclasses.asdict(made[1].retrieved[0])['lengths'].tolist()[2:] == [0, 0, 0]
