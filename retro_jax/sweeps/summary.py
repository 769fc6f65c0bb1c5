"""What a sweep found: `sweep.json`, a table (`sweep.md`) and a picture (`sweep.png`).

Reads what the runs left and measures nothing. The laws are scaling.py's.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax import storage
from retro_jax.evaluation import results
from retro_jax.evaluation.report import LABELS
from retro_jax.sweeps import scaling
from retro_jax.sweeps.plan import Planned
from retro_jax.sweeps.scaling import Law
from retro_jax.sweeps.sweep_file import Sweep

JSON, TABLE, PICTURE = 'sweep.json', 'sweep.md', 'sweep.png'
# Rows of metrics by what they are called in results, for each kind of model.
_SCORES = {'baseline': {'valid_off': 'baseline'},
           'retro': {'valid_off': 'retro_off', 'valid_on': 'retro_on',
                     'valid_random': 'retro_random'}}
# The colours of the other pictures (evaluation/report.py), and a shape that tells them apart too.
_STYLES = {'baseline': ('#7f7f7f', 's', '--'), 'retro_off': ('#56b4e9', 'v', ':'),
           'retro_on': ('#0072b2', 'o', '-')}
_X = {'non_embedding': ('non-embedding parameters', 'N'),
      'training_flops': ('training FLOPs (matrix products)', 'C')}


def collect(sweep: Sweep, planned: Sequence[Planned], failed: Mapping[str, str] | None = None
            ) -> dict[str, Any]:
  """The results of a sweep as they stand, finished or not.

  Args:
    failed: reasons by name of run.

  Raises:
    UserError: a folder that holds another model than the sweep says.
  """
  runs = []
  for run in planned:
    run.check_model()
    rows = run.rows()
    finished = run.is_finished(rows)
    runs.append({
        'name': run.name, 'labels': dict(run.run.labels), 'kind': run.kind,
        'folder': str(run.folder), 'state': _state(run, rows, finished, failed or {}),
        'finished': finished, 'step': int(rows[-1]['step']) if rows else 0, 'steps': run.steps,
        'batch_size': run.job.training.batch_size, **run.parameters, 'positions': run.positions,
        'training_flops': run.flops, 'bits_per_byte': _scores(run, rows)})
  return {'command': results.command(), 'sweep': sweep.path, 'about': sweep.about,
          'curves': list(sweep.curves), 'runs': runs, 'laws': _laws(runs, sweep.curves)}


def write(folder: str | os.PathLike, found: Mapping[str, Any]) -> list[Path]:
  """Writes the three files; without any score there is no picture."""
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  paths = [folder / JSON, folder / TABLE]
  storage.write_json(paths[0], found)
  picture_path = folder / PICTURE
  drawn = bool(_points(found['runs'], 'non_embedding', found['curves']))
  with storage.atomic_file(paths[1]) as f:
    f.write('\n\n'.join([f'# {Path(found["sweep"]).stem}', *filter(None, [found['about']]),
                         table(found), *_paragraphs(found),
                         *([f'![]({PICTURE})'] if drawn else [])]) + '\n')
  if drawn:
    picture(picture_path, found)
    paths.append(picture_path)
  return paths


def text(found: Mapping[str, Any]) -> str:
  """The table and the laws, for a terminal."""
  return '\n\n'.join([table(found), *_paragraphs(found)])


def table(found: Mapping[str, Any]) -> str:
  """One row a run, as Markdown that reads well unrendered."""
  runs = found['runs']
  columns: list[tuple[str, list[str]]] = [('run', [run['name'] for run in runs])]
  columns.append(('non-embedding', [_count(run['non_embedding']) for run in runs]))
  columns.append(('all parameters', [_count(_all_parameters(run)) for run in runs]))
  columns.append(('steps', [f'{run["steps"]:,}' for run in runs]))
  for name, title in (('positions', 'tokens'), ('training_flops', 'FLOPs')):
    if any(run[name] for run in runs):
      columns.append((title, [_count(run[name]) for run in runs]))
  for setting in LABELS:
    values = [run['bits_per_byte'].get(setting) for run in runs]
    if any(value is not None for value in values):
      columns.append((LABELS[setting], ['' if v is None else f'{v:.4f}' for v in values]))
  columns.append(('state', [run['state'] for run in runs]))
  return markdown(columns)


def markdown(columns: Sequence[tuple[str, Sequence[str]]]) -> str:
  """Columns of text as an aligned Markdown table; the first and the last to the left."""
  lines = [[] for _ in range(len(columns[0][1]) + 2)]
  for i, (title, cells) in enumerate(columns):
    cells = [cell.replace('|', '/') for cell in cells]
    width = max(len(cell) for cell in (title, *cells, '---'))
    left = i in (0, len(columns) - 1)
    rule = '-' * width if left else '-' * (width - 1) + ':'
    for line, cell in zip(lines, (title, rule, *cells)):
      line.append(cell.ljust(width) if left else cell.rjust(width))
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def picture(path: str | os.PathLike, found: Mapping[str, Any]) -> None:
  """A PNG: bits-per-byte against parameters and, where known, against training FLOPs."""
  # The object interface: no global backend, no window system.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  panels = [x for x in _X if _points(found['runs'], x, found['curves'])]
  figure = Figure(figsize=(6.4 * len(panels), 5.4), dpi=130, layout='constrained')
  FigureCanvasAgg(figure)
  axes = list(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0])
  for axis, x in zip(axes, panels):
    _draw(axis, found, x)
  axes[0].set_ylabel('bits per byte of the validation examples')
  unfinished = sum(not run['finished'] for run in found['runs'])
  left = f'; {unfinished} of {len(found["runs"])} runs not finished' if unfinished else ''
  figure.suptitle(f'{Path(found["sweep"]).stem}: a point a run, lower is better{left}', x=0.01,
                  ha='left', fontweight='bold')
  with storage.atomic_file(path, 'wb') as f:
    figure.savefig(f, format='png', facecolor='white')


def _draw(axis: Any, found: Mapping[str, Any], x: str) -> None:
  from matplotlib.ticker import FuncFormatter, NullFormatter
  laws = {(law['x'], law['series']): law for law in found['laws']}
  series = _points(found['runs'], x, found['curves'])
  curves = list(dict.fromkeys(curve for _, curve in series))
  for (setting, curve), points in series.items():
    color, marker, line = _STYLES[setting]
    # More curves of one setting differ by lightness.
    alpha = 1 - 0.6 * curves.index(curve) / max(len(curves), 1)
    name = _series_name(setting, curve)
    law = laws.get((x, name))
    label = name
    if law and law['determined']:
      fitted = Law(**law['law'])
      span = np.geomspace(points[:, 0].min(), points[:, 0].max(), 100)
      axis.plot(span, fitted(span), line, color=color, alpha=alpha, linewidth=1.8)
      label += ': ' + _formula(fitted, _X[x][1])
    axis.plot(points[:, 0], points[:, 1], marker, color=color, alpha=alpha, markersize=7,
              label=label)
  axis.set_xscale('log')
  # Sweeps are often narrower than a decade: label the places between as well.
  low, high = axis.get_xlim()
  axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
  axis.xaxis.set_minor_formatter(
      FuncFormatter(lambda value, _: _count(value) if _leading(value) in (2, 5) else '')
      if high / low < 100 else NullFormatter())
  axis.tick_params(axis='x', which='both', length=4, pad=4)
  axis.set_xlabel(_X[x][0])
  axis.grid(color='#e5e5e5', linewidth=0.8)
  axis.set_axisbelow(True)
  for side in ('top', 'right'):
    axis.spines[side].set_visible(False)
  # Below the axes: curves that fall leave no corner free for sure.
  axis.legend(frameon=False, loc='upper left', bbox_to_anchor=(0, -0.13), fontsize=9)


def _state(run: Planned, rows: Sequence[Mapping[str, float]], finished: bool,
           failed: Mapping[str, str]) -> str:
  if finished:
    return 'finished'
  at = f'step {rows[-1]["step"]:,}' if rows else 'not started'
  return f'failed at {at}' if run.name in failed else at


def _scores(run: Planned, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Of the last step only: an earlier score is of another model."""
  for row in rows:
    if row['step'] == run.steps and 'valid_off' in row:
      return {name: float(row[key]) for key, name in _SCORES[run.kind].items() if key in row}
  return {}


