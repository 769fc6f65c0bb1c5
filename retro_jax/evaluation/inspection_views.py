"""Inspected chunks for a person: as text for a terminal, and as a page.

What they have in common with their neighbours was found in inspection.py. In neither view can
a text of a document act: both pass it through visible.py.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retro_jax.data.vocabulary import Vocabulary
from retro_jax.evaluation import html_page
from retro_jax.evaluation.html_page import text
from retro_jax.evaluation.inspection import (
  SHORTEST_RUN,
  InspectedChunk,
  InspectedNeighbor,
  Shared,
  kinds_of_chunks,
  kinds_of_neighbor,
)
from retro_jax.evaluation.visible import visible

# Select Graphic Rendition (ECMA-48): colours of the background with black on them, underlined.
_STYLES = {'asked': '30;46', 'next': '30;43', 'both': '30;42', 'begins': '4', 'prompt': '2'}
_TITLE = 'Chunks and the neighbours they retrieved'


def terminal(chunks: Sequence[InspectedChunk], vocabulary: Vocabulary, color: bool) -> str:
  """The chunks one below the other.

  Args:
    chunks: to show.
    vocabulary: of their tokens.
    color: whether what was copied is coloured; otherwise it stands on lines of its own.
  """
  painted = paint if color else lambda line, styles: line
  lines = []
  if color:
    lines.append('colours: ' + ', '.join((
        painted('common with the chunk', ('asked',)), painted('with the next chunk', ('next',)),
        painted('with both', ('both',)), painted('begins alike', ('begins',)))))
  for chunk in chunks:
    kinds, following_kinds = kinds_of_chunks(chunk)
    lines += ['', painted(visible(f'== {_heading(chunk)}'), ('bold',)),
              'chunk, which asked:', body(chunk.tokens, kinds, vocabulary, painted),
              'next chunk, which reads the neighbours:',
              body(chunk.following, following_kinds, vocabulary, painted)]
    for neighbor in chunk.neighbors:
      m = len(chunk.tokens)
      kinds = kinds_of_neighbor(neighbor)
      lines += [painted(visible(f'-- {_neighbor_heading(neighbor)}'), ('bold',)),
                f'common with the chunk: {_shared(neighbor.asked, m)}; with the next chunk: '
                f'{_shared(neighbor.next, m)}']
      if not color:
        lines += _quoted(neighbor, vocabulary)
      lines += ['N:', body(neighbor.tokens[:m], kinds[:m], vocabulary, painted),
                'F, its continuation:',
                body(neighbor.tokens[m:], kinds[m:], vocabulary, painted)]
  return '\n'.join(lines).lstrip('\n') + '\n'


def paint(line: str, styles: Sequence[str]) -> str:
  """The line in a terminal's colours."""
  codes = ';'.join(_STYLES.get(style, '1') for style in styles)
  return f'\x1b[{codes}m{line}\x1b[0m'


def body(tokens: np.ndarray, kinds: np.ndarray, vocabulary: Vocabulary, paint: Any) -> str:
  """Text of tokens, indented; each line is coloured for itself, so that the margin is not."""
  pieces = []
  for part, kind in html_page.marked(tokens, kinds, vocabulary):
    rows = visible(part).split('\n')
    pieces.append('\n'.join(paint(row, kind.split()) if kind and row else row for row in rows))
  body = ''.join(pieces) or f'({html_page.no_text(tokens)})'
  return '  ' + body.replace('\n', '\n  ')


def _quoted(neighbor: InspectedNeighbor, vocabulary: Vocabulary) -> list[str]:
  """The longest common runs on lines of their own."""
  lines = []
  for name, shared in (('the chunk', neighbor.asked), ('the next chunk', neighbor.next)):
    if shared.run >= SHORTEST_RUN:
      run = neighbor.tokens[shared.at:shared.at + shared.run]
      lines.append(visible(f'longest run common with {name}: '
                           f'{vocabulary.decode(run.tolist())!r}'))
  return lines


def _heading(chunk: InspectedChunk) -> str:
  owner = chunk.title + (f' ({chunk.document})' if chunk.document else '')
  flags = ''.join(f' [{flag}]' for flag in chunk.flags)
  return f'{owner}: {chunk.where}{flags}'


def _neighbor_heading(neighbor: InspectedNeighbor, flags: bool = True) -> str:
  said = ''.join(f' [{flag}]' for flag in neighbor.flags) if flags else ''
  return (f'neighbour {neighbor.place}, distance {neighbor.distance:.4f}: {neighbor.title} '
          f'({neighbor.document}), chunk {neighbor.number} of {neighbor.of}{said}')


def _shared(shared: Shared, m: int) -> str:
  return f'begins with {shared.prefix} equal, longest run {shared.run} ({shared.run / m:.2f} m)'


def page(path: str | os.PathLike, chunks: Sequence[InspectedChunk], vocabulary: Vocabulary,
         facts: Mapping[str, Any]) -> None:
  """Writes the page.

  Args:
    path: of the HTML file.
    chunks: to show.
    vocabulary: of their tokens.
    facts: names and values that stand above them.
  """
  html_page.write(path, _TITLE, '\n'.join([
      html_page.facts(facts), _EXPLANATION.format(shortest=SHORTEST_RUN),
      *(_article(chunk, vocabulary) for chunk in chunks)]))


def _article(chunk: InspectedChunk, vocabulary: Vocabulary) -> str:
  m = len(chunk.tokens)
  kinds, following_kinds = kinds_of_chunks(chunk)
  owner = chunk.title + (f' ({chunk.document})' if chunk.document else '')
  rows = [
      f'<article><h3>{text(owner)} <small>{text(chunk.where)}</small>{_flags(chunk.flags)}</h3>',
      '<div class="row query">',
      html_page.cell('Chunk, which asked', chunk.tokens, kinds, vocabulary),
      html_page.cell('Next chunk, which reads the neighbours', chunk.following, following_kinds,
                     vocabulary), '</div>']
  for neighbor in chunk.neighbors:
    kinds = kinds_of_neighbor(neighbor)
    rows += [
        f'<div class="row neighbor"><h4>{text(_neighbor_heading(neighbor, flags=False))}'
        f'{_flags(neighbor.flags)}</h4>',
        html_page.cell(f'N; common with the chunk: {_shared(neighbor.asked, m)}',
                       neighbor.tokens[:m], kinds[:m], vocabulary),
        html_page.cell(f'F; common with the next chunk: {_shared(neighbor.next, m)}',
                       neighbor.tokens[m:], kinds[m:], vocabulary), '</div>']
  return ''.join(rows) + '</article>'


def _flags(flags: Sequence[str]) -> str:
  return ''.join(f'<span class="flag">{text(flag)}</span>' for flag in flags)


_EXPLANATION = '''<p>Each chunk asked for the neighbours N below it; every N comes with its
continuation F in its document, and the model reads both while it predicts the next chunk.
Coloured is the longest run of tokens that [N, F] has in common
<mark class="asked">with the chunk</mark>, <mark class="next">with the next chunk</mark> or
<mark class="both">with both</mark>; <mark class="begins">underlined</mark> is how far N begins as
the chunk does, and F as the next chunk does. Runs of fewer than {shortest} tokens are not
shown.</p>'''
