"""Curves of evaluations: overlap, k, share of the database, and the losses of training.

They are drawn from `results.json` as evaluate.py writes it; nothing is measured here.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from retro_jax import storage
from retro_jax.evaluation import report

Results = Mapping[str, Any]
_FURTHER_COLORS = ('#0072b2', '#009e73', '#cc79a7', '#d55e00', '#000000')
_STYLES = ('-', '--', ':', '-.')


def draw(path: str | os.PathLike, named: Mapping[str, Results],
         runs: Mapping[str, report.Rows]) -> list[str]:
  """Writes a PNG of the curves there is material for; returns their titles.

  Args:
    path: of the PNG; not written when there is no curve.
    named: results by the name that a person shall see.
    runs: rows of training metrics by name.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  there = lambda has: any(map(has, named.values()))
  drawn = [(title, draw_one) for title, draw_one, wanted in (
      ('bits per byte where the overlap is at most α', _alpha, there(_has_alpha)),
      ('what ON gains there', _alpha_gains, there(_has_gains)),
      ('neighbours read, k', _neighbors, there(neighbor_rows)),
      ('share of the database', _fractions, there(fraction_rows)),
      ('training loss', lambda axis, _: report.draw_losses(axis, runs), any(runs.values())),
  ) if wanted]
  if not drawn:
    return []
  columns = min(3, len(drawn))
  lines = -(-len(drawn) // columns)
  figure = Figure(figsize=(5.2 * columns, 4.3 * lines), dpi=120, layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots(lines, columns, squeeze=False).ravel()
  for axis, (title, draw_one) in zip(axes, drawn):
    draw_one(axis, named)
    axis.set_title(title, loc='left', fontweight='bold', fontsize=10.5)
    axis.grid(color='#e5e5e5', linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ('top', 'right'):
      axis.spines[side].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
      axis.legend(frameon=False, fontsize=8)
  for axis in axes[len(drawn):]:
    axis.set_axis_off()
  with storage.atomic_file(path, 'wb') as f:
    figure.savefig(f, format='png', facecolor='white')
  return [title for title, _ in drawn]


def neighbor_rows(results: Results) -> list[Mapping[str, Any]]:
  """Rows of the sweep over k, by k, of all sources together."""
  rows = [row for row in results.get('rows', ()) if row.get('sweep') == 'neighbors'
          and row['source'] == _whole(results)]
  return sorted(rows, key=lambda row: row['k'])


def fraction_rows(results: Results) -> list[Mapping[str, Any]]:
  """Rows over shares of the database, ON with the whole as the last; [] without a share."""
  rows = [row for row in results.get('rows', ())
          if row.get('sweep') == 'database' and row['source'] == _whole(results)
          and row.get('database_fraction', 1) < 1]
  if not rows:
    return []
  whole = [row for row in results['rows'] if row['setting'] == 'retro_on'
           and row['source'] == _whole(results)]
  return sorted(rows, key=lambda row: row['database_fraction']) + whole


def _whole(results: Results) -> Any:
  """The `source` of rows over all documents: that of the first row."""
  return results['rows'][0]['source']


def _has_alpha(results: Results) -> bool:
  return bool(results.get('leakage', {}).get('rows'))


def _has_gains(results: Results) -> bool:
  return bool(results.get('leakage', {}).get('gains'))


def _color(setting: str, number: int) -> str:
  return report.COLORS.get(setting, _FURTHER_COLORS[number % len(_FURTHER_COLORS)])


def _label(name: str, what: str, named: Mapping[str, Results]) -> str:
  return f'{name}: {what}' if len(named) > 1 else what


def _curve(axis: Any, x: Sequence[float], rows: Sequence[Mapping[str, Any]], keys: tuple[str, ...],
           scale: float = 1.0, **style: Any) -> None:
  """A line through `keys[0]` of the rows, and the interval from keys[1] to keys[2] as bars."""
  y, low, high = ([scale * row[key] for row in rows] for key in keys)
  axis.errorbar(x, y, yerr=[[max(b - a, 0) for a, b in zip(low, y)],
                            [max(b - a, 0) for a, b in zip(y, high)]],
                marker='o', markersize=4, linewidth=1.8, elinewidth=0.9, capsize=2, **style)


# Paired by document: bits per byte differ more from text to text than from setting to setting.
_GAIN = ('gain', 'gain_low', 'gain_high')


def _paired(row: Mapping[str, Any]) -> Mapping[str, Any]:
  """A row with its gain over RETRO[OFF]; nothing is gained where nothing is read."""
  return row if 'gain' in row else {**row, **dict.fromkeys(_GAIN, 0.0)}


def _alpha(axis: Any, named: Mapping[str, Results]) -> None:
  for i, (name, results) in enumerate(named.items()):
    rows = results.get('leakage', {}).get('rows', ())
    for j, setting in enumerate(dict.fromkeys(row['setting'] for row in rows)):
      mine = [row for row in rows if row['setting'] == setting]
      _curve(axis, [100 * row['alpha'] for row in mine], mine, ('bits_per_byte', 'low', 'high'),
             color=_color(setting, j), linestyle=_STYLES[i % len(_STYLES)],
             label=_label(name, report.LABELS.get(setting, setting), named))
  axis.set_xlabel('α: overlap with the nearest neighbours at most, %')
  axis.set_ylabel('bits per byte')


def _alpha_gains(axis: Any, named: Mapping[str, Results]) -> None:
  for i, (name, results) in enumerate(named.items()):
    gains = results.get('leakage', {}).get('gains', ())
    for j, over in enumerate(dict.fromkeys(gain['over'] for gain in gains)):
      mine = [gain for gain in gains if gain['over'] == over]
      _curve(axis, [100 * gain['alpha'] for gain in mine], mine, ('gain', 'low', 'high'), 100,
             color=_color(over, j), linestyle=_STYLES[i % len(_STYLES)],
             label=_label(name, f'over {report.LABELS.get(over, over)}', named))
  axis.axhline(0, color='black', linewidth=0.8)
  axis.set_xlabel('α: overlap with the nearest neighbours at most, %')
  axis.set_ylabel('RETRO[ON] needs fewer bits by, %')


def _neighbors(axis: Any, named: Mapping[str, Results]) -> None:
  ticks = sorted({row['k'] for results in named.values() for row in neighbor_rows(results)})
  for i, (name, results) in enumerate(named.items()):
    if rows := neighbor_rows(results):
      _curve(axis, [ticks.index(row['k']) for row in rows], [_paired(row) for row in rows],
             _GAIN, 100, color=_FURTHER_COLORS[i % len(_FURTHER_COLORS)],
             label=name if len(named) > 1 else None)
  axis.set_xticks(range(len(ticks)), [str(k) for k in ticks])
  axis.set_xlabel('neighbours read of each chunk; 0 is RETRO[OFF]')
  axis.set_ylabel('fewer bits than RETRO[OFF], %')


def _fractions(axis: Any, named: Mapping[str, Results]) -> None:
  for i, (name, results) in enumerate(named.items()):
    if rows := fraction_rows(results):
      _curve(axis, [100 * row['database_fraction'] for row in rows],
             [_paired(row) for row in rows], _GAIN, 100,
             color=_FURTHER_COLORS[i % len(_FURTHER_COLORS)],
             label=name if len(named) > 1 else None)
  axis.set_xscale('log')
  ticks = sorted({100 * row['database_fraction'] for results in named.values()
                  for row in fraction_rows(results)})
  axis.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
  axis.minorticks_off()
  axis.set_xlabel('documents of the database that may be retrieved, %')
  axis.set_ylabel('fewer bits than RETRO[OFF], %')