def _points(runs: Sequence[Mapping[str, Any]], x: str, curves: Sequence[str]
            ) -> dict[tuple[str, str], np.ndarray]:
  """(x, bits-per-byte) of finished runs by setting and curve, by rising x."""
  points: dict[tuple[str, str], list[tuple[float, float]]] = {}
  for setting in _STYLES:
    for run in runs:
      if run['finished'] and run[x] and setting in run['bits_per_byte']:
        curve = ', '.join(run['labels'][axis] for axis in curves)
        points.setdefault((setting, curve), []).append(
            (float(run[x]), run['bits_per_byte'][setting]))
  return {key: np.array(sorted(values)) for key, values in points.items()}


def _laws(runs: Sequence[Mapping[str, Any]], curves: Sequence[str]) -> list[dict[str, Any]]:
  result = []
  for x in _X:
    for (setting, curve), points in _points(runs, x, curves).items():
      if law := scaling.fit(points[:, 0], points[:, 1]):
        result.append({'x': x, 'series': _series_name(setting, curve),
                       'determined': law.determined, 'law': dataclasses.asdict(law)})
  return result


def _paragraphs(found: Mapping[str, Any]) -> list[str]:
  """Laws in words, and how far to trust them."""
  lines = [law_sentence(law['series'], Law(**law['law']), law['x']) for law in found['laws']]
  if not lines:
    return []
  mixed = len({law['law']['has_offset'] for law in found['laws']}) > 1
  return ['Fitted by least squares:', '\n'.join(f'* {line}' for line in lines),
          'Ranges are the 5th to 95th percentile over refits with noise of the size of the '
          'residuals. They take the law for granted, know nothing of other seeds or data than '
          'those run, and say nothing beyond the sizes run.'
          + (' Exponents of laws with and without an offset do not compare.' if mixed else '')]


