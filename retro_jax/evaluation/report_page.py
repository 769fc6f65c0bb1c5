"""One HTML file in which a person reads chunks beside the neighbours that were used for them.

Which sequences are shown, and their bits, is the caller's choice; finding what was copied is
done here. How a page is made, and that no text can act in it, is html_page.py's business.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from retro_jax.data.vocabulary import PAD_ID, Vocabulary
from retro_jax.evaluation import html_page, report
from retro_jax.evaluation.html_page import text
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
  html_page.write(path, title, '\n'.join([
      html_page.facts({'database': database, **(settings or {})}), _numbers(results or {}),
      _EXPLANATION.format(shortest=SHORTEST_COPY), *sections]))


def _section(number: int, chunks: Sequence[PageChunk], vocabulary: Vocabulary) -> str:
  """One sequence: every pair of consecutive chunks of a document."""
  pairs = [_pair(u, chunk, following, vocabulary)
           for u, (chunk, following) in enumerate(zip(chunks, chunks[1:]), start=1)
           if chunk.document == following.document]
  titles = list(dict.fromkeys(chunk.title for chunk in chunks))
  shown = ', '.join(titles[:3]) + (f' and {len(titles) - 3} more' if len(titles) > 3 else '')
  return (f'<details class="sequence"{" open" if number == 1 else ""}><summary>Sequence {number}: '
          f'{text(shown)}{_verdict(chunks[1:])}</summary>'
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
        f'<div class="row neighbor"><h4>Neighbour {place}: {text(neighbor.title)} '
        f'<small>distance {neighbor.distance:.3f}</small></h4>'
        + _cell('N', neighbor.tokens[:m], in_neighbor[:m], vocabulary)
        + _cell('F, its continuation', neighbor.tokens[m:], in_neighbor[m:], vocabulary) + '</div>')
  if not rows:
    rows.append('<p class="none">No neighbour was allowed; nothing was read.</p>')
  real = following.tokens != PAD_ID
  share = 100 * used[real].mean() if real.any() else 0
  heading = (f'Chunk {u + 1}, which read the neighbours, {share:.0f} % of its tokens also in '
             'these neighbours')
  return (f'<article><h3>{text(chunk.title)}: chunks {u} and {u + 1}{_verdict([following])}</h3>'
          '<div class="row query">'
          + _cell(f'Chunk {u}, which asked', chunk.tokens, np.zeros(m, bool), vocabulary)
          + _cell(heading, following.tokens, used, vocabulary)
          + '</div>' + ''.join(rows) + '</article>')


def _cell(heading: str, tokens: np.ndarray, marked: np.ndarray, vocabulary: Vocabulary) -> str:
  """Text of some tokens, those marked (bool [n]) highlighted."""
  return html_page.cell(heading, tokens, np.where(marked, 'next', ''), vocabulary)


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
    rows.append((line.model, line.label, f'{line.bits_per_byte:.4f}', interval, to_off))
  if not rows:
    return ''
  sentences = ''.join(f'<p>{text(sentence)}.</p>' for sentence in report.gain_sentences(results))
  header = ('model', 'setting', 'bits per byte', '95 % interval', 'to OFF')
  return html_page.table(header, rows, left=2) + sentences


_EXPLANATION = '''<p>RETRO cuts text into chunks. Each chunk asks the database for similar chunks
N, which come with their continuation F, and the next chunk reads them. Below, every chunk stands
beside the one that followed it, and each neighbour N under the chunk that asked, its F under the
chunk that read. <mark>Marked</mark> text is a run of {shortest} or more tokens that the reading
chunk and a neighbour share.</p>'''
