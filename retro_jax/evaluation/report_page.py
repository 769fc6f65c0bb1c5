"""One HTML file in which a person reads chunks beside the neighbours that were used for them.

The file needs nothing else: no script, no network, and a policy in its head that forbids
both. Every text in it is escaped. Which sequences are shown, and their bits, is the
caller's choice; finding what was copied is done here.
"""

import dataclasses
import html
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from retro_jax import storage
from retro_jax.data.vocabulary import PAD_ID, Vocabulary
from retro_jax.evaluation import report
from retro_jax.retrieval.database import ChunkDatabase

# Shorter common runs of tokens are chance (spaces, brackets, frequent words).
SHORTEST_COPY = 3


@dataclasses.dataclass(frozen=True)
class PageNeighbor:
  """Attributes: tokens int32 [r] (N then F), squared `distance`, `title` of the document."""
  tokens: np.ndarray
  distance: float
  title: str


@dataclasses.dataclass(frozen=True)
class PageChunk:
  """One chunk of a sequence.

  Attributes:
    tokens: int32 [m].
    document: equal for chunks of one document.
    title: of the document.
    neighbors: RET of this chunk, nearest first; the next chunk reads them.
    text_bytes: UTF-8 bytes it stands for.
    bits_off, bits_on: that the model needs for this chunk's tokens without and with
      neighbours; None where not measured.
  """
  tokens: np.ndarray
  document: int
  title: str
  neighbors: Sequence[PageNeighbor]
  text_bytes: int = 0
  bits_off: float | None = None
  bits_on: float | None = None


def page_chunks(
    example: Mapping[str, np.ndarray], queries: ChunkDatabase, database: ChunkDatabase,
    num_neighbors: int, bits_off: np.ndarray | None = None, bits_on: np.ndarray | None = None,
) -> list[PageChunk]:
  """One stored sequence as the page wants it.

  Args:
    example: one row of `records.Examples.read`: tokens [n], chunk_ids [l], documents [l],
      text_bytes [l], neighbor_ids and neighbor_distances [l, K], neighbor_tokens [l, K, r].
    queries: the store of the sequence.
    database: the store of the neighbours.
    num_neighbors: how many of the K the model reads.
    bits_off, bits_on: float [l], see `bits_of_chunks`.
  """
  chunk_ids = example['chunk_ids']
  tokens = example['tokens'].reshape(len(chunk_ids), -1)
  chunks = []
  for u in np.flatnonzero(chunk_ids >= 0):
    neighbors = []
    for place, found in enumerate(example['neighbor_ids'][u, :num_neighbors]):
      if found >= 0:
        document = database.document_info(int(database.document(found)))
        neighbors.append(PageNeighbor(example['neighbor_tokens'][u, place],
                                      float(example['neighbor_distances'][u, place]),
                                      document['title'] or document['id']))
    document = queries.document_info(int(example['documents'][u]))
    chunks.append(PageChunk(
        tokens[u], int(example['documents'][u]), document['title'] or document['id'], neighbors,
        int(example['text_bytes'][u]), None if bits_off is None else float(bits_off[u]),
        None if bits_on is None else float(bits_on[u])))
  return chunks


def bits_of_chunks(token_bits: np.ndarray, chunk_length: int) -> np.ndarray:
  """Bits of each chunk's own tokens, float64 [l], from bits of each position's target [n].

  The target of position p is token p+1, so a chunk's first token is paid for at the last
  position of the chunk before, which already reads that chunk's neighbours.
  """
  own = np.concatenate([[0.0], np.asarray(token_bits, np.float64)[:-1]])
  return own.reshape(-1, chunk_length).sum(-1)


def copied(tokens: np.ndarray, source: np.ndarray, shortest: int = SHORTEST_COPY
           ) -> tuple[np.ndarray, np.ndarray]:
  """Which tokens lie in a common run of at least `shortest` tokens; padding never does.

  Args:
    tokens: int [a].
    source: int [b].
    shortest: length of a run that counts.

  Returns:
    bool [a] and bool [b].
  """
  column = np.asarray(tokens)[:, None]
  equal = (column == np.asarray(source)) & (column != PAD_ID)
  in_tokens, in_source = np.zeros(len(tokens), bool), np.zeros(len(source), bool)
  for offset in range(1 - len(tokens), len(source)):
    diagonal = np.concatenate([[False], np.diagonal(equal, offset), [False]]).astype(np.int8)
    starts, ends = np.flatnonzero(np.diff(diagonal) == 1), np.flatnonzero(np.diff(diagonal) == -1)
    for start, end in zip(starts, ends):
      if end - start >= shortest:
        in_tokens[start + max(0, -offset):end + max(0, -offset)] = True
        in_source[start + max(0, offset):end + max(0, offset)] = True
  return in_tokens, in_source


