"""Results for people: the table at the end of a run and the picture of its curves and bars.

Both read `results.json` (as a dict) and rows of `metrics.jsonl`; nothing is measured here.
The page of chunks beside their neighbours is report_page.py.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retro_jax import storage

Rows = Sequence[Mapping[str, Any]]

LABELS = {'baseline': 'baseline', 'retro_off': 'RETRO[OFF]', 'retro_on': 'RETRO[ON]',
          'retro_random': 'RETRO, random'}
# Okabe and Ito's colours, which colour-blind readers tell apart; also by lightness.
COLORS = {'baseline': '#7f7f7f', 'retro_off': '#56b4e9', 'retro_on': '#0072b2',
           'retro_random': '#e69f00'}
_FURTHER_COLORS = ('#009e73', '#cc79a7', '#d55e00', '#000000')
_RUN_COLORS = {'baseline': COLORS['baseline'], 'retro': COLORS['retro_on']}


@dataclasses.dataclass(frozen=True)
class Line:
  """One setting of one model.

  Attributes:
    model: which model, '' for the one the results are about, else e.g. 'pretrained'.
    setting: key in `bits_per_byte`.
    bits_per_byte: of held-out text.
    interval: 95 %, where it was measured.
    to_off: bits_per_byte relative to the model's retro_off, in percent; negative is better.
  """

  model: str
  setting: str
  bits_per_byte: float
  interval: tuple[float, float] | None
  to_off: float | None

  @property
  def label(self) -> str:
    return LABELS.get(self.setting, self.setting)


def lines(results: Mapping[str, Any]) -> list[Line]:
  """Every number under `bits_per_byte` and `bits_per_byte_<model>`, in that order."""
  result = []
  for key, values in results.items():
    if key != 'bits_per_byte' and not key.startswith('bits_per_byte_'):
      continue
    model = key.removeprefix('bits_per_byte').removeprefix('_')
    off = values.get('retro_off')
    order = [name for name in LABELS if name in values] + [n for n in values if n not in LABELS]
    for setting in order:
      value = float(values[setting])
      to_off = 100 * (value / off - 1) if off and setting != 'retro_off' else None
      result.append(Line(model, setting, value, _interval(results, setting, value), to_off))
  return sorted(result, key=lambda line: line.model)  # stable: the unnamed model first


def _interval(results: Mapping[str, Any], setting: str, value: float) -> tuple[float, float] | None:
  """From the row that measured this very number."""
  for row in results.get('rows', ()):
    if (row.get('setting') == setting and 'low' in row and 'high' in row
        and math.isclose(row['bits_per_byte'], value, rel_tol=1e-9)):
      return float(row['low']), float(row['high'])
  return None


def results_table(results: Mapping[str, Any]) -> str:
  """The numbers as a text table: setting, bits per byte, 95 % interval, difference to OFF."""
  header = ('setting', 'bits per byte', '95 % interval', 'to OFF')
  cells, groups = [header], []
  for line in lines(results):
    interval = f'{line.interval[0]:.4f} to {line.interval[1]:.4f}' if line.interval else ''
    to_off = '' if line.to_off is None else f'{line.to_off:+.2f} %'
    groups.append(line.model)
    cells.append((line.label, f'{line.bits_per_byte:.4f}', interval, to_off))
  first, *others = aligned(cells)
  text = [first, '-' * len(first)]
  for i, row in enumerate(others):
    if groups[i] and groups[i] != (groups[i - 1] if i else ''):
      text.append(f'{groups[i]}:')
    text.append(row)
  if sentences := gain_sentences(results):
    text += ['', *sentences]
  return '\n'.join(text)


def gain_sentences(results: Mapping[str, Any]) -> list[str]:
  """What retrieval gains over OFF and random neighbours, with the paired interval if known."""
  sentences = []
  for key, gains in results.items():
    if key != 'gains' and not key.startswith('gains_'):
      continue
    model = key.removeprefix('gains').removeprefix('_')
    for over in ('retro_off', 'retro_random'):
      if gain := gains.get(f'over_{over}'):
        sentences.append(
            f'{model + ": " if model else ""}RETRO[ON] needs {100 * gain["gain"]:.2f} % fewer bits '
            f'than {LABELS[over]} (95 % interval, paired: {100 * gain["low"]:.2f} to '
            f'{100 * gain["high"]:.2f} %)')
  return sorted(sentences, key=lambda sentence: not sentence.startswith('RETRO'))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """Rows of cells as lines: names on the left, numbers in columns that end together."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  result = []
  for name, *numbers in rows:
    cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:])]
    result.append('  '.join([name.ljust(widths[0]), *cells]).rstrip())
  return result


def loss_picture(path: str | os.PathLike, runs: Mapping[str, Rows],
                 results: Mapping[str, Any]) -> None:
  """A PNG: loss curves; the gain of retrieval while training; bits-per-byte as bars.

  Args:
    path: of the PNG.
    runs: rows of metrics by name of the run ('baseline', 'retro', ...). The middle panel is
      drawn when some have valid_on with valid_off or valid_random.
    results: as in `results.json`.
  """
  # The object interface: no global backend, no window system.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  gains = {label: _gains(rows) for label, rows in runs.items()}
  gains = {label: curves for label, curves in gains.items() if curves}
  bars = lines(results)
  widths = [1.1] + [1.0] * bool(gains) + [1.25] * bool(bars)
  figure = Figure(figsize=(4.9 * sum(widths), 4.8), dpi=130, layout='constrained')
  FigureCanvasAgg(figure)
  axes = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
  draw_losses(axes.pop(0), runs)
  if gains:
    _draw_gains(axes.pop(0), runs, gains)
  if bars:
    _draw_bars(axes.pop(0), bars)
  with storage.atomic_file(path, 'wb') as f:
    figure.savefig(f, format='png', facecolor='white')


