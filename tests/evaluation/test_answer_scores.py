"""SQuAD's rules, on cases worked out by hand and against its evaluation written out as steps."""

import collections
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_jax.evaluation import answer_scores


@pytest.mark.parametrize('text, expected', [
    ('The  Cat!', 'cat'), ('a an the', ''), ('theatre', 'theatre'), ("O'Neil's", 'oneils'),
    ('in 1,000 B.C.', 'in 1000 bc'), ('well-known', 'wellknown'), ('\tthe\n1973 ', '1973'),
    ('A.', ''), ('an apple a day', 'apple day'), ('Übermut „x“', 'übermut „x“')])
def test_normalized(text, expected):
  assert answer_scores.normalized(text) == expected


@pytest.mark.parametrize('prediction, answers, exact, f1', [
    ('The Cat', ['dog', 'cat!'], 1, 1), ('cat', ['dog'], 0, 0), ('', ['cat'], 0, 0),
    ('black cat', ['cat'], 0, 2 / 3), ('cat cat', ['cat'], 0, 2 / 3),
    ('in march 1973', ['March 1973', '1973'], 0, 0.8), ('the', ['a'], 1, 0),
    ('cat dog', ['dog cat'], 0, 1)])
def test_by_hand(prediction, answers, exact, f1):
  assert answer_scores.exact_match(prediction, answers) == exact
  assert answer_scores.f1(prediction, answers) == pytest.approx(f1)


def slow_f1(prediction, answer):
  """Precision and recall of words, character by character and word by word."""
  def words(text):
    kept = ''.join(c for c in text.lower() if c not in set(string.punctuation))
    return [w for w in re.split(r'\s+', re.sub(r'\b(a|an|the)\b', ' ', kept)) if w]
  predicted, right = words(prediction), words(answer)
  left, same = collections.Counter(right), 0
  for word in predicted:
    if left[word]:
      left[word] -= 1
      same += 1
  if not same:
    return 0.0
  precision, recall = same / len(predicted), same / len(right)
  return 2 * precision * recall / (precision + recall)


texts = st.text(alphabet=st.sampled_from('aAn the.-1 bé\n'), max_size=20)


@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_f1_equals_the_steps(prediction, answers):
  assert answer_scores.f1(prediction, answers) == pytest.approx(
      max(slow_f1(prediction, answer) for answer in answers))


@pytest.mark.parametrize('wanted, passages, expected', [
    (['the Cat'], ['a black cat.'], True), (['cat'], ['category'], False), ([''], ['x'], False),
    (['x', 'dog'], ['a', 'hot dog!'], True), (['hot dog'], ['dog hot'], False), (['x'], [], False)])
def test_occurs(wanted, passages, expected):
  assert answer_scores.occurs(wanted, passages) == expected
