"""BM25 against a textbook loop over the same words; ties, empty texts, other processes."""

import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.errors import UserError
from retro_jax.retrieval.bm25 import Bm25Config, build_part, load_part, words_of

WORDS = ['sea', 'sky', 'The', 'the', 'bird', 'É', 'é', '漢字', '🙂', '.', 'x_1', '\ud800']
TEXTS = ['the sea and the sky', 'a bird in the sky', '', 'the sea and the sky', 'Sea! sea? SEA.',
         '東京は sky', '...', 'sky', 'the the the the', 'cafe\u0301 and ﬁne']


def slow_scores(texts, query, config):
  """Okapi BM25 by its formula, one word and one text at a time, in float64."""
  rows = [words_of(text, config.lowercase) for text in texts]
  average = sum(map(len, rows)) / len(rows)
  holding = Counter(word for row in rows for word in set(row))
  wanted = Counter(w for w in words_of(query, config.lowercase) if w in holding)
  if config.max_query_terms:
    order = {word: i for i, word in enumerate(dict.fromkeys(w for row in rows for w in row))}
    rarest = sorted(wanted, key=lambda word: (holding[word], order[word]))
    wanted = {word: wanted[word] for word in rarest[:config.max_query_terms]}
  scores = []
  for row in rows:
    score = 0.0
    for word, times in wanted.items():
      n, found = len(texts), holding[word]
      f = row.count(word)
      ratio = (n - found + 0.5) / (found + 0.5)
      idf = {'lucene': math.log(1 + ratio), 'robertson': math.log(max(1, ratio)),
             'atire': math.log(n / found)}[config.method]
      saturated = f / (f + config.k1 * (1 - config.b + config.b * len(row) / average)) if f else 0
      score += times * idf * saturated * (config.k1 + 1 if config.method == 'atire' else 1)
    scores.append(score)
  return scores


def part_of(folder, texts, config=Bm25Config()):
  folder.mkdir()
  facts = build_part(folder, iter(texts), config)
  return load_part(folder, json.loads(json.dumps(facts)))


texts_strategy = st.lists(st.lists(st.sampled_from(WORDS), max_size=8).map(' '.join), min_size=1,
                          max_size=12)


@settings(deadline=None, max_examples=80)
@given(texts=texts_strategy, queries=texts_strategy, k=st.integers(0, 14),
       k1=st.sampled_from([0.5, 1.5]), b=st.sampled_from([0, 0.75, 1]),
       method=st.sampled_from(['lucene', 'robertson', 'atire']), lowercase=st.booleans(),
       terms=st.integers(0, 3))
def test_search_and_score_equal_the_textbook(
    tmp_path_factory, texts, queries, k, k1, b, method, lowercase, terms):
  config = Bm25Config(k1, b, method, lowercase, max_query_terms=terms)
  part = part_of(tmp_path_factory.mktemp('bm25') / 'part', texts, config)
  everything = np.tile(np.arange(len(texts)), (len(queries), 1))
  scored = part.score(queries, everything)
  expected = -np.array([slow_scores(texts, query, config) for query in queries])
  np.testing.assert_allclose(scored, expected, rtol=1e-5, atol=1e-6)

  ids, distances = part.search(queries, k)
  assert ids.shape == distances.shape == (len(queries), k)
  assert ids.dtype == np.int64 and distances.dtype == np.float32
  for row, mine, found in zip(scored, ids, distances):
    # Given the float32 scores, the order is exact: nearest first, ties by id.
    order = sorted((s, i) for i, s in enumerate(row.tolist()) if s < 0)[:k]
    order += [(np.inf, -1)] * (k - len(order))
    assert list(zip(found.tolist(), mine.tolist())) == order


def test_ties_empty_queries_and_unknown_words(tmp_path):
  part = part_of(tmp_path / 'part', TEXTS)
  assert part.kind == 'bm25' and part.size == len(TEXTS)
  ids, distances = part.search(['the sea and the sky', '', 'zebra', '京', 'CAFÉ FINE', '...'], 3)
  assert ids[0, :2].tolist() == [0, 3] and distances[0, 0] == distances[0, 1] < 0
  assert (ids[[1, 2, 5]] == -1).all() and np.isinf(distances[[1, 2, 5]]).all()
  assert ids[3].tolist() == [5, -1, -1]  # One character of a script without spaces.
  assert ids[4].tolist() == [9, -1, -1]  # Case, accents and ligatures aside.
  ids, _ = part.search([], 3)
  assert ids.shape == (0, 3)
  wide, _ = part.search(['sky'], 50)
  assert (wide[0] >= 0).sum() == 5 and wide.shape == (1, 50)