def neighbors_page(
    path: str | os.PathLike, examples: Iterable[Sequence[PageChunk]], vocabulary: Vocabulary,
    *, database: str, settings: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    title: str = 'Chunks beside the neighbours they used') -> None:
  """Writes the page.

  Args:
    path: of the HTML file.
    examples: sequences; pairs of neighbouring chunks of one document are shown.
    vocabulary: of all tokens.
    database: its name.
    settings: shown as name and value.
    results: as in `results.json`; its numbers become a table.
    title: of the page.
  """
  sections = [_section(number, list(chunks), vocabulary)
              for number, chunks in enumerate(examples, start=1)]
  facts = ''.join(f'<dt>{_text(name)}</dt><dd>{_text(value)}</dd>'
                  for name, value in {'database': database, **(settings or {})}.items())
  with storage.atomic_file(path) as f:
    f.write(_PAGE.format(title=_text(title), style=_STYLE, facts=facts,
                         numbers=_numbers(results or {}), shortest=SHORTEST_COPY,
                         sections='\n'.join(sections)))


def _section(number: int, chunks: Sequence[PageChunk], vocabulary: Vocabulary) -> str:
  """One sequence: every pair of consecutive chunks of a document."""
  pairs = [_pair(u, chunk, following, vocabulary)
           for u, (chunk, following) in enumerate(zip(chunks, chunks[1:]), start=1)
           if chunk.document == following.document]
  titles = list(dict.fromkeys(chunk.title for chunk in chunks))
  shown = ', '.join(titles[:3]) + (f' and {len(titles) - 3} more' if len(titles) > 3 else '')
  return (f'<details class="sequence"{" open" if number == 1 else ""}><summary>Sequence {number}: '
          f'{_text(shown)}{_verdict(chunks[1:])}</summary>'
          + ('\n'.join(pairs) or '<p>No two chunks of one document in this sequence.</p>')
          + '</details>')


def _pair(u: int, chunk: PageChunk, following: PageChunk, vocabulary: Vocabulary) -> str:
  """C_u and what followed, with each neighbour below: N under C_u, F under C_{u+1}."""
  m = len(chunk.tokens)
  used = np.zeros(m, bool)
  rows = []
  for place, neighbor in enumerate(chunk.neighbors, start=1):
    in_following, in_neighbor = copied(following.tokens, neighbor.tokens)
    used |= in_following
    rows.append(
        f'<div class="row neighbor"><h4>Neighbour {place}: {_text(neighbor.title)} '
        f'<small>distance {neighbor.distance:.3f}</small></h4>'
        + _cell('N', neighbor.tokens[:m], in_neighbor[:m], vocabulary)
        + _cell('F, its continuation', neighbor.tokens[m:], in_neighbor[m:], vocabulary) + '</div>')
  if not rows:
    rows.append('<p class="none">No neighbour was allowed; nothing was read.</p>')
  real = following.tokens != PAD_ID
  share = 100 * used[real].mean() if real.any() else 0
  heading = (f'Chunk {u + 1}, which read the neighbours, {share:.0f} % of its tokens also in '
             'these neighbours')
  return (f'<article><h3>{_text(chunk.title)}: chunks {u} and {u + 1}{_verdict([following])}</h3>'
          '<div class="row query">'
          + _cell(f'Chunk {u}, which asked', chunk.tokens, np.zeros(m, bool), vocabulary)
          + _cell(heading, following.tokens, used, vocabulary)
          + '</div>' + ''.join(rows) + '</article>')


def _cell(heading: str, tokens: np.ndarray, marked: np.ndarray, vocabulary: Vocabulary) -> str:
  """Text of some tokens, those marked highlighted."""
  body = _marked_text(tokens, marked, vocabulary) or '<i>the document ends here</i>'
  return f'<div class="cell"><h5>{_text(heading)}</h5><div class="text">{body}</div></div>'


def _marked_text(tokens: np.ndarray, marked: np.ndarray, vocabulary: Vocabulary) -> str:
  pieces = []
  edges = np.flatnonzero(np.diff(marked)) + 1
  for part, mark in zip(np.split(np.asarray(tokens), edges), np.split(marked, edges)):
    if text := _text(vocabulary.decode(part.tolist())):
      pieces.append(f'<mark>{text}</mark>' if mark[0] else text)
  return ''.join(pieces)


