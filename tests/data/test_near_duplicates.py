"""Near-identical documents against Jaccard similarity computed with Python sets."""

import random
import re

import numpy as np
import pytest

from retro_jax.data.near_duplicates import near_duplicates, shingles


def brute_force_sets(texts, width):
  sets = []
  for text in texts:
    words = re.findall(r'\w+', text.lower())
    size = min(width, len(words))
    starts = range(len(words) - size + 1) if words else ()
    sets.append({tuple(words[i:i + size]) for i in starts})
  return sets


def similarity(a, b):
  return len(a & b) / len(a | b) if a and b else 0.0


def families(seed, count):
  """Texts that are edits of a few originals, so that all similarities occur."""
  rng = random.Random(seed)
  words = [f'w{i}' for i in range(200)]
  header = ' '.join(rng.choices(words, k=30))
  originals = [header + '\n' + ' '.join(rng.choices(words, k=rng.randrange(1, 120)))
               for _ in range(count // 5)]
  texts = []
  for _ in range(count):
    text = rng.choice(originals).split(' ')
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
      text[rng.randrange(len(text))] = rng.choice(words)
    texts.append(' '.join(text[:rng.choice([None, None, 50, 100])]))
  return texts + ['', '...', 'one', 'one', 'one two']


@pytest.mark.parametrize('seed, width, threshold', [
    (0, 13, 0.8), (1, 13, 0.8), (2, 5, 0.6), (3, 3, 1.0), (4, 13, 0.3)])
def test_equals_brute_force(seed, width, threshold):
  texts = families(seed, 120)
  random.Random(seed).shuffle(texts)
  sets = brute_force_sets(texts, width)
  hashed = shingles(texts, width)
  assert [len(s) for s in hashed] == [len(s) for s in sets]
  cut = 80
  found = near_duplicates(hashed[:cut], hashed[cut:], threshold)
  hits = 0
  for a, j in zip(sets[:cut], found):
    best = max(similarity(a, b) for b in sets[cut:])
    if best >= threshold:
      hits += 1
      assert j >= 0 and similarity(a, sets[cut:][j]) == best
    else:
      assert j == -1
  assert 0 < hits < cut


def test_order_of_words_counts_and_case_does_not():
  a, b, c = shingles(['one two three four', 'ONE  two\nthree, four', 'two one three four'], 2)
  assert np.array_equal(a, b)
  assert len(np.intersect1d(a, c)) == 1  # 'three four'


def test_nothing_on_either_side():
  sets = shingles(['a b c'])
  assert near_duplicates([], sets).tolist() == []
  assert near_duplicates(sets, []).tolist() == [-1]
  assert near_duplicates(shingles(['']), shingles(['', '!'])).tolist() == [-1]


@pytest.mark.parametrize('threshold', [0.8, 0.6, 0.7, 0.9])
def test_similarity_equal_to_the_threshold_counts(threshold):
  shared = round(10 * threshold)
  a = np.arange(shared, dtype=np.uint64)
  b = np.arange(10, dtype=np.uint64)
  assert near_duplicates([a], [b], threshold).tolist() == [0]
  assert near_duplicates([b], [a], threshold).tolist() == [0]
  assert near_duplicates([a[:-1]], [b], threshold).tolist() == [-1]
