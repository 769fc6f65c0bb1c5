"""One HTML file of questions with their answers in each setting and the passages that were read.

Answers are made in question_answering.py; that no text can act is html_page.py's business.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retro_jax.evaluation import html_page
from retro_jax.evaluation.html_page import text
from retro_jax.evaluation.question_answering import PASSAGES, SHUFFLED, Answers, Asked

_NAMES = {'baseline': 'baseline', 'closed_book': 'closed book', 'passages': 'with passages',
          'shuffled': 'with those of another question'}


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
  """Header and cells of the rows of `question_answering.rows`, in percent."""
  percent = lambda row, name: f'{100 * row[name]:.2f}'
  interval = lambda row, name: f'{percent(row, name + "_low")} to {percent(row, name + "_high")}'
  return ('setting', 'exact match', '95 % interval', 'F1', '95 % interval', 'copied'), [
      (_NAMES[row['setting']], percent(row, 'exact_match'), interval(row, 'exact_match'),
       percent(row, 'f1'), interval(row, 'f1'), percent(row, 'copied') if 'copied' in row else '')
      for row in rows]


def write(path: str | os.PathLike, asked: Asked, answers: Mapping[str, Answers], k: int,
          rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], count: int) -> None:
  """Writes the page.

  Args:
    path: of the HTML file.
    asked: the questions.
    answers: by setting.
    k: passages that were read.
    rows: of `question_answering.rows`.
    facts: names and values for the head.
    count: how many questions are shown, evenly spread over all.
  """
  shown = np.unique(np.linspace(0, len(asked) - 1, min(count, len(asked))).astype(int))
  header, cells = table(rows)
  body = [html_page.facts(facts), html_page.table(header, cells),
          '<p>Copied: the answer stands in the passages that were read. What is marked in a '
          'passage is a right answer (green) or, where there is none, what was answered.</p>']
  body += [_question(int(number), asked, answers, k) for number in shown]
  html_page.write(path, 'Questions and answers', '\n'.join(body))


def _question(number: int, asked: Asked, answers: Mapping[str, Answers], k: int) -> str:
  question = asked.examples.questions[number]
  given = [(_NAMES[setting], of.texts[number], 'yes' if of.exact_match[number] else 'no',
            f'{100 * of.f1[number]:.0f}') for setting, of in answers.items()]
  parts = [f'<article><h3>{text(question.text)}</h3>',
           html_page.facts({'right': ' | '.join(question.answers)}),
           html_page.table(('setting', 'answer', 'exact match', 'F1'), given, left=2)]
  for setting, heading in ((PASSAGES, 'passage'), (SHUFFLED, "another question's")):
    if setting in answers:
      of = answers[setting]
      parts += [_passage(f'{heading} {place}', passage, question.answers, of.texts[number])
                for place, passage in enumerate(
                    asked.texts(int(of.sources[number]), k), start=1)]
  return '\n'.join(parts) + '</article>'


def _passage(heading: str, passage: str, right: Sequence[str], given: str) -> str:
  """A passage in which the right answers are marked, else the one that was given."""
  kind, found = 'both', _places(passage, right)
  if not found:
    kind, found = 'next', _places(passage, [given])
  pieces, end = [], 0
  for first, last in found:
    pieces += [text(passage[end:first]),
               f'<mark class="{kind}">{text(passage[first:last])}</mark>']
    end = last
  pieces.append(text(passage[end:]))
  return (f'<div class="cell"><h5>{text(heading)}</h5><div class="text">{"".join(pieces)}</div>'
          '</div>')


def _places(passage: str, wanted: Sequence[str]) -> list[tuple[int, int]]:
  """Where one of some texts stands, whatever its case; the longest where they overlap."""
  patterns = [re.escape(one) for one in sorted(wanted, key=len, reverse=True) if one]
  if not patterns:
    return []
  return [match.span() for match in re.finditer('|'.join(patterns), passage, re.IGNORECASE)]