def test_score_of_candidates_is_that_of_search(tmp_path):
  part = part_of(tmp_path / 'part', TEXTS)
  queries = ['the sea and a bird', 'sky']
  ids, distances = part.search(queries, 6)
  np.testing.assert_array_equal(part.score(queries, ids), distances)
  mixed = part.score(queries, np.array([[2, -1], [7, 0]]))
  assert mixed[0, 0] == 0 and np.isinf(mixed[0, 1]) and mixed[1, 0] < mixed[1, 1] < 0
  assert part.score(queries, np.zeros((2, 0), int)).shape == (2, 0)
  for bad in (np.array([[len(TEXTS)], [0]]), np.array([[0]])):
    with pytest.raises(ValueError, match='do not fit 2 queries over 10 chunks'):
      part.score(queries, bad)


@pytest.mark.parametrize('texts', [[], ['', '...']])
def test_parts_without_words_find_nothing(tmp_path, texts):
  part = part_of(tmp_path / 'part', texts)
  ids, distances = part.search(['sea', ''], 2)
  assert (ids == -1).all() and np.isinf(distances).all() and part.size == len(texts)
  if texts:
    assert part.score(['sea'], np.array([[1, -1]])).tolist() == [[0, np.inf]]


def test_stopwords_are_left_out(tmp_path):
  part = part_of(tmp_path / 'part', TEXTS, Bm25Config(stopwords='en'))
  ids, _ = part.search(['the', 'sea'], 1)
  assert ids.tolist() == [[-1], [4]]
  with pytest.raises(UserError, match="stopwords is 'klingon', expected one of .*german"):
    part_of(tmp_path / 'other', TEXTS, Bm25Config(stopwords='klingon'))


@pytest.mark.parametrize('setting', [
    {'method': 'bm25+'}, {'k1': 0}, {'b': 1.5}, {'max_query_terms': -1}, {'vectors_per_part': 0}])
def test_impossible_settings_are_refused(setting):
  with pytest.raises(UserError, match=f'Bm25Config: .*{next(iter(setting))}'):
    Bm25Config(**setting)


def test_files_that_do_not_fit_the_facts_are_refused(tmp_path):
  (tmp_path / 'part').mkdir()
  facts = build_part(tmp_path / 'part', TEXTS, Bm25Config())
  assert facts['bytes'] == sum(p.stat().st_size for p in (tmp_path / 'part').iterdir())
  with pytest.raises(UserError, match='expected 4 and'):
    load_part(tmp_path / 'part', {**facts, 'words': 4})


def test_another_process_writes_the_same_bytes_and_jax_is_left_alone(tmp_path):
  part_of(tmp_path / 'here', TEXTS)
  (tmp_path / 'there').mkdir()
  (tmp_path / 'texts.json').write_text(json.dumps(TEXTS))
  # Importing bm25s would start JAX's backend, after which JAX can no longer be set up.
  code = ('import json, sys; from pathlib import Path; from retro_jax.retrieval import bm25\n'
          f'bm25.build_part(Path({str(tmp_path / "there")!r}), '
          f'json.load(open({str(tmp_path / "texts.json")!r})), bm25.Bm25Config())\n'
          'assert "jax" not in sys.modules\n'
          'import jax\n'
          'jax.config.update("jax_num_cpu_devices", 3)\n'
          'assert jax.device_count() == 3')
  subprocess.run([sys.executable, '-c', code], check=True, timeout=120,
                 env={'PYTHONHASHSEED': '7', 'JAX_PLATFORMS': 'cpu', 'PATH': ''})
  names = sorted(path.name for path in (tmp_path / 'here').iterdir())
  assert names == ['chunks.npy', 'scores.npy', 'starts.npy', 'words.txt']
  for name in names:
    assert (tmp_path / 'here' / name).read_bytes() == (tmp_path / 'there' / name).read_bytes()
