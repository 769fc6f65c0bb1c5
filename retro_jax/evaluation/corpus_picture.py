"""Pictures of a corpus report: what the store holds, and what its neighbours are worth.

Both draw numbers of corpus_report.py as they stand in its JSON; nothing is measured here.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from retro_jax import storage
from retro_jax.evaluation import potential

# Okabe and Ito's colours, which colour-blind readers tell apart; also by lightness.
_COLORS = {'nearest': '#0072b2', 'random': '#e69f00'}
_INK = '#7f7f7f'


def corpus_picture(path: str | os.PathLike, corpus: Mapping[str, Any]) -> None:
  """A PNG of two histograms: tokens of chunks and of documents."""
  figure, (chunks, documents) = _figure(1, 2)
  lengths = np.asarray(corpus['chunk_lengths'])
  chunks.bar(np.arange(len(lengths)), lengths, width=1, color=_COLORS['nearest'])
  # Nearly all chunks are full; on a plain scale the others would not be seen.
  chunks.set_yscale('symlog', linthresh=1)
  _label(chunks, 'tokens of a chunk', 'tokens', 'chunks')
  histogram = corpus['document_lengths']
  edges, counts = np.asarray(histogram['edges']), np.asarray(histogram['counts'])
  if len(counts) and counts.any():
    seen = slice(int(np.flatnonzero(counts)[0]), None)
    documents.bar(np.arange(len(counts))[seen] + 0.5, counts[seen], width=0.94,
                  color=_COLORS['nearest'])
    ticks = np.arange(len(edges))[seen]
    step = max(1, len(ticks) // 8)
    documents.set_xticks(ticks[::step], [f'{edge:,}' for edge in edges[ticks[::step]]])
  _label(documents, 'tokens of a document', 'tokens', 'documents')
  _save(figure, path)


def neighbors_picture(path: str | os.PathLike, facts: Mapping[str, Any]) -> None:
  """A PNG of distances, of overlap with the nearest neighbour, and of what could be gained."""
  figure, axes = _figure(2, 3)
  _draw_distances(axes[0], facts)
  _draw_distances_by_rank(axes[1], facts)
  _draw_overlap(axes[2], facts['near_duplicates'])
  for axis, measure in zip(axes[3:], potential.MEASURES):
    _draw_potential(axis, facts['potential'], measure)
  _save(figure, path)


def _draw_distances(axis: Any, facts: Mapping[str, Any]) -> None:
  distances = facts['distances']
  edges = np.asarray(distances['edges'])
  shown = {'random': distances['random']['counts']} if any(
      distances['random']['counts']) else {}
  ranks = list(distances['by_rank'])
  shown |= {f'rank {rank}': distances['by_rank'][rank]['counts']
            for rank in dict.fromkeys((ranks[0], ranks[-1]))}
  colors = {'random': _COLORS['random'], f'rank {ranks[0]}': _COLORS['nearest']}
  for name, counts in shown.items():
    share = np.asarray(counts) / max(sum(counts), 1)
    axis.stairs(share, edges, fill=name == 'random', alpha=0.35 if name == 'random' else 1,
                color=colors.get(name, '#56b4e9'), linewidth=2, label=name)
  _label(axis, 'distance of neighbours', facts['distance'], 'share of neighbours')
  axis.legend(frameon=False)


def _draw_distances_by_rank(axis: Any, facts: Mapping[str, Any]) -> None:
  distances = facts['distances']
  rows = [(int(rank), row['percentiles']) for rank, row in distances['by_rank'].items()
          if row['percentiles']]
  if rows:
    ranks = [rank for rank, _ in rows]
    for low, high, alpha in (('5', '95', 0.15), ('25', '75', 0.3)):
      axis.fill_between(ranks, [p[low] for _, p in rows], [p[high] for _, p in rows],
                        color=_COLORS['nearest'], alpha=alpha, linewidth=0)
    axis.plot(ranks, [p['50'] for _, p in rows], color=_COLORS['nearest'], marker='o',
              markersize=4, label='median; bands: 25 to 75, 5 to 95 %')
    axis.set_xticks(ranks)
  if random := distances['random']['percentiles']:
    axis.axhline(random['50'], color=_COLORS['random'], linestyle='--', label='random, median')
  if distances['edges'][0] == 0:
    axis.set_ylim(bottom=0)
  _label(axis, 'distance by rank', 'rank of the neighbour', facts['distance'])
  if axis.get_legend_handles_labels()[0]:
    axis.legend(frameon=False, loc='lower right')


def _draw_overlap(axis: Any, overlap: Mapping[str, Any]) -> None:
  counts = np.asarray(overlap['counts'])
  axis.stairs(counts / max(counts.sum(), 1), overlap['edges'], fill=True,
              color=_COLORS['nearest'])
  axis.axvline(overlap['threshold'], color=_INK, linestyle=':', linewidth=2,
               label=f'near-duplicate above: {100 * overlap["share"]:.1f} %')
  axis.set_yscale('log')
  axis.set_xlim(0, 1)
  _label(axis, 'overlap with the nearest of another document', 'longest common run / m',
         'share of chunks')
  axis.legend(framealpha=1, edgecolor='white')


def _draw_potential(axis: Any, gain: Mapping[str, Any], measure: str) -> None:
  names = {'tokens': 'tokens of the next chunk found', 'bigrams': 'bigrams of the next chunk found',
           'longest span': 'longest span of the next chunk found, / m'}
  rows = [row for row in gain['rows'] if row['measure'] == measure]
  for part, style in (('NF', '-'), ('N', ':')):
    for kind in potential.KINDS:
      line = [row for row in rows if row['part'] == part]
      if not line:
        continue
      ks = [row['k'] for row in line]
      value = [100 * row[kind] for row in line]
      axis.plot(ks, value, style, color=_COLORS[kind], marker='o', markersize=4,
                label=f'{kind}, {"[N, F]" if part == "NF" else "N alone"}')
      if part == 'NF':
        axis.fill_between(ks, [100 * row[f'{kind}_low'] for row in line],
                          [100 * row[f'{kind}_high'] for row in line],
                          color=_COLORS[kind], alpha=0.2, linewidth=0)
  axis.set_ylim(bottom=0)
  axis.set_xticks(gain['ks'])
  _label(axis, names[measure], 'neighbours k', 'percent')
  if axis.get_legend_handles_labels()[0]:
    axis.legend(frameon=False, fontsize='small')


def _figure(rows: int, columns: int) -> tuple[Any, list[Any]]:
  # The object interface: no global backend, no window system.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  figure = Figure(figsize=(4.9 * columns, 3.7 * rows), dpi=110, layout='constrained')
  FigureCanvasAgg(figure)
  return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def _label(axis: Any, title: str, x: str, y: str) -> None:
  axis.set_title(title, loc='left', fontweight='bold', fontsize='medium')
  axis.set_xlabel(x)
  axis.set_ylabel(y)
  axis.grid(color='#e5e5e5', linewidth=0.8)
  axis.set_axisbelow(True)
  for side in ('top', 'right'):
    axis.spines[side].set_visible(False)


def _save(figure: Any, path: str | os.PathLike) -> None:
  with storage.atomic_file(path, 'wb') as f:
    figure.savefig(f, format='png', facecolor='white')