def law_sentence(name: str, law: Law, x: str) -> str:
  """A law with its uncertainty, or why there is none."""
  count = f'{law.points} points of {law.sizes} sizes'
  if not law.determined:
    return f'{name}, by {_X[x][0]}: {count} that determine no power law'
  told = f'{name}, by {_X[x][0]}: {_formula(law, _X[x][1])}; {count}'
  if law.spread is None:
    return told + '; as many numbers fitted as points, so nothing tells how sure they are'
  ranges = ', '.join(f'{key} {low:.2g} to {high:.2g}' for key, (low, high) in law.spread.items())
  unit = 'bits per byte' if law.has_offset else 'in the logarithm'
  few = (f'only {law.freedom} degree{"s" if law.freedom > 1 else ""} of freedom, take the ranges '
         'as orders of magnitude') if law.freedom < 4 else f'{law.freedom} degrees of freedom'
  if law.has_offset and law.spread['offset'][0] < 1e-9:
    ranges += ' (the points do not tell offset and exponent apart)'
  return f'{told}; {ranges}; residuals {law.deviation:.2g} {unit}; {few}'


def _formula(law: Law, symbol: str) -> str:
  offset = f'{law.offset:.3f} + ' if law.has_offset else ''
  return f'{offset}{law.scale:.3f} ({symbol} / {_count(law.reference)})^-{law.exponent:.3f}'


def _series_name(setting: str, curve: str) -> str:
  return LABELS[setting] + (f', {curve}' if curve else '')


def _all_parameters(run: Mapping[str, Any]) -> int:
  return sum(run[key] for key in ('non_embedding', 'vectors', 'embedding', 'encoder_embedding'))


def _leading(value: float) -> int:
  return int(f'{value:.0e}'[0])


def _count(value: float | None) -> str:
  """'1.45 B', '132 M', '2.1e+15' for what is beyond words."""
  if not value:
    return ''
  for unit, size in (('', 1), (' k', 1e3), (' M', 1e6), (' B', 1e9), (' T', 1e12)):
    if value < 999.5 * size:
      return f'{value / size:.3g}{unit}'
  return f'{value:.2e}'
