"""Near-duplicate documents of two stores, against sets of n-grams of every pair."""

import numpy as np
import pytest

from retro_jax.data.corpus import Document
from retro_jax.data.vocabulary import train_vocabulary
from retro_jax.errors import UserError
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.database_build import DatabaseConfig, build_chunk_database
from retro_jax.retrieval.near_documents import (
  document_ngrams,
  documents_near,
  lsh_shape,
  near_document_pairs,
  signatures,
)
from tests import worlds

PAIRS = 100
WORDS = 200


def ngrams(text: str, n: int = 13) -> set[tuple[int, ...]]:
  tokens = worlds.vocabulary().encode(text)
  n = min(n, len(tokens))
  return {tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)} if n else set()


def store_of(folder, rows: list[Document]) -> ChunkDatabase:
  """A store without embeddings."""
  source = worlds.write_source(folder.with_suffix('.jsonl'), rows)
  config = DatabaseConfig(chunk_length=8, chunks_per_shard=400, shuffle_seed=None)
  return build_chunk_database(folder, source, worlds.vocabulary(), config)


def jaccard(a: set, b: set) -> float:
  common = len(a & b)
  return common / (len(a) + len(b) - common) if common else 0.0


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
  """Originals, and copies with 0 to 12 passages of a few words exchanged; both stores."""
  rng = np.random.default_rng(1)
  originals, copies = [], []
  for i in range(PAIRS):
    words = worlds.text(rng, WORDS).split(' ')
    originals.append(Document(f'original-{i}', ' '.join(words)))
    for _ in range(2 * (i % 7)):
      at = int(rng.integers(len(words) - 3))
      words[at:at + 2] = worlds.text(rng, 2).split(' ')
    copies.append(Document(f'copy-{i}', ' '.join(words)))
  short = [Document('one-token', 'a'), Document('few-tokens', 'the of a')]
  folder = tmp_path_factory.mktemp('near')
  # Sets of texts in the order of the stores.
  sides = originals + short, copies[::-1] + short[::-1]
  stores = [store_of(folder / name, rows) for name, rows in zip(('a', 'b'), sides)]
  sets = [[ngrams(document.text) for document in rows] for rows in sides]
  similarity = np.array([[jaccard(a, b) for b in sets[1]] for a in sets[0]])
  return stores, sides, similarity


@pytest.mark.parametrize('threshold', [0.6, 0.8, 1.0])
def test_finds_what_all_pairs_finds_and_nothing_else(planted, threshold):
  (queries, database), _, expected = planted
  pairs, similarity = near_document_pairs(queries, database, threshold)
  assert pairs.dtype == np.int64 and similarity.dtype == np.float64
  np.testing.assert_allclose(similarity, expected[pairs[:, 0], pairs[:, 1]], rtol=1e-12)
  assert (similarity >= threshold).all()
  assert [tuple(p) for p in pairs] == sorted({tuple(p) for p in pairs.tolist()})
  found = np.zeros(expected.shape, bool)
  found[pairs[:, 0], pairs[:, 1]] = True
  # The planted pairs are spread around every threshold; those just above it may be missed.
  alike = expected >= threshold
  assert alike.sum() > 15 and ((expected < threshold) & (expected > threshold - 0.2)).sum() > 15
  assert found[alike].mean() >= 0.97
  assert found[expected >= min(1, threshold + 0.1)].all()


def test_of_one_store_in_both_orders_and_never_with_itself(tmp_path):
  rng = np.random.default_rng(2)
  text = worlds.text(rng, 60)
  rows = worlds.documents(3, 6, longest=60) + [Document('x', text), Document('y', text)]
  store = store_of(tmp_path / 'db', rows)
  pairs, similarity = near_document_pairs(store, store)
  assert pairs.tolist() == [[6, 7], [7, 6]] and similarity.tolist() == [1, 1]
  again, _ = near_document_pairs(store, ChunkDatabase.open(store.folder))
  assert again.tolist() == pairs.tolist()
  assert documents_near(store, store) == ['x', 'y']


def test_deny_list_between_two_stores(planted):
  (queries, database), sides, expected = planted
  found = set(documents_near(queries, database, 0.7))
  close = expected.max(0)
  assert found <= {d.id for d, s in zip(sides[1], close) if s >= 0.7}
  assert found >= {d.id for d, s in zip(sides[1], close) if s >= 0.8}


def test_ngrams_are_those_of_the_text(planted):
  (queries, _), (rows, _), _ = planted
  for ordinal in (0, 7, PAIRS, PAIRS + 1):
    for n in (1, 4, 13):
      hashes = document_ngrams(queries, ordinal, n)
      assert len(hashes) == len(ngrams(rows[ordinal].text, n))
      assert (np.diff(hashes.astype(object)) > 0).all()
  # Two texts of different stores have the n-grams in common that they should.
  a, b = document_ngrams(planted[0][0], 4), document_ngrams(planted[0][1], PAIRS - 1 - 4)
  common = ngrams(rows[4].text) & ngrams(planted[1][1][PAIRS - 1 - 4].text)
  assert len(np.intersect1d(a, b)) == len(common) > 0


def test_signatures_are_a_function_of_the_range_and_estimate_the_similarity(planted):
  (queries, database), _, expected = planted
  ours, sizes = signatures(queries, 0, PAIRS, num_perm=256, seed=3)
  part, part_sizes = signatures(queries, 10, 20, num_perm=256, seed=3)
  np.testing.assert_array_equal(ours[10:20], part)
  np.testing.assert_array_equal(sizes[10:20], part_sizes)
  theirs, _ = signatures(database, 0, PAIRS, num_perm=256, seed=3)
  estimate = (ours[:, None] == theirs[None]).mean(-1)
  assert np.abs(estimate - expected[:PAIRS, :PAIRS]).max() < 0.16
  assert (signatures(queries, 10, 20, num_perm=256, seed=4)[0] != part).any()


@pytest.mark.parametrize('threshold', [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_propose_what_is_at_the_threshold(threshold):
  bands, width = lsh_shape(threshold, 128)
  assert 1 < bands and bands * width <= 128
  assert 1 - (1 - threshold ** width) ** bands > 0.97


def test_documents_without_text_are_like_nothing(tmp_path):
  rows = [Document('a', ''), Document('b', ''), Document('c', 'self'), Document('d', 'self')]
  store = store_of(tmp_path / 'db', rows)
  assert len(document_ngrams(store, 0)) == 0
  assert near_document_pairs(store, store, 0.01)[0].tolist() == [[2, 3], [3, 2]]


def test_other_vocabularies_and_bad_arguments_are_refused(planted, tmp_path):
  (queries, _), _, _ = planted
  rng = np.random.default_rng(0)
  other = train_vocabulary((worlds.text(rng, 100) for _ in range(50)), tmp_path / 'v.model', 350)
  source = worlds.write_source(tmp_path / 's.jsonl', worlds.documents(0, 2))
  stranger = build_chunk_database(tmp_path / 'db', source, other, DatabaseConfig(8), None)
  with pytest.raises(UserError, match='different vocabularies'):
    near_document_pairs(queries, stranger)
  for bad in ({'threshold': 0}, {'threshold': 1.1}, {'ngram': 0}, {'num_perm': 8}):
    with pytest.raises(UserError, match='near documents'):
      near_document_pairs(queries, queries, **bad)
