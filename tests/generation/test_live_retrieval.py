"""Live neighbours equal those of the offline pipeline; parts of different worlds are refused."""

import numpy as np
import pytest

from retro_jax.data.vocabulary import train_vocabulary
from retro_jax.errors import UserError
from retro_jax.generation.live_retrieval import LiveRetriever
from retro_jax.retrieval import pipeline
from retro_jax.retrieval.embedders import RandomEmbedder
from retro_jax.retrieval.policies import PolicyConfig
from tests import worlds


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  folder = tmp_path_factory.mktemp('world')
  database = worlds.store(folder / 'db', worlds.documents(0, 12))
  return folder, database, pipeline.build_index(folder / 'index', database)


def test_neighbors_are_those_found_offline(world):
  folder, database, index = world
  queries = worlds.store(folder / 'queries', worlds.documents(7, 5, prefix='query'))
  offline = pipeline.build_examples(
      folder / 'examples', queries, database, folder / 'index', pipeline.ExamplesConfig(
          32, 3, policy=PolicyConfig(exclude_query_documents=False)))
  retriever = LiveRetriever(database, index, worlds.embedder(), worlds.vocabulary(), 3)
  read = offline.read(np.arange(len(offline)))
  checked = 0
  for row in range(len(offline)):
    for place, chunk in enumerate(read['chunk_ids'][row]):
      if chunk >= 0:
        found = retriever.neighbors(queries.tokens(chunk))
        assert found.ids.tolist() == read['neighbor_ids'][row, place].tolist()
        np.testing.assert_array_equal(found.tokens, read['neighbor_tokens'][row, place])
        np.testing.assert_allclose(
            found.distances, read['neighbor_distances'][row, place], rtol=1e-5)
        assert found.lengths.tolist() == (found.tokens != 0).sum(-1).tolist()
        checked += 1
  assert checked == queries.num_chunks


def test_a_chunk_of_the_database_finds_itself_at_distance_zero(world):
  _, database, index = world
  retriever = LiveRetriever(database, index, worlds.embedder(), worlds.vocabulary(), 2)
  whole = np.flatnonzero(database.valid_length(np.arange(database.num_chunks)) == 8)[3]
  found = retriever.neighbors(database.tokens(whole))
  assert found.distances[0] == 0
  np.testing.assert_array_equal(database.embedding(found.ids[0]), database.embedding(whole))


def test_what_does_not_belong_together_is_refused_by_name(world, tmp_path):
  folder, database, index = world
  other = train_vocabulary(['some other text about other things ' * 30], tmp_path / 'o.model', 320)
  smaller = worlds.store(tmp_path / 'small', worlds.documents(1, 3))
  cases = (
      (database, worlds.embedder(), other, 2, (database.vocabulary_fingerprint, other.fingerprint)),
      (database, RandomEmbedder(16), worlds.vocabulary(), 2,
       (database.embedder_fingerprint, RandomEmbedder(16).fingerprint)),
      (smaller, worlds.embedder(), worlds.vocabulary(), 2,
       ('index holds', str(smaller.num_chunks))),
      (database, worlds.embedder(), worlds.vocabulary(), 0, ('num_neighbors',)))
  for store, embedder, vocabulary, k, words in cases:
    with pytest.raises(UserError) as caught:
      LiveRetriever(store, index, embedder, vocabulary, k)
    assert all(word in str(caught.value) for word in words) and '\n' not in str(caught.value)
  retriever = LiveRetriever(database, index, worlds.embedder(), worlds.vocabulary(), 2)
  with pytest.raises(UserError, match='chunks of 8 tokens'):
    retriever.neighbors(np.arange(4, 9))
