"""Exact search against a loop; ScaNN against exact search, also from another process."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.errors import UserError
from retro_jax.retrieval import index as index_lib
from retro_jax.retrieval.index import IndexConfig, build_index, exact_search, load_index


def slow_search(queries, vectors, k, forbidden=None):
  """Sorts all distances, one query at a time, in float64."""
  ids, distances = [], []
  for row, query in enumerate(queries):
    all_distances = np.sum((vectors.astype(np.float64) - query) ** 2, -1).tolist()
    found = sorted((d, i) for i, d in enumerate(all_distances)
                   if forbidden is None or not forbidden[row, i])[:k]
    found += [(np.inf, -1)] * (k - len(found))
    ids.append([i for _, i in found])
    distances.append([d for d, _ in found])
  return np.array(ids), np.array(distances)


def clustered(seed, n, d, copies=4):
  """Vectors near a few centres, some exactly repeated; small integers, so that ties are exact."""
  rng = np.random.default_rng(seed)
  vectors = rng.integers(-3, 4, (n, d)).astype(np.float32)
  vectors[rng.integers(0, n, n // copies)] = vectors[rng.integers(0, n, n // copies)]
  return vectors


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 120), d=st.integers(1, 6),
       k=st.integers(1, 40), block=st.integers(1, 50), forbid=st.booleans())
def test_exact_search_equals_a_loop(seed, n, d, k, block, forbid):
  vectors = clustered(seed, n, d)
  rng = np.random.default_rng(seed + 1)
  queries = np.concatenate([vectors[rng.integers(0, n, 3)], rng.normal(size=(2, d))]).astype('f4')
  mask = rng.random((5, n)) < 0.4 if forbid else None
  blocks = [(i, vectors[i:i + block]) for i in range(0, n, block)]
  ids, distances = exact_search(
      queries, blocks, k, (lambda chosen: mask[:, chosen]) if forbid else None)
  expected_ids, expected = slow_search(queries, vectors, k, mask)
  np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=1e-5)
  # The first three queries have exact distances, so ties must be broken by id.
  np.testing.assert_array_equal(ids[:3], expected_ids[:3])


def test_exact_search_with_more_copies_than_candidates():
  vectors = np.tile(np.array([[1.1, 0.3, -0.7]], np.float32), (200, 1))
  vectors[150] = [5, 5, 5]
  queries = np.array([[1.1, 0.3, -0.7], [9, 9, 9], [1.2, 0.3, -0.7]], np.float32)
  ids, distances = exact_search(queries, [(0, vectors[:77]), (77, vectors[77:])], 9)
  assert ids.tolist() == [list(range(9)), [150] + list(range(8)), list(range(9))]
  assert not distances[0].any()


def test_exact_search_among_hundreds_of_ties():
  vectors = np.random.default_rng(0).integers(0, 3, (1500, 2)).astype(np.float32)
  queries = vectors[:20]
  ids, distances = exact_search(queries, [(0, vectors[:1000]), (1000, vectors[1000:])], 7)
  expected_ids, expected = slow_search(queries, vectors, 7)
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_array_equal(distances, expected)


@pytest.fixture(scope='module')
def vectors():
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(40, 24))
  rows = centres[rng.integers(0, 40, 2500)] + 0.4 * rng.normal(size=(2500, 24))
  return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(scope='module')
def scann_folder(tmp_path_factory, vectors):
  folder = tmp_path_factory.mktemp('scann') / 'index'
  build_index(folder, vectors, IndexConfig(kind='scann', recall_sample=200), fingerprint='abc')
  return folder


def test_exact_below_the_threshold_scann_above(tmp_path, vectors):
  index = build_index(tmp_path / 'a', vectors, IndexConfig(), fingerprint='f')
  assert index.kind == 'exact' and index.size == len(vectors)
  index = build_index(tmp_path / 'b', vectors, IndexConfig(exact_below=2500, recall_sample=50),
                      fingerprint='f')
  assert index.kind == 'scann'


def test_scann_recall_is_measured_and_stored(scann_folder, vectors):
  manifest = index_lib.storage.read_manifest(scann_folder, 'index')
  stored = manifest['recall']
  index = load_index(scann_folder, 'abc')
  rows = np.unique(np.linspace(0, len(vectors) - 1, 200).astype(int))
  ids, _ = index.search(vectors[rows].astype(np.float32), 11)
  truth, _ = slow_search(vectors[rows].astype(np.float64), vectors, 11)
  recall = np.mean([len((set(a) & set(b)) - {r}) / 10 for a, b, r in zip(ids, truth, rows)])
  assert stored['at'] == 10 and stored['sample'] == 200
  assert abs(stored['recall'] - recall) < 0.01
  assert stored['recall'] > 0.9 and stored['self_recall'] > 0.99
  assert manifest['settings']['leaves'] == 50


def test_scann_recall_is_really_measured(tmp_path, vectors):
  build_index(tmp_path / 'poor', vectors, fingerprint='f', config=IndexConfig(
      kind='scann', leaves=400, leaves_to_search=1, reorder=11, recall_sample=200))
  assert index_lib.storage.read_manifest(tmp_path / 'poor', 'index')['recall']['recall'] < 0.7


def test_scann_distances_are_exact_and_sorted(scann_folder, vectors):
  index = load_index(scann_folder)
  ids, distances = index.search(vectors[:20].astype(np.float32), 15)
  true = np.sum((vectors[ids].astype(np.float64) - vectors[:20, None]) ** 2, -1)
  np.testing.assert_allclose(distances, true, atol=1e-4)
  assert (np.diff(distances) >= 0).all()
  assert ids.dtype == np.int64 and distances.dtype == np.float32


def test_scann_marks_what_it_could_not_fill(scann_folder, vectors):
  index = load_index(scann_folder)
  ids, distances = index.search(vectors[:3].astype(np.float32), 3000)
  assert ids.shape == (3, 3000)
  for row in range(3):
    real = ids[row][ids[row] >= 0]
    assert len(set(real.tolist())) == len(real) < 2500
    assert np.isinf(distances[row][len(real):]).all() and (ids[row][len(real):] == -1).all()


def test_scann_answers_the_same_in_another_process(scann_folder, vectors, tmp_path):
  np.save(tmp_path / 'v.npy', vectors)
  code = f'''
import numpy as np
from retro_jax.retrieval.index import IndexConfig, build_index, load_index
v = np.load({str(tmp_path / 'v.npy')!r})
config = IndexConfig(kind='scann', recall_sample=200)
for name, index in (
    ('loaded', load_index({str(scann_folder)!r})),
    ('rebuilt', build_index({str(tmp_path / 'again')!r}, v, config, fingerprint='abc'))):
  ids, distances = index.search(v[:300].astype(np.float32), 12)
  np.savez({str(tmp_path)!r} + '/' + name, ids=ids, distances=distances)
'''
  import retro_jax  # pylint: disable=import-outside-toplevel
  root = str(index_lib.Path(retro_jax.__file__).parents[1])
  subprocess.run([sys.executable, '-c', code], check=True, cwd=root, capture_output=True)
  ids, distances = load_index(scann_folder).search(vectors[:300].astype(np.float32), 12)
  for name in ('loaded', 'rebuilt'):
    theirs = np.load(tmp_path / f'{name}.npz')
    np.testing.assert_array_equal(theirs['ids'], ids)
    np.testing.assert_array_equal(theirs['distances'], distances)


def test_relative_folder(tmp_path, vectors, monkeypatch):
  monkeypatch.chdir(tmp_path)
  build_index('here', vectors, IndexConfig(kind='scann', recall_sample=10), fingerprint='f')
  ids, _ = load_index('here').search(vectors[:2].astype(np.float32), 1)
  assert ids.tolist() == [[0], [1]]


def test_more_effort_finds_more(tmp_path, vectors):
  index = build_index(tmp_path / 'x', vectors, fingerprint='f', config=IndexConfig(
      kind='scann', leaves=100, leaves_to_search=2, reorder=12, recall_sample=10))
  queries = vectors[:200].astype(np.float32)
  truth, _ = slow_search(queries, vectors, 10)
  hits = [sum(len(set(a) & set(b)) for a, b in zip(index.search(queries, 10, effort)[0], truth))
          for effort in (1, 8)]
  assert hits[1] > hits[0]


def test_current_changed_and_foreign(tmp_path, vectors, capsys):
  build_index(tmp_path / 'i', vectors, fingerprint='one')
  capsys.readouterr()
  build_index(tmp_path / 'i', vectors, fingerprint='one')
  assert 'index:' not in capsys.readouterr().out
  with pytest.raises(UserError, match='indexes embeddings one, the database holds two'):
    load_index(tmp_path / 'i', 'two')
  build_index(tmp_path / 'i', vectors[:100], fingerprint='two')
  assert load_index(tmp_path / 'i', 'two').size == 100


def test_bad_input_is_one_line(tmp_path, vectors):
  with pytest.raises(UserError, match='no vectors'):
    build_index(tmp_path / 'i', vectors[:0], fingerprint='f')
  with pytest.raises(UserError, match="'faiss' is unknown"):
    build_index(tmp_path / 'i', vectors, IndexConfig(kind='faiss'), fingerprint='f')
  with pytest.raises(UserError, match='dimension 24'):
    build_index(tmp_path / 'i', vectors, fingerprint='f').search(np.zeros((2, 23), np.float32), 1)


def test_one_vector(tmp_path, vectors):
  index = build_index(tmp_path / 'i', vectors[:1], fingerprint='f')
  ids, distances = index.search(vectors[:1].astype(np.float32), 3)
  assert ids.tolist() == [[0, -1, -1]] and np.isinf(distances[0, 1:]).all()
  assert index.search(np.zeros((0, 24), np.float32), 3)[0].shape == (0, 3)