def _verdict(chunks: Sequence[PageChunk]) -> str:
  """Bits with and without neighbours, over the chunks where both were measured."""
  measured = [c for c in chunks if c.bits_off is not None and c.bits_on is not None]
  off, on = sum(c.bits_off for c in measured), sum(c.bits_on for c in measured)
  if not off:
    return ''
  change = 100 * (on / off - 1)
  size = sum(c.text_bytes for c in measured)
  per_byte = f' ({off / size:.2f} to {on / size:.2f} a byte)' if size else ''
  kind, sign = ('better', '▼') if change < 0 else ('worse', '▲')
  return (f' <span class="bits {kind}">{sign} {change:+.1f} %: {off:.0f} bits OFF, '
          f'{on:.0f} ON{per_byte}</span>')


def _numbers(results: Mapping[str, Any]) -> str:
  rows = []
  for line in report.lines(results):
    interval = f'{line.interval[0]:.4f} to {line.interval[1]:.4f}' if line.interval else ''
    to_off = '' if line.to_off is None else f'{line.to_off:+.2f} %'
    rows.append(f'<tr><td>{_text(line.model)}</td><td>{_text(line.label)}</td>'
                f'<td>{line.bits_per_byte:.4f}</td><td>{interval}</td><td>{to_off}</td></tr>')
  if not rows:
    return ''
  sentences = ''.join(f'<p>{_text(sentence)}.</p>' for sentence in report.gain_sentences(results))
  return ('<div class="scroll"><table><tr><th>model</th><th>setting</th><th>bits per byte</th>'
          '<th>95 % interval</th><th>to OFF</th></tr>' + ''.join(rows)
          + f'</table></div>{sentences}')


# Control characters are no HTML; their pictures (U+2400 and on) are. Line ends and tabs stay.
# Characters that turn the direction of writing would disguise what follows them.
_VISIBLE = ({c: 0x2400 + c for c in range(32) if chr(c) not in '\n\t'} | {127: 0x2421}
            | {c: 0xfffd for c in (*range(128, 160), *range(0x202a, 0x202f),
                                   *range(0x2066, 0x206a))})


def _text(value: Any) -> str:
  """Any value as HTML text that also is safe inside quotes."""
  return html.escape(str(value).translate(_VISIBLE), quote=True)


_STYLE = '''
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: #fff; color: #1b1b1b;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h3 { font-size: 1rem; margin: 0 0 .5rem; }
h4 { font-size: .85rem; margin: .6rem 0 .2rem; grid-column: 1 / -1; overflow-wrap: anywhere; }
h5 { font-size: .75rem; font-weight: 600; color: #555; margin: 0 0 .2rem; }
small { font-weight: 400; color: #555; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0; }
th, td { text-align: right; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd;
  white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
.sequence { margin: 1rem 0; border-top: 2px solid #0072b2; padding-top: .5rem; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
article { margin: 1rem 0 2rem; padding: .8rem; background: #f6f7f8; border-radius: 6px; }
.row { display: grid; grid-template-columns: 1fr 1fr; gap: 0 .6rem; }
.cell { min-width: 0; background: #fff; border: 1px solid #ccd; border-radius: 4px;
  padding: .4rem .5rem; }
.query .cell { border: 2px solid #0072b2; }
.neighbor .cell:last-child { border-style: dashed; background: #fdfbf4; }
.text { font: 12.5px/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; tab-size: 4; unicode-bidi: isolate; }
mark { background: #ffdf80; color: inherit; border-bottom: 1px solid #b07800; }
.bits { font-size: .8rem; font-weight: 600; white-space: normal; }
.better { color: #00569c; } .worse { color: #a24a00; }
.none { color: #555; margin: .6rem 0 0; }
@media (max-width: 44rem) { body { padding: .6rem; } article { padding: .5rem; }
  .row { grid-template-columns: 1fr; gap: .3rem; } }
'''

_PAGE = '''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<dl>{facts}</dl>
{numbers}
<p>RETRO cuts text into chunks. Each chunk asks the database for similar chunks N, which come with
their continuation F, and the next chunk reads them. Below, every chunk stands beside the one that
followed it, and each neighbour N under the chunk that asked, its F under the chunk that read.
<mark>Marked</mark> text is a run of {shortest} or more tokens that the reading chunk and a
neighbour share.</p>
{sections}
</body>
</html>
'''
