"""A generation for a person: in a terminal, as a page, as JSON; what was copied is coloured.

No text, be it a prompt's, a model's or a document's, can act in any of them (visible.py).
"""

import dataclasses
import os
from typing import Any

import numpy as np

from retro_jax import storage
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.errors import UserError
from retro_jax.evaluation import html_page
from retro_jax.evaluation.html_page import text
from retro_jax.evaluation.inspection_views import body, paint
from retro_jax.evaluation.visible import visible
from retro_jax.generation import faithfulness
from retro_jax.generation.faithfulness import Passage, ReadNeighbor
from retro_jax.generation.written import Generation, Neighbor

_ENDINGS = {'eos': 'the model ended the document', 'length': 'cut off', 'stop': 'a stop string',
            'cancelled': 'cancelled'}
_TITLE = 'A continuation and what it read'


def terminal(result: Generation, vocabulary: Vocabulary, color: bool) -> str:
  """Prompt and continuation, then what was read where.

  Args:
    result: to show.
    vocabulary: of its tokens.
    color: whether tokens are coloured that stand in a neighbour read while they were written.
  """
  lines = ['prompt', _indented(visible(result.prompt)), '',
           f'continuation ({len(result.tokens)} tokens, {_ENDINGS[result.reason]})',
           _continuation(result, vocabulary) if color
           else _indented(visible(result.text))]
  if any(chunk.neighbors for chunk in result.chunks):
    lines += ['', 'neighbours' + (f' ({_painted("copied", "next")})' if color else '')]
  passages = faithfulness.passages(result)
  for number, (chunk, passage) in enumerate(zip(result.chunks, passages[1:]), start=1):
    if not chunk.neighbors:
      continue
    lines.append(f'  chunk {number} {_first_line(chunk.text)!r} found, and chunk {number + 1} '
                 'read:')
    for read in passage.read:
      neighbor = read.neighbor
      lines.append(f'    {neighbor.distance:8.3f}  {_owner(neighbor)}  '
                   f'{_first_line(neighbor.text)!r}' + _copied(read))
      if color:
        lines.append(_indented(body(neighbor.tokens, _kinds(read.copied), vocabulary, paint), 4))
  return '\n'.join([*lines, '', summary(result)])


def summary(result: Generation) -> str:
  """The measures in a line."""
  measures = faithfulness.measure(result)
  line = f'{100 * measures.repetition:.1f} % of 4-grams repeated'
  if any(chunk.neighbors for chunk in result.chunks):
    line += (f'; {100 * measures.copied:.0f} % of tokens copied from neighbours, at most '
             f'{measures.longest_copied} in a row')
  return line


def page(path: str | os.PathLike, result: Generation, vocabulary: Vocabulary) -> None:
  """Writes the page: every chunk beside the neighbours that it read."""
  facts = {'tokens written': len(result.tokens), 'ended by': _ENDINGS[result.reason],
           'measures': summary(result)}
  articles = [_article(number, passage, vocabulary)
              for number, passage in enumerate(faithfulness.passages(result), start=1)]
  html_page.write(path, _TITLE, '\n'.join([html_page.facts(facts), _EXPLANATION, *articles]))


def as_json(result: Generation) -> dict[str, Any]:
  """All of it, with the measures, and beside each neighbour what its reader copied."""
  facts = dataclasses.asdict(result)
  for chunk in facts['chunks']:
    for neighbor in chunk['neighbors']:
      neighbor['longest_copied'] = 0
  for chunk, passage in zip(facts['chunks'], faithfulness.passages(result)[1:]):
    for neighbor, read in zip(chunk['neighbors'], passage.read):
      neighbor['longest_copied'] = read.longest
  return facts | {'measures': dataclasses.asdict(faithfulness.measure(result))}


def write(path: str, result: Generation, vocabulary: Vocabulary) -> None:
  """Writes `path` as its ending says: .json, .html, or .txt as in a terminal.

  Raises:
    UserError: another ending.
  """
  check_path(path)
  if path.endswith('.json'):
    storage.write_json(path, as_json(result))
  elif path.endswith('.html'):
    page(path, result, vocabulary)
  else:
    with storage.atomic_file(path) as f:
      f.write(terminal(result, vocabulary, color=False) + '\n')


def check_path(path: str) -> None:
  """Refuses, with a `UserError`, a path that `write` cannot write; '' is none."""
  if path and not path.endswith(('.json', '.html', '.txt')):
    raise UserError(f'{path}: the output is written as .json, .html or .txt; give it one of these '
                    'endings')


def _article(number: int, passage: Passage, vocabulary: Vocabulary) -> str:
  kinds = np.where(np.arange(len(passage.tokens)) < passage.prompt, 'prompt', '').astype(object)
  kinds = [f'{kind} {copied}'.strip() for kind, copied in zip(kinds, _kinds(passage.copied))]
  rows = [f'<article><h3>chunk {number}</h3><div class="row query">',
          html_page.cell('Chunk', np.array(passage.tokens), np.array(kinds, object), vocabulary),
          '</div>']
  for read in passage.read:
    neighbor, copied = read.neighbor, _kinds(read.copied)
    heading = (f'distance {neighbor.distance:.4f}: {_owner(neighbor)} ({neighbor.document_id}), '
               f'chunk {neighbor.chunk_id}' + _copied(read))
    tokens, length = np.array(neighbor.tokens), neighbor.length
    rows += [f'<div class="row neighbor"><h4>{text(heading)}</h4>',
             html_page.cell('N', tokens[:length], copied[:length], vocabulary),
             html_page.cell('F, its continuation', tokens[length:], copied[length:], vocabulary),
             '</div>']
  if not passage.read:
    rows.append('<p class="none">It read no neighbours.</p>')
  return ''.join(rows) + '</article>'


def _continuation(result: Generation, vocabulary: Vocabulary) -> str:
  """The written text, coloured; it ends where the text does, before a stop string."""
  lines, left = [], len(result.text)
  copied = np.concatenate([passage.copied[passage.prompt:]
                           for passage in faithfulness.passages(result)])
  for part, kind in html_page.marked(np.array(result.tokens, int), _kinds(copied), vocabulary):
    part, left = part[:left], left - len(part[:left])
    rows = visible(part).split('\n')
    lines.append('\n'.join(_painted(row, kind) if kind and row else row for row in rows))
  return _indented(''.join(lines))


def _kinds(copied: np.ndarray) -> np.ndarray:
  return np.where(copied, 'next', '').astype(object)


def _painted(line: str, kind: str) -> str:
  return paint(line, (kind,))


def _copied(read: ReadNeighbor) -> str:
  if read.longest < faithfulness.SHORTEST_RUN:
    return ''
  return f', {read.longest} tokens in a row copied'


def _owner(neighbor: Neighbor) -> str:
  return visible(neighbor.title or neighbor.document_id)


def _indented(words: str, margin: int = 2) -> str:
  return '\n'.join(' ' * margin + line for line in words.split('\n'))


def _first_line(words: str, longest: int = 60) -> str:
  """The first line that says something, shortened."""
  line = next((line.strip() for line in words.splitlines() if line.strip()), '')
  return visible(line if len(line) <= longest else line[:longest - 1] + '…')


_EXPLANATION = '''<p>Each chunk of prompt and continuation stands above the neighbours that it
read: N, which the chunk before it had found, and F, which follows N in its document.
<mark class="next">Coloured</mark> are tokens in runs of three or more that the chunk has in common
with [N, F]; <mark class="prompt">grey</mark> is the prompt.</p>'''