def draw_losses(axis: Any, runs: Mapping[str, Rows]) -> None:
  """Training loss of each run on a matplotlib axis."""
  for i, (label, rows) in enumerate(runs.items()):
    rows = [row for row in rows if 'loss' in row]
    if not rows:
      continue
    x = np.array([row['step'] for row in rows]) * _tokens_per_step(runs, label)
    loss = np.array([row['loss'] for row in rows])
    color = _run_color(label, i)
    axis.plot(x, loss, color=color, alpha=0.25, linewidth=0.9)
    smooth = smoothed(loss)
    axis.plot(x, smooth, color=color, linewidth=2, linestyle='--' if label == 'baseline' else '-',
              label=f'{label}: {smooth[-1]:.3f} at the end')
  axis.set_title('training loss', loc='left', fontweight='bold')
  axis.set_ylabel('nats per token')
  _finish(axis, runs)


def _draw_gains(axis: Any, runs: Mapping[str, Rows],
                gains: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]) -> None:
  for i, (label, curves) in enumerate(gains.items()):
    for (over, (steps, gain)), style in zip(curves.items(), ('-', '--')):
      color = COLORS[over] if len(gains) == 1 else _run_color(label, i)
      name = f'over {LABELS[over]}' if len(gains) == 1 else f'{label} over {LABELS[over]}'
      axis.plot(steps * _tokens_per_step(runs, label), gain, style, color=color, marker='o',
                markersize=4, linewidth=2, label=f'{name}: {gain[-1]:+.2f} %')
  axis.axhline(0, color='black', linewidth=0.8)
  axis.set_title('what reading neighbours gains', loc='left', fontweight='bold')
  axis.set_ylabel('RETRO[ON] needs fewer bits by, %')
  _finish(axis, runs)


def _draw_bars(axis: Any, bars: Sequence[Line]) -> None:
  place, ticks, names = 0.0, [], []
  longest = max(line.bits_per_byte for line in bars)
  for i, line in enumerate(bars):
    if i and line.model != bars[i - 1].model:
      place += 0.9
      axis.text(0, place - 0.62, line.model, fontweight='bold', va='center')
    color = COLORS.get(line.setting, _FURTHER_COLORS[i % len(_FURTHER_COLORS)])
    axis.barh(place, line.bits_per_byte, color=color, height=0.72)
    right = line.bits_per_byte
    if line.interval:
      right = max(right, line.interval[1])
      axis.plot(line.interval, [place, place], color='black', linewidth=1.2, marker='|',
                markersize=7)
    text = f'{line.bits_per_byte:.3f}'
    if line.to_off is not None:
      text += f'  ({line.to_off:+.1f} %)'
    axis.text(right + 0.02 * longest, place, text, va='center')
    ticks.append(place)
    names.append(line.label)
    place += 1
  axis.set_yticks(ticks, names)
  axis.tick_params(axis='y', length=0)
  axis.invert_yaxis()
  axis.set_xlim(0, 1.5 * longest)  # from zero: lengths compare as the numbers do
  axis.set_title('held-out text', loc='left', fontweight='bold')
  axis.set_xlabel('bits per byte, lower is better; in brackets: to OFF'
                  + ('; line: 95 % interval' if any(line.interval for line in bars) else ''))
  for side in ('top', 'right', 'left'):
    axis.spines[side].set_visible(False)


def _finish(axis: Any, runs: Mapping[str, Rows]) -> None:
  axis.set_xlabel('step' if _tokens_per_step(runs, None) == 1 else 'million tokens')
  axis.grid(color='#e5e5e5', linewidth=0.8)
  axis.set_axisbelow(True)
  for side in ('top', 'right'):
    axis.spines[side].set_visible(False)
  if axis.get_legend_handles_labels()[0]:
    axis.legend(frameon=False)


def _tokens_per_step(runs: Mapping[str, Rows], label: str | None) -> float:
  """Millions of tokens a step of a run; 1 when some run does not tell, so that x is steps."""
  means = {name: np.mean([row['tokens'] for row in rows if 'tokens' in row] or [0])
           for name, rows in runs.items()}
  if not means or not all(means.values()):
    return 1
  return float(means.get(label, 0)) / 1e6


def _gains(rows: Rows) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """By what ON is compared with: (steps, percent that ON is lower)."""
  result = {}
  for over in ('retro_off', 'retro_random'):
    key = 'valid_' + over.removeprefix('retro_')
    pairs = [(row['step'], 100 * (1 - row['valid_on'] / row[key])) for row in rows
             if 'valid_on' in row and key in row]
    if pairs:
      steps, gain = zip(*pairs)
      result[over] = (np.array(steps, float), np.array(gain))
  return result


def smoothed(values: np.ndarray) -> np.ndarray:
  """Mean over about a twentieth of the values around each; narrower where the curve begins."""
  # Even at the start, where a loss falls steeply; at the end only from before, to stay calm.
  place = np.arange(len(values))
  half = np.minimum(len(values) // 40, place)
  first, last = place - half, np.minimum(place + half, len(values) - 1)
  sums = np.concatenate([[0.0], np.cumsum(values)])
  return (sums[last + 1] - sums[first]) / (last + 1 - first)


def _run_color(label: str, number: int) -> str:
  return _RUN_COLORS.get(label, _FURTHER_COLORS[number % len(_FURTHER_COLORS)])
