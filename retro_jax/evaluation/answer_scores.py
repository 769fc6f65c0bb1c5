"""Exact match and F1 by the rules of SQuAD's own evaluation (Rajpurkar et al. 2016), and copying.

Numbers are fractions of 1; the best over all right answers counts.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

_ARTICLES = re.compile(r'\b(?:a|an|the)\b')
_PUNCTUATION = str.maketrans('', '', string.punctuation)


def normalized(text: str) -> str:
  """Lower case, without ASCII punctuation and English articles, words one space apart."""
  return ' '.join(_ARTICLES.sub(' ', text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
  """1 if the prediction is one of the answers after `normalized`, else 0."""
  return _best(lambda answer: float(normalized(prediction) == normalized(answer)), answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
  """The harmonic mean of precision and recall of words, as a bag."""
  return _best(lambda answer: _word_f1(normalized(prediction).split(), normalized(answer).split()),
               answers)


def _word_f1(predicted: list[str], right: list[str]) -> float:
  common = sum((Counter(predicted) & Counter(right)).values())
  if not common:
    return 0.0
  return 2 * common / (len(predicted) + len(right))


def _best(score: Callable[[str], float], answers: Sequence[str]) -> float:
  return max(score(answer) for answer in answers)


def occurs(texts: Iterable[str], passages: Iterable[str]) -> bool:
  """Whether one of the texts, which must not be empty, stands in a passage as whole words."""
  wanted = [f' {normal} ' for normal in map(normalized, texts) if normal]
  found = [f' {normalized(passage)} ' for passage in passages]
  return any(one in passage for one in wanted for passage in found)
