"""Chunk stores against the documents they were made from."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.data.corpus import Document
from retro_jax.errors import UserError
from retro_jax.retrieval.database import ChunkDatabase, build_chunk_database
from tests import worlds

FEW = settings(max_examples=12, deadline=None)


@pytest.fixture(scope='module')
def rows():
  return worlds.documents(1, 17) + [Document('empty', ''), Document('one', 'x')]


@pytest.fixture(scope='module')
def store(tmp_path_factory, rows):
  return worlds.store(tmp_path_factory.mktemp('store') / 'db', rows)


def chunks_of(row, m):
  """Slow reference: the padded chunks of one document."""
  pieces = worlds.vocabulary().encode(row.text)
  if not pieces:
    return []
  tokens = [1] + pieces + [2]
  return [(tokens[i:i + m] + [0] * m)[:m] for i in range(0, len(tokens), m)]


def test_columns_are_the_documents_in_order(store, rows):
  expected = [(i, c) for i, row in enumerate(rows) for c in chunks_of(row, 8)]
  ids = np.arange(store.num_chunks)
  assert store.num_chunks == len(expected) > 100
  assert store.tokens(ids).tolist() == [c for _, c in expected]
  assert store.document(ids).tolist() == [i for i, _ in expected]
  assert store.valid_length(ids).tolist() == [sum(t != 0 for t in c) for _, c in expected]
  assert store.tokens(ids).dtype == np.int32
  sizes = np.bincount(store.document(ids), store.text_bytes(ids), len(rows))
  assert sizes.tolist() == [len(row.text.encode()) for row in rows]


def test_any_shape_of_ids_over_all_shards(store):
  ids = np.random.default_rng(0).integers(0, store.num_chunks, (3, 4, 5))
  one_by_one = [store.tokens(int(i)).tolist() for i in ids.ravel()]
  assert store.tokens(ids).reshape(-1, 8).tolist() == one_by_one
  assert len(store.manifest['counts']['chunks_by_shard']) == 4
  with pytest.raises(IndexError):
    store.tokens([store.num_chunks])
  with pytest.raises(IndexError):
    store.tokens([-1])


def test_embeddings_are_those_of_the_decoded_chunks(store):
  ids = np.arange(store.num_chunks)
  texts = [worlds.vocabulary().decode(row.tolist()) for row in store.tokens(ids)]
  expected = worlds.embedder().embed(texts)
  np.testing.assert_allclose(store.embedding(ids), expected, atol=2e-3)
  blocks = list(store.embedding_blocks(7))
  assert [first for first, _ in blocks] == sorted(first for first, _ in blocks)
  np.testing.assert_array_equal(np.concatenate([b for _, b in blocks]), store.embedding(ids))


def test_document_table(store, rows):
  for ordinal, row in enumerate(rows):
    info = store.document_info(ordinal)
    assert (info['id'], info['title']) == (row.id, row.title)
    assert info['bytes'] == len(row.text.encode())
    assert info['num_chunks'] == len(chunks_of(row, 8))
    assert store.document_starts[ordinal] == info['first_chunk']
    assert store.ordinal_of(row.id) == ordinal
  assert store.ordinal_of('nobody') is None
  with pytest.raises(IndexError):
    store.document_info(len(rows))


@FEW
@given(seed=st.integers(0, 10**6), count=st.integers(1, 9), m=st.integers(2, 9))
def test_continuation_stays_inside_its_document(tmp_path_factory, seed, count, m):
  rows = worlds.documents(seed, count, longest=30)
  store = worlds.store(tmp_path_factory.mktemp('c') / 'db', rows, m, documents_per_shard=2)
  chunks = [(i, c) for i, row in enumerate(rows) for c in chunks_of(row, m)]
  ids = np.arange(-1, store.num_chunks)
  tokens, lengths = store.with_continuation(ids)
  assert not tokens[0].any() and lengths[0] == 0
  for i, (document, chunk) in enumerate(chunks):
    following = [0] * m
    if i + 1 < len(chunks) and chunks[i + 1][0] == document:
      following = chunks[i + 1][1]
    assert tokens[i + 1].tolist() == chunk + following
    assert lengths[i + 1] == np.count_nonzero(tokens[i + 1])


def test_shuffle_permutes_documents_and_loses_none(tmp_path, rows):
  plain = worlds.store(tmp_path / 'plain', rows)
  shuffled = worlds.store(tmp_path / 'shuffled', rows, shuffle_seed=3)
  again = worlds.store(tmp_path / 'again', rows, shuffle_seed=3)
  other = worlds.store(tmp_path / 'other', rows, shuffle_seed=4)
  assert sorted(shuffled.document_ids) == sorted(plain.document_ids)
  assert shuffled.document_ids != plain.document_ids
  assert other.document_ids != shuffled.document_ids
  assert again.fingerprint == shuffled.fingerprint != other.fingerprint
  for ordinal, name in enumerate(shuffled.document_ids):
    theirs = plain.ordinal_of(name)
    chunks = np.flatnonzero(shuffled.document(np.arange(shuffled.num_chunks)) == ordinal)
    mine = shuffled.tokens(chunks)
    assert mine.tolist() == chunks_of(rows[theirs], 8)
  assert not list((tmp_path / 'shuffled').rglob('spool'))


def test_skipped_when_current_rebuilt_when_changed(tmp_path, rows):
  class Counting(type(worlds.embedder())):
    calls = 0

    def embed(self, texts, on_progress=None):
      Counting.calls += 1
      return super().embed(texts, on_progress)

  def build(documents, **changes):
    source = worlds.write_source(tmp_path / 'in.jsonl', documents)
    return build_chunk_database(
        tmp_path / 'db', source, worlds.vocabulary(), 8, Counting(16), **changes)

  first = build(rows)
  calls = Counting.calls
  assert build(rows).fingerprint == first.fingerprint and Counting.calls == calls
  changed = build(rows[:-1] + [Document('one', 'y')])
  assert Counting.calls > calls and changed.fingerprint != first.fingerprint
  assert changed.embedding_fingerprint != first.embedding_fingerprint
  calls = Counting.calls
  build(rows[:-1] + [Document('one', 'y')], documents_per_shard=2)
  assert Counting.calls > calls


def test_killed_build_leaves_the_old_store_and_no_rest(tmp_path, rows):
  before = worlds.store(tmp_path / 'db', rows).fingerprint

  class Broken(type(worlds.embedder())):

    def embed(self, texts, on_progress=None):
      raise KeyboardInterrupt

  source = worlds.write_source(tmp_path / 'in.jsonl', rows[:3])
  with pytest.raises(KeyboardInterrupt):
    build_chunk_database(tmp_path / 'db', source, worlds.vocabulary(), 8, Broken(16))
  assert ChunkDatabase.open(tmp_path / 'db').fingerprint == before
  assert sorted(p.name for p in tmp_path.iterdir()) == ['db', 'db.jsonl', 'in.jsonl']


def test_bad_input_is_one_line(tmp_path, rows):
  twice = worlds.write_source(tmp_path / 'twice.jsonl', [rows[0], rows[0]])
  for shuffle_seed in (None, 0):
    with pytest.raises(UserError, match="'doc-0' comes twice") as error:
      build_chunk_database(tmp_path / 'db', twice, worlds.vocabulary(), 8, None,
                           shuffle_seed=shuffle_seed)
    assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='chunk_length is 0'):
    build_chunk_database(tmp_path / 'db', twice, worlds.vocabulary(), 0, None)
  with pytest.raises(UserError, match='no chunk-database there'):
    ChunkDatabase.open(tmp_path / 'db')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['twice.jsonl']


def test_store_without_embeddings_says_so(tmp_path, rows):
  source = worlds.write_source(tmp_path / 'in.jsonl', rows)
  store = build_chunk_database(tmp_path / 'db', source, worlds.vocabulary(), 8, None)
  assert store.embedding_dimension == 0
  with pytest.raises(UserError, match='without embeddings'):
    store.embedding([0])


def test_changed_file_is_noticed(tmp_path, rows):
  worlds.store(tmp_path / 'db', rows)
  path = tmp_path / 'db' / 'shard-00001' / 'tokens.npy'
  path.write_bytes(path.read_bytes()[:-2])
  with pytest.raises(UserError, match='tokens.npy'):
    ChunkDatabase.open(tmp_path / 'db')
  manifest = json.loads((tmp_path / 'db' / 'manifest.json').read_text())
  assert manifest['vocabulary']['fingerprint'] == worlds.vocabulary().fingerprint
