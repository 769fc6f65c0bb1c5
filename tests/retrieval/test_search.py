"""Neighbours of sequences against a brute-force loop over every pair of chunks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.errors import UserError
from retro_jax.retrieval.index import IndexConfig
from retro_jax.retrieval.policies import Policy, PolicyConfig, in_fraction
from retro_jax.retrieval.search import (
  check_same_space,
  neighbors_of_sequences,
  random_neighbors,
  sequence_chunk_ids,
)
from retro_jax.retrieval.sharded_index import build_index
from tests import worlds

FEW = settings(max_examples=12, deadline=None)


def exact_index(store, vectors_per_part=10**6):
  """Exact, in one part or more; beside the store."""
  return build_index(f'{store.folder}-exact-{vectors_per_part}', store,
                     IndexConfig(kind='exact', vectors_per_part=vectors_per_part))


def allowed_chunks(queries, database, sequence, denied=()):
  """Chunks of the database whose document id is in no chunk of the sequence: by a loop."""
  names = {queries.document_ids[queries.document(c)] for c in sequence if c >= 0} | set(denied)
  return [c for c in range(database.num_chunks)
          if database.document_ids[database.document(c)] not in names]


def slow_neighbors(queries, database, sequences, k, denied=()):
  ids = np.full(sequences.shape + (k,), -1)
  distances = np.full(sequences.shape + (k,), np.inf)
  for s, sequence in enumerate(sequences):
    allowed = allowed_chunks(queries, database, sequence, denied)
    for c, chunk in enumerate(sequence):
      if chunk < 0:
        continue
      query = queries.embedding(chunk).astype(np.float64)
      found = sorted((np.float32(np.sum((database.embedding(a) - query) ** 2)), a)
                     for a in allowed)[:k]
      for i, (distance, a) in enumerate(found):
        ids[s, c, i], distances[s, c, i] = a, distance
  return ids, distances


@FEW
@given(seed=st.integers(0, 10**6), count=st.integers(1, 8), extra=st.integers(0, 5),
       l=st.integers(1, 5), k=st.integers(1, 6), margin=st.integers(0, 4),
       deny=st.booleans(), same=st.booleans(), part=st.sampled_from([1, 7, 10**6]))
def test_store_and_search_equal_brute_force(
    tmp_path_factory, seed, count, extra, l, k, margin, deny, same, part):
  folder = tmp_path_factory.mktemp('s')
  rows = worlds.documents(seed, count, longest=25)
  others = worlds.documents(seed + 1, extra, longest=25, prefix='new')
  database = worlds.store(folder / 'database', rows, chunks_per_shard=3, shuffle_seed=seed)
  queries = database if same else worlds.store(folder / 'queries', rows[:1] + others)
  denied = ('doc-0',) if deny else ()
  policy = Policy(PolicyConfig(denied), queries, database)
  sequences = sequence_chunk_ids(queries.num_chunks, l)
  found = neighbors_of_sequences(
      queries, database, exact_index(database, part), policy, sequences, k, margin)
  ids, distances = slow_neighbors(queries, database, sequences, k, denied)
  np.testing.assert_array_equal(found.ids, ids)
  np.testing.assert_allclose(found.distances, distances, rtol=1e-4, atol=1e-6)
  assert found.ids.dtype == np.int64 and found.distances.dtype == np.float32
  assert policy.drops['empty_places'] == (ids[sequences >= 0] < 0).sum()


@FEW
@given(seed=st.integers(0, 10**6), l=st.integers(1, 6), kind=st.sampled_from(['near', 'random']))
def test_no_neighbour_from_any_document_of_the_sequence(tmp_path_factory, seed, l, kind):
  folder = tmp_path_factory.mktemp('s')
  database = worlds.store(folder / 'database', worlds.documents(seed, 9, longest=25))
  policy = Policy(PolicyConfig(), database, database)
  sequences = sequence_chunk_ids(database.num_chunks, l)
  if kind == 'near':
    found = neighbors_of_sequences(
        database, database, exact_index(database), policy, sequences, 4, 2)
  else:
    found = random_neighbors(database, database, policy, sequences, 4)
  for sequence, ids in zip(sequences, found.ids):
    own = {int(database.document(c)) for c in sequence if c >= 0}
    retrieved = ids[ids >= 0]
    assert own.isdisjoint(database.document(retrieved).tolist())
    # Nor does the continuation reach into one.
    tokens, _ = database.with_continuation(retrieved)
    for chunk, row in zip(retrieved, tokens[:, 8:]):
      if row.any():
        assert database.document(chunk + 1) == database.document(chunk)


@pytest.mark.parametrize('kind', ['exact', 'scann'])
def test_neighbours_from_a_tenth_of_the_database_are_exact_in_it(tmp_path, kind):
  database = worlds.store(tmp_path / 'db', worlds.documents(1, 150, longest=20))
  queries = worlds.store(tmp_path / 'queries', worlds.documents(2, 4, longest=20, prefix='new'))
  index = exact_index(database) if kind == 'exact' else build_index(
      tmp_path / 'i', database, IndexConfig(kind='scann', leaves=8, recall_sample=10))
  policy = Policy(PolicyConfig(database_fraction=0.1), queries, database)
  sequences = sequence_chunk_ids(queries.num_chunks, 2)
  found = neighbors_of_sequences(queries, database, index, policy, sequences, 5, 2)
  inside = {d for d in range(database.num_documents) if in_fraction(np.array(d), 0.1)}
  assert 5 < len(inside) < 30
  assert inside >= set(database.document(found.ids[found.ids >= 0]).tolist())
  outside = [database.document_ids[d] for d in range(database.num_documents) if d not in inside]
  ids, _ = slow_neighbors(queries, database, sequences, 5, outside)
  np.testing.assert_array_equal(found.ids, ids)
  control = random_neighbors(queries, database, policy, sequences, 5)
  assert inside >= set(database.document(control.ids[control.ids >= 0]).tolist())


def test_sequences_cover_every_chunk_once():
  ids = sequence_chunk_ids(11, 4)
  assert ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, -1]]


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  """One document has most chunks, so that a first search mostly finds forbidden ones."""
  folder = tmp_path_factory.mktemp('large')
  rows = worlds.documents(2, 12, longest=30)
  big = worlds.documents(3, 1, longest=3)[0]
  big = type(big)('big', worlds.text(np.random.default_rng(3), 6000))
  return worlds.store(folder / 'db', [big] + rows, chunks_per_shard=600)


def test_scann_widens_until_every_allowed_chunk_was_seen(large, tmp_path):
  index = build_index(tmp_path / 'i', large, IndexConfig(
      kind='scann', leaves=40, leaves_to_search=2, reorder=20, recall_sample=10))
  policy = Policy(PolicyConfig(), large, large)
  sequences = sequence_chunk_ids(large.num_chunks, 16)[:6]
  found = neighbors_of_sequences(large, large, index, policy, sequences, 6, 2)
  assert policy.drops['searched_wider'] > policy.drops['searched_exactly'] > 0
  assert (found.ids >= 0).all()
  exactly = neighbors_of_sequences(
      large, large, exact_index(large), Policy(PolicyConfig(), large, large), sequences, 6, 2)
  expected, _ = slow_neighbors(large, large, sequences[:1], 6)
  np.testing.assert_array_equal(exactly.ids[:1], expected)


def test_random_neighbours_depend_on_seed_and_chunk_alone(large):
  def run(sequences, seed=0):
    return random_neighbors(
        large, large, Policy(PolicyConfig(), large, large), sequences, 5, seed)

  sequences = sequence_chunk_ids(large.num_chunks, 4)
  everything = run(sequences)
  part = run(sequences[7:9])
  np.testing.assert_array_equal(everything.ids[7:9], part.ids)
  np.testing.assert_array_equal(everything.distances[7:9], part.distances)
  assert (run(sequences, 1).ids != everything.ids).mean() > 0.5
  assert (np.diff(part.distances, axis=-1) >= 0).all()
  chunk = int(part.ids[0, 0, 0])
  expected = np.sum((large.embedding(chunk) - large.embedding(int(sequences[7, 0]))) ** 2)
  np.testing.assert_allclose(part.distances[0, 0, 0], expected, rtol=1e-5)


def test_random_neighbours_are_spread_evenly_and_distinct(large):
  sequences = sequence_chunk_ids(large.num_chunks, 1)[-60:]
  found = random_neighbors(
      large, large, Policy(PolicyConfig(), large, large), sequences, 40)
  assert all(len(set(row.tolist())) == 40 for row in found.ids[:, 0])
  thirds = np.histogram(found.ids, 3, (0, large.num_chunks))[0] / found.ids.size
  assert (abs(thirds - 1 / 3) < 0.05).all()


def test_random_neighbours_take_all_there_are(tmp_path):
  store = worlds.store(tmp_path / 'db', worlds.documents(4, 3, longest=12))
  sequences = sequence_chunk_ids(store.num_chunks, 2)
  found = random_neighbors(store, store, Policy(PolicyConfig(), store, store), sequences, 50)
  for sequence, ids in zip(sequences, found.ids):
    allowed = allowed_chunks(store, store, sequence)
    for c, chunk in enumerate(sequence):
      assert sorted(ids[c][ids[c] >= 0].tolist()) == ([] if chunk < 0 else allowed)


def test_stores_that_do_not_fit_are_named(tmp_path):
  rows = worlds.documents(1, 3)
  a, b, c = (worlds.store(tmp_path / 'a', rows), worlds.store(tmp_path / 'b', rows, chunk_length=9),
             worlds.store(tmp_path / 'c', rows, dimension=8))
  check_same_space(a, a)
  for other, what in ((b, 'chunk length'), (c, 'embedder')):
    with pytest.raises(UserError, match=what) as error:
      check_same_space(a, other)
    assert str(a.folder) in str(error.value) and str(other.folder) in str(error.value)
