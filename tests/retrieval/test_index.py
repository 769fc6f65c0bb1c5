"""Parts of an index against exact search, also built and asked by other processes."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.retrieval import index as index_lib
from retro_jax.retrieval import recall as recall_lib
from retro_jax.retrieval import scann_part
from retro_jax.retrieval.exact import ExactPart, array_blocks, exact_search
from retro_jax.retrieval.index import IndexConfig, build_part, latency, load_part, plan_part

SMALL = IndexConfig(kind='scann', recall_sample=200)


def unit(rows):
  return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(scope='module')
def vectors():
  """Around 40 centres, of one length, some of them copies."""
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(40, 24))[rng.integers(0, 40, 2500)] + 0.4 * rng.normal(size=(2500, 24))
  rows[2000:2100] = rows[:100]
  return unit(rows)


@pytest.fixture(scope='module')
def queries(vectors):
  rng = np.random.default_rng(1)
  return unit(vectors[rng.integers(0, 2500, 300)] + 0.05 * rng.normal(size=(300, 24))).astype('f4')


def built(folder, vectors, config=SMALL, **options):
  folder.mkdir(parents=True, exist_ok=True)
  return build_part(folder, vectors, config, **options)


@pytest.fixture(scope='module')
def scann(tmp_path_factory, vectors):
  folder = tmp_path_factory.mktemp('scann')
  return folder, built(folder, vectors)


def files_of(folder):
  return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
          for path in sorted(folder.rglob('*')) if path.is_file()}


def share_found(ids, truth):
  return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(ids.tolist(), truth.tolist())])


def test_the_number_of_vectors_decides(tmp_path, vectors):
  facts = built(tmp_path / 'a', vectors, IndexConfig())
  assert facts['search'] == 'exact' and files_of(tmp_path / 'a') == {}
  assert facts['recall']['recall'] == 1 and facts['bytes_per_vector'] == 0
  facts = built(tmp_path / 'b', vectors, IndexConfig(exact_below=2500, recall_sample=50))
  assert facts['search'] == 'scann' and facts['settings']['leaves'] == 50
  assert load_part(tmp_path / 'b', facts, vectors).kind == 'scann'
  assert built(tmp_path / 'c', vectors[:20], SMALL)['search'] == 'exact'


def test_facts_are_json_and_the_folder_may_be_renamed(tmp_path, vectors, queries, monkeypatch):
  monkeypatch.chdir(tmp_path)
  facts = built(Path('here'), vectors)
  before = load_part(Path('here'), facts, vectors).search(queries, 5)
  Path('here').rename('there')
  after = load_part(Path('there'), json.loads(json.dumps(facts)), vectors).search(queries, 5)
  for mine, theirs in zip(before, after):
    np.testing.assert_array_equal(mine, theirs)


def test_recall_is_that_of_a_loop(scann, vectors):
  folder, facts = scann
  rows = np.unique(np.linspace(0, 2499, 200).astype(int))
  mine, distances = load_part(folder, facts, vectors).search(vectors[rows].astype('f4'), 11)
  found = 0
  for row, ids, distance in zip(rows, mine, distances):
    true = np.sum((vectors.astype(np.float64) - vectors[row]) ** 2, -1)
    worst = np.sort(np.delete(true, row))[9]
    good = [i for i, d in zip(ids.tolist(), distance) if i != row and d <= worst + 1e-6]
    found += min(10, len(good))
  assert facts['recall'] == {'at': 10, 'sample': 200, 'recall': pytest.approx(found / 2000),
                             'self_recall': facts['recall']['self_recall']}
  assert facts['recall']['recall'] >= 0.97 and facts['recall']['self_recall'] > 0.97


@pytest.mark.parametrize('storage', ['float32', 'bfloat16', 'int8'])
@pytest.mark.parametrize('one_length', [True, False])
def test_distances_are_those_of_exact_search(tmp_path, vectors, queries, storage, one_length):
  if not one_length:
    vectors = (vectors * np.linspace(0.5, 2, len(vectors))[:, None]).astype(np.float16)
  facts = built(tmp_path / 'x', vectors, dataclasses.replace(SMALL, storage=storage))
  assert facts['settings']['one_length'] is one_length
  assert facts['recall']['recall'] >= 0.97
  ids, distances = load_part(tmp_path / 'x', facts, vectors).search(queries, 15)
  truth, true_distances = exact_search(queries, array_blocks(vectors), 2500)
  assert share_found(ids, truth[:, :15]) > 0.95
  for row in range(len(queries)):
    exact = dict(zip(truth[row].tolist(), true_distances[row].tolist()))
    assert [exact[i] for i in ids[row].tolist()] == distances[row].tolist()
    order = list(zip(distances[row].tolist(), ids[row].tolist()))
    assert order == sorted(order) and len(set(order)) == 15
  assert ids.dtype == np.int64 and distances.dtype == np.float32


def test_places_that_cannot_be_filled_are_marked_and_nothing_comes_twice(scann, vectors):
  part = load_part(*scann, vectors)
  ids, distances = part.search(vectors[:3].astype(np.float32), 3000)
  assert ids.shape == (3, 3000)
  for row in range(3):
    real = ids[row][ids[row] >= 0]
    assert 0 < len(set(real.tolist())) == len(real) < 2500
    assert np.isinf(distances[row][len(real):]).all() and (ids[row][len(real):] == -1).all()
  assert part.search(np.zeros((0, 24), np.float32), 3)[0].shape == (0, 3)


def test_answers_do_not_depend_on_batch_or_threads(scann, vectors, queries):
  part = load_part(*scann, vectors)
  ids, distances = part.search(queries, 8)
  in_blocks = lambda size: [np.concatenate(x) for x in zip(
      *(part.search(queries[i:i + size], 8) for i in range(0, 300, size)))]
  for other in (load_part(*scann, vectors, threads=3).search(queries, 8), in_blocks(100),
                in_blocks(20)):
    np.testing.assert_array_equal(other[0], ids)
    np.testing.assert_array_equal(other[1], distances)
  # Few queries look into other leaves now and then; among themselves they agree too.
  few = in_blocks(1)
  np.testing.assert_array_equal(in_blocks(15)[0], few[0])
  assert share_found(few[0], ids) > 0.97


def test_another_process_builds_the_same_bytes_and_answers_the_same(tmp_path, vectors, queries):
  configs = [SMALL, dataclasses.replace(SMALL, leaves=30, storage='float32'),
             dataclasses.replace(SMALL, storage='bfloat16')]
  facts = [built(tmp_path / f'mine-{i}', vectors, c, threads=2) for i, c in enumerate(configs)]
  np.savez(tmp_path / 'data.npz', vectors=vectors, queries=queries)
  (tmp_path / 'configs.json').write_text(json.dumps([dataclasses.asdict(c) for c in configs]))
  code = f'''
import json, pathlib
import numpy as np
from retro_jax.retrieval.index import IndexConfig, build_part, load_part
folder = pathlib.Path({str(tmp_path)!r})
data = np.load(folder / 'data.npz')
facts = []
for i, config in enumerate(json.loads((folder / 'configs.json').read_text())):
  (folder / f'theirs-{{i}}').mkdir()
  facts.append(build_part(folder / f'theirs-{{i}}', data['vectors'], IndexConfig(**config), 1))
  part = load_part(folder / f'mine-{{i}}', facts[-1], data['vectors'])
  np.savez(folder / f'answers-{{i}}.npz', *part.search(data['queries'], 12))
(folder / 'facts.json').write_text(json.dumps(facts))
'''
  subprocess.run([sys.executable, '-c', code], check=True, capture_output=True,
                 cwd=Path(index_lib.__file__).parents[2])
  assert json.loads((tmp_path / 'facts.json').read_text()) == facts
  for i, mine in enumerate(facts):
    assert files_of(tmp_path / f'theirs-{i}') == files_of(tmp_path / f'mine-{i}') != {}
    answers = np.load(tmp_path / f'answers-{i}.npz')
    for ours, theirs in zip(load_part(tmp_path / f'mine-{i}', mine, vectors).search(queries, 12),
                            (answers['arr_0'], answers['arr_1'])):
      np.testing.assert_array_equal(ours, theirs)


def test_tuning_takes_the_cheapest_that_reaches_the_target(tmp_path, vectors):
  config = dataclasses.replace(SMALL, leaves=100, target_recall=0.9)
  facts = built(tmp_path / 'x', vectors, config)
  part = load_part(tmp_path / 'x', facts, vectors)
  sample = recall_lib.RecallSample.of(vectors, 10, 200)
  assert facts['recall']['recall'] >= 0.9 + sample.standard_error
  chosen = part.settings
  assert 1 < chosen.leaves_to_search < 50
  steps = index_lib._steps(100)
  fewer = steps[steps.index(chosen.leaves_to_search) - 1]
  part.settings = dataclasses.replace(chosen, leaves_to_search=fewer)
  assert sample.measure(part)['recall'] < 0.9 + sample.standard_error
  higher = built(tmp_path / 'y', vectors, dataclasses.replace(config, target_recall=0.99))
  assert higher['settings']['leaves_to_search'] > chosen.leaves_to_search


def test_what_is_set_is_not_tuned_and_low_recall_is_loud(tmp_path, vectors, capfd):
  facts = built(tmp_path / 'x', vectors, dataclasses.replace(
      SMALL, leaves=100, leaves_to_search=1, reorder=30))
  assert facts['settings']['leaves_to_search'] == 1 and facts['settings']['reorder'] == 30
  assert facts['recall']['recall'] < 0.8
  captured = capfd.readouterr()
  warning = [line for line in captured.err.splitlines() if line.startswith('WARNING: recall')]
  assert len(warning) == 1 and 'recall@10' in warning[0] and 'leaves_to_search' in warning[0]
  assert 'about' in captured.out and 'ScaNN, 100 leaves' in captured.out
  facts = built(tmp_path / 'y', vectors, dataclasses.replace(SMALL, leaves_to_search=7))
  assert facts['settings']['leaves_to_search'] == 7
  facts = built(tmp_path / 'z', vectors, dataclasses.replace(SMALL, target_recall=0))
  assert facts['settings']['leaves_to_search'] == 12 and facts['settings']['reorder'] == 40
  assert 'WARNING: recall' not in capfd.readouterr().err


def test_more_effort_finds_more(tmp_path, vectors, queries):
  facts = built(tmp_path / 'x', vectors, dataclasses.replace(
      SMALL, leaves=100, leaves_to_search=2, reorder=20))
  part = load_part(tmp_path / 'x', facts, vectors)
  truth, _ = exact_search(queries, array_blocks(vectors), 10)
  shares = [share_found(part.search(queries, 10, effort)[0], truth) for effort in (1, 4, 50)]
  assert shares[0] < shares[1] < shares[2] and shares[2] > 0.99


def test_plan_tells_the_size_on_disk_and_keeps_to_memory(tmp_path, vectors):
  rows = np.tile(vectors, (2, 8))[:, :192]
  rows = unit(rows + 0.1 * np.random.default_rng(0).normal(size=rows.shape))
  for storage in ('int8', 'bfloat16'):
    config = dataclasses.replace(SMALL, storage=storage, recall_sample=20)
    plan = plan_part(*rows.shape, config)
    facts = built(tmp_path / storage, rows, config)
    assert facts['bytes_per_vector'] * len(rows) == pytest.approx(plan.disk_bytes, rel=0.05)
    assert storage in str(plan) and '5,000 vectors of 192' in str(plan)
  with pytest.raises(UserError, match='vectors_per_part to [0-9,]+ or less'):
    plan_part(10**6, 1024, dataclasses.replace(config, memory_gib=1))
  assert plan_part(10**9, 384, IndexConfig(kind='exact')).disk_bytes == 0


def test_mesh_part_is_exact_and_stores_nothing(tmp_path, vectors, queries):
  facts = built(tmp_path / 'x', vectors, IndexConfig(kind='mesh'))
  assert files_of(tmp_path / 'x') == {} and facts['recall']['recall'] == 1
  part = load_part(tmp_path / 'x', facts, vectors)
  assert part.kind == 'mesh'
  for mine, theirs in zip(part.search(queries, 4), ExactPart(vectors).search(queries, 4)):
    np.testing.assert_array_equal(mine, theirs)
  facts = built(tmp_path / 'y', vectors, IndexConfig(kind='mesh', mesh_approximate=True))
  assert facts['recall']['sample'] == 1000 and 0.9 < facts['recall']['recall'] <= 1


@pytest.mark.parametrize('count', [1, 2, 64, 65])
@pytest.mark.parametrize('kind', ['scann', 'exact', 'mesh'])
def test_few_vectors(tmp_path, vectors, kind, count):
  facts = built(tmp_path / 'x', vectors[:count], IndexConfig(kind=kind))
  part = load_part(tmp_path / 'x', facts, vectors[:count])
  ids, distances = part.search(vectors[:1].astype(np.float32), count + 2)
  assert ids[0, 0] == 0 and distances[0, 0] == 0
  assert (ids[0, count:] == -1).all() and np.isinf(distances[0, count:]).all()


def test_bad_input_is_one_line(tmp_path, vectors, scann):
  with pytest.raises(UserError, match='no vectors'):
    built(tmp_path / 'a', vectors[:0])
  with pytest.raises(UserError, match=r"'scan' is unknown \(did you mean 'scann'\?\)"):
    IndexConfig(kind='scan')
  with pytest.raises(UserError, match="'int4' is unknown"):
    IndexConfig(storage='int4')
  with pytest.raises(UserError, match='recall_at is 0'):
    IndexConfig(recall_at=0)
  with pytest.raises(UserError, match='target_recall is 97'):
    IndexConfig(target_recall=97)
  for kind in ('exact', 'scann', 'mesh'):
    wrong = vectors.copy()
    wrong[1234, 5] = np.nan
    with pytest.raises(UserError, match='vector 1234 holds a number that is not finite'):
      built(tmp_path / kind, wrong, IndexConfig(kind=kind))
  with pytest.raises(UserError, match='dimension 24'):
    load_part(*scann, vectors).search(np.zeros((2, 23), np.float32), 1)
  with pytest.raises(UserError, match='indexes 2500 vectors of 24, the store holds 2400'):
    load_part(*scann, vectors[:2400])


def test_a_damaged_part_is_one_line(tmp_path, vectors):
  facts = built(tmp_path / 'x', vectors)
  (tmp_path / 'x' / 'scann' / 'scann_config.pb').write_bytes(b'no protocol buffer')
  with pytest.raises(UserError, match='build the index again'):
    load_part(tmp_path / 'x', facts, vectors)


def test_latency_counts_every_query(scann, vectors, queries):
  part = load_part(*scann, vectors)
  numbers = latency(part, queries[:50], 3)
  assert 0 < numbers['p50_ms'] <= numbers['p90_ms'] <= numbers['p99_ms'] < 1000
  assert numbers['queries_per_second'] > 1
  assert isinstance(part, scann_part.ScannPart)
