"""Chunk stores against the documents they were made from."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.data.corpus import Document, JsonLines
from retro_jax.errors import UserError
from retro_jax.retrieval import pipeline, stages
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.database_build import DatabaseConfig, build_chunk_database
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
  assert len(store.shards) > 3 and sum(s.chunks for s in store.shards) == store.num_chunks
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
  store = worlds.store(tmp_path_factory.mktemp('c') / 'db', rows, m, chunks_per_shard=4)
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
  assert again.embedding_fingerprint == shuffled.embedding_fingerprint
  assert again.embedding_fingerprint != other.embedding_fingerprint
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
        tmp_path / 'db', source, worlds.vocabulary(), DatabaseConfig(8, **changes), Counting(16))

  first = build(rows)
  calls = Counting.calls
  assert build(rows).fingerprint == first.fingerprint and Counting.calls == calls
  changed = build(rows[:-1] + [Document('one', 'y')])
  assert Counting.calls > calls and changed.fingerprint != first.fingerprint
  assert changed.embedding_fingerprint != first.embedding_fingerprint
  calls = Counting.calls
  build(rows[:-1] + [Document('one', 'y')], chunks_per_shard=20)
  assert Counting.calls > calls


def test_killed_build_is_no_store_and_goes_on(tmp_path, rows):
  before = worlds.store(tmp_path / 'db', rows).fingerprint

  class Broken(type(worlds.embedder())):

    def embed(self, texts, on_progress=None):
      raise KeyboardInterrupt

  source = worlds.write_source(tmp_path / 'in.jsonl', rows[:3])
  config = DatabaseConfig(8, 40, None)
  with pytest.raises(KeyboardInterrupt):
    build_chunk_database(tmp_path / 'db', source, worlds.vocabulary(), config, Broken(16))
  # Half of it is another store by now: nobody may read it.
  with pytest.raises(UserError, match='no chunk-database there'):
    ChunkDatabase.open(tmp_path / 'db')
  assert not [p for p in (tmp_path / 'db').rglob('.*')]
  after = build_chunk_database(
      tmp_path / 'db', source, worlds.vocabulary(), config, worlds.embedder())
  fresh = build_chunk_database(
      tmp_path / 'fresh', source, worlds.vocabulary(), config, worlds.embedder())
  assert after.fingerprint == fresh.fingerprint != before
  assert worlds.content(tmp_path / 'db') == worlds.content(tmp_path / 'fresh')


def test_an_id_that_comes_twice_is_named_with_both_places(tmp_path, rows):
  (tmp_path / 'more').mkdir()
  worlds.write_source(tmp_path / 'more' / 'a.jsonl', rows[:4])
  worlds.write_source(tmp_path / 'more' / 'b.jsonl', rows[3:6])
  source = JsonLines(str(tmp_path / 'more' / '*.jsonl'))
  for shuffle_seed in (None, 0):
    with pytest.raises(UserError, match="'doc-3' comes twice, at .*a.jsonl:4 and .*b.jsonl:1"
                       ) as error:
      build_chunk_database(tmp_path / 'db', source, worlds.vocabulary(),
                           DatabaseConfig(8, shuffle_seed=shuffle_seed))
    assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='no chunk-database there'):
    ChunkDatabase.open(tmp_path / 'db')


def test_impossible_settings_are_refused():
  with pytest.raises(UserError, match='chunk_length is 0'):
    DatabaseConfig(0)


def test_store_without_embeddings_says_so(tmp_path, rows):
  source = worlds.write_source(tmp_path / 'in.jsonl', rows)
  store = build_chunk_database(tmp_path / 'db', source, worlds.vocabulary(), DatabaseConfig(8))
  assert store.embedding_dimension == 0
  with pytest.raises(UserError, match='without embeddings'):
    store.embedding([0])


def test_an_input_that_changed_is_the_only_one_done_again(tmp_path, rows, capsys):
  folder = tmp_path / 'in'
  folder.mkdir()
  for i in range(4):
    worlds.write_source(folder / f'{i}.jsonl', rows[4 * i:4 * i + 4])
  source = JsonLines(str(folder / '*.jsonl'))

  def build():
    return worlds.content(build_chunk_database(
        tmp_path / 'db', source, worlds.vocabulary(), DatabaseConfig(8, 10),
        worlds.embedder()).folder)

  def changed(before, after):
    return {Path(name).parts[1] for name in before.keys() | after.keys()
            if before.get(name) != after.get(name) and Path(name).parts[0] == 'chunks'}

  first = build()
  stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / 'db').rglob('*') if p.is_file()}
  assert build() == first
  assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
  worlds.write_source(folder / '2.jsonl', [*rows[8:11], Document('other', 'another text')])
  second = build()
  assert len(changed(first, second)) == 1 and '2.jsonl' in changed(first, second).pop()
  untouched = [p for p in stamps if p.exists() and p.stat().st_mtime_ns == stamps[p]]
  assert sum('chunks' in p.parts or 'embeddings' in p.parts for p in untouched) > 20
  (folder / '1.jsonl').unlink()
  third = build()
  assert len(changed(second, third)) == 1 and not any('1.jsonl' in name for name in third)
  assert 'which no input stands for any more' in capsys.readouterr().out


def test_two_workers_and_one_leave_the_same_bytes(tmp_path, rows):
  source = worlds.write_source(tmp_path / 'in.jsonl', rows)
  for name, runner in (('here', stages.LocalRunner(0)), ('two', stages.LocalRunner(2))):
    build_chunk_database(tmp_path / name, source, worlds.vocabulary(), DatabaseConfig(8, 30),
                         worlds.embedder(), runner)
  assert worlds.content(tmp_path / 'here') == worlds.content(tmp_path / 'two')


def test_a_file_cut_short_is_noticed_when_read(tmp_path, rows):
  worlds.store(tmp_path / 'db', rows)
  path = next((tmp_path / 'db' / 'chunks').glob('*/00001/tokens.npy'))
  path.write_bytes(path.read_bytes()[:-2])
  store = ChunkDatabase.open(tmp_path / 'db')
  with pytest.raises(UserError, match='tokens.npy: missing or damaged'):
    store.tokens(np.arange(store.num_chunks))


def test_a_manifest_that_was_changed_is_noticed(tmp_path, rows):
  worlds.store(tmp_path / 'db', rows)
  path = tmp_path / 'db' / 'manifest.json'
  manifest = json.loads(path.read_text())
  assert manifest['vocabulary']['fingerprint'] == worlds.vocabulary().fingerprint
  path.write_text(path.read_text().replace('"documents": 19', '"documents": 18'))
  with pytest.raises(UserError, match='its checksum is wrong'):
    ChunkDatabase.open(tmp_path / 'db')


def test_a_store_in_a_bucket_is_the_same_store(tmp_path, rows, monkeypatch):
  monkeypatch.setenv('RETRO_JAX_CACHE', str(tmp_path / 'cache'))
  local = worlds.store(tmp_path / 'db', rows)
  source = JsonLines(str(tmp_path / 'db.jsonl'))
  config = DatabaseConfig(8, 40, None)
  remote = build_chunk_database(
      'ram://bucket/db', source, worlds.vocabulary(), config, worlds.embedder())
  assert remote.fingerprint == local.fingerprint
  assert worlds.content(remote.folder) == worlds.content(local.folder)
  index = pipeline.build_index('ram://bucket/index', remote)
  settings_ = pipeline.ExamplesConfig(32, 3, margin=2, examples_per_shard=4)
  there = pipeline.build_examples('ram://bucket/x', remote, remote, index.location, settings_)
  pipeline.build_index(tmp_path / 'index', local)
  here = pipeline.build_examples(tmp_path / 'x', local, local, tmp_path / 'index', settings_)
  for name, value in here.read(range(len(here))).items():
    np.testing.assert_array_equal(there.read(range(len(there)))[name], value)
