"""The stages end to end: what the records hold, and when a stage runs again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.data.vocabulary import train_vocabulary
from retro_jax.errors import UserError
from retro_jax.retrieval import neighbor_build, pipeline
from retro_jax.retrieval.index import IndexConfig
from retro_jax.retrieval.pipeline import DatabaseConfig, ExamplesConfig
from retro_jax.retrieval.policies import PolicyConfig
from tests import worlds

FEW = settings(max_examples=8, deadline=None)
SMALL = ExamplesConfig(sequence_length=32, num_neighbors=3, margin=2, examples_per_shard=4)


def run(folder, rows, config=SMALL, m=8, shuffle_seed=0):
  source = worlds.write_source(folder / 'in.jsonl', rows)
  store = pipeline.build_database(folder / 'db', source, worlds.vocabulary(), worlds.embedder(),
                                  DatabaseConfig(m, 40, shuffle_seed))
  pipeline.build_index(folder / 'index', store)
  return store, pipeline.build_examples(folder / 'examples', store, store, folder / 'index', config)


@FEW
@given(seed=st.integers(0, 10**6), l=st.integers(1, 5))
def test_records_hold_the_store_and_its_neighbours(tmp_path_factory, seed, l):
  folder = tmp_path_factory.mktemp('p')
  config = ExamplesConfig(sequence_length=8 * l, num_neighbors=2, margin=1, examples_per_shard=3)
  store, examples = run(folder, worlds.documents(seed, 6, longest=30), config)
  assert len(examples) == -(-store.num_chunks // l)
  read = examples.read(range(len(examples)))
  chunks = read['chunk_ids'].ravel()
  assert chunks[:store.num_chunks].tolist() == list(range(store.num_chunks))
  assert (chunks[store.num_chunks:] == -1).all()
  for s in range(len(examples)):
    for c in range(l):
      chunk = int(read['chunk_ids'][s, c])
      tokens = read['tokens'][s, 8 * c:8 * c + 8]
      if chunk < 0:
        assert not tokens.any() and read['documents'][s, c] == -1 and not read['text_bytes'][s, c]
        assert (read['neighbor_ids'][s, c] == -1).all()
        continue
      assert tokens.tolist() == store.tokens(chunk).tolist()
      assert read['documents'][s, c] == store.document(chunk)
      assert read['text_bytes'][s, c] == store.text_bytes(chunk)
      for j, neighbor in enumerate(read['neighbor_ids'][s, c]):
        expected = store.with_continuation(neighbor)[0]
        assert read['neighbor_tokens'][s, c, j].tolist() == expected.tolist()
    last = int(read['chunk_ids'][s, -1])
    following = 0
    if 0 <= last < store.num_chunks - 1 and store.document(last) == store.document(last + 1):
      following = store.tokens(last + 1)[0]
    assert read['next_token'][s, 0] == following


@pytest.fixture
def rows():
  return worlds.documents(3, 9, longest=40)


def test_second_run_skips_everything(tmp_path, rows, capsys):
  run(tmp_path, rows)
  first = capsys.readouterr().out
  stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.is_file()}
  run(tmp_path, rows)
  second = capsys.readouterr().out.splitlines()
  assert 'skipped' not in first
  assert len(second) == 3 and all('current, skipped' in line for line in second)
  del stamps[tmp_path / 'in.jsonl']
  assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_changed_inputs_rebuild_all_that_depends_on_them(tmp_path, rows, capsys):
  _, before = run(tmp_path, rows)
  capsys.readouterr()
  _, after = run(tmp_path, rows[:-1])
  out = capsys.readouterr().out
  assert 'skipped' not in out
  assert before.manifest['database'] != after.manifest['database']
  _, other = run(tmp_path, rows[:-1], ExamplesConfig(**{**vars(SMALL), 'num_neighbors': 2}))
  out = capsys.readouterr().out
  assert out.count('current, skipped') == 2 and other.shape.num_neighbors == 2


def test_random_neighbours_of_a_changed_database_are_drawn_anew(tmp_path, rows):
  queries = worlds.store(tmp_path / 'queries', rows[:2])
  config = ExamplesConfig(**{**vars(SMALL), 'kind': 'random'})
  for part in (rows, rows[3:]):
    database = worlds.store(tmp_path / 'db', part)
    examples = pipeline.build_examples(tmp_path / 'x', queries, database, None, config)
    assert examples.manifest['database']['fingerprint'] == database.fingerprint
    read = examples.read(range(len(examples)))
    there = read['neighbor_ids'] >= 0
    np.testing.assert_array_equal(
        read['neighbor_tokens'][there], database.with_continuation(read['neighbor_ids'][there])[0])


def test_vocabulary_is_trained_skipped_retrained_or_only_loaded(tmp_path, rows, capsys):
  source = worlds.write_source(tmp_path / 'in.jsonl', rows)
  said = []

  def build(size):
    vocabulary = pipeline.build_vocabulary(tmp_path / 'v.model', source, size)
    said.append(capsys.readouterr().out.split(': ')[1].split()[0].strip(',;'))
    return vocabulary.fingerprint

  first = build(384)
  assert build(384) == build(0) == first
  worlds.write_source(tmp_path / 'in.jsonl', rows[1:])
  other = build(380)
  assert other != first
  (tmp_path / 'v.model.inputs').unlink()
  assert build(384) == other
  assert said == ['trained', 'current', 'loaded', 'trained', 'loaded']


def test_changed_deny_file_rebuilds(tmp_path, rows):
  deny = tmp_path / 'deny.txt'
  deny.write_text('')
  config = ExamplesConfig(**{**vars(SMALL), 'policy': PolicyConfig(deny_file=str(deny))})
  store, before = run(tmp_path, rows, config)
  ids = before.read(range(len(before)))['neighbor_ids']
  assert store.ordinal_of('doc-1') in store.document(ids[ids >= 0])
  deny.write_text('doc-1\n')
  _, after = run(tmp_path, rows, config)
  ids = after.read(range(len(after)))['neighbor_ids']
  assert store.ordinal_of('doc-1') not in store.document(ids[ids >= 0])
  assert after.manifest['policy']['denied_documents'] == 1


def test_two_builds_are_byte_identical(tmp_path, rows):
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    worlds.write_source(tmp_path / 'in.jsonl', rows)
    run(tmp_path / name, rows)
  for stage in ('db', 'index'):
    assert worlds.content(tmp_path / 'a' / stage) == worlds.content(tmp_path / 'b' / stage)
  # Records say where their stores lie; all else is equal.
  a, b = (worlds.content(tmp_path / name / 'examples') for name in 'ab')
  assert a.keys() == b.keys()
  assert [name for name in a if a[name] != b[name]] == ['manifest.json']


def test_a_store_that_changed_under_its_index_is_noticed(tmp_path, rows):
  run(tmp_path, rows)
  other = worlds.store(tmp_path / 'other', rows[2:])
  with pytest.raises(UserError, match='indexes content .* build the index again'):
    pipeline.build_examples(tmp_path / 'new', other, other, tmp_path / 'index', SMALL)
  assert not (tmp_path / 'new').exists()


def test_vocabularies_that_differ_are_named(tmp_path, rows):
  store, _ = run(tmp_path, rows)
  other = train_vocabulary([row.text for row in rows], tmp_path / 'v.model', 350)
  queries = pipeline.build_database(
      tmp_path / 'q', worlds.write_source(tmp_path / 'q.jsonl', rows), other, worlds.embedder(),
      DatabaseConfig(8))
  with pytest.raises(UserError, match='vocabulary') as error:
    pipeline.build_examples(tmp_path / 'new', queries, store, tmp_path / 'index', SMALL)
  assert str(queries.folder) in str(error.value) and str(store.folder) in str(error.value)
  assert '\n' not in str(error.value)


def test_random_neighbours_give_the_same_artefact(tmp_path, rows):
  store, nearest = run(tmp_path, rows)
  random = pipeline.build_examples(
      tmp_path / 'random', store, store, None, ExamplesConfig(**{**vars(SMALL), 'kind': 'random'}))
  assert random.shape == nearest.shape and len(random) == len(nearest)
  a, b = (e.read(range(len(e))) for e in (nearest, random))
  for name in a:
    assert a[name].shape == b[name].shape and a[name].dtype == b[name].dtype
    if not name.startswith('neighbor'):
      np.testing.assert_array_equal(a[name], b[name])
  assert b['neighbor_distances'][b['neighbor_ids'] >= 0].mean() > (
      a['neighbor_distances'][a['neighbor_ids'] >= 0].mean())


@pytest.mark.parametrize('changes, words', [
    ({'sequence_length': 30}, 'sequence_length is 30, no multiple of chunk_length 8'),
    ({'num_neighbors': 0}, 'num_neighbors is 0'),
    ({'kind': 'best'}, "'best' is unknown"),
])
def test_wrong_settings_leave_nothing(tmp_path, rows, changes, words):
  with pytest.raises(UserError, match=words):
    run(tmp_path, rows, ExamplesConfig(**{**vars(SMALL), **changes}))
  assert not (tmp_path / 'examples').exists()


def test_killed_search_leaves_nothing(tmp_path, rows, monkeypatch):
  def killed(*unused, **unused_too):
    raise KeyboardInterrupt
  monkeypatch.setattr(neighbor_build.search, 'search_part', killed)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, rows)
  assert not worlds.content(tmp_path / 'examples')


def test_scann_index_serves_the_pipeline(tmp_path, rows):
  store, _ = run(tmp_path, rows)
  index = pipeline.build_index(
      tmp_path / 'scann', store, IndexConfig(kind='scann', recall_sample=20))
  assert index.kind == 'scann'
  examples = pipeline.build_examples(tmp_path / 'x', store, store, tmp_path / 'scann', SMALL)
  assert examples.manifest['index']['kind'] == 'scann'
  assert (examples.read([0])['neighbor_ids'] >= 0).all()
