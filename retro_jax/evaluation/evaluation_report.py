"""One page over any number of evaluations: their numbers beside what the paper leads to expect.

It reads `results.json` of evaluate.py or of the quickstart and `metrics.jsonl` of the runs
they name; nothing is measured here. Curves are drawn in evaluation_picture.py.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro_jax import storage
from retro_jax.errors import UserError
from retro_jax.evaluation import evaluation_picture, html_page, report
from retro_jax.evaluation.evaluation_picture import Results, fraction_rows, neighbor_rows
from retro_jax.evaluation.html_page import text
from retro_jax.evaluation.results import RESULTS
from retro_jax.training.metrics import read_metrics

PAGE, PICTURE, NUMBERS = 'report.html', 'report.png', 'report.json'
_TOKEN_KINDS = {'in_retrieved': 'occurs in what is read there',
                'not_in_retrieved': 'does not occur in it',
                'nothing_retrieved': 'nothing to read yet'}


@dataclasses.dataclass(frozen=True)
class Expectation:
  """One claim of the paper beside what was found.

  Attributes:
    claim: what is expected.
    paper: the paper's numbers.
    found: ours, or why there is none.
    holds: 'yes', 'no', 'unclear' where an interval includes the limit, or 'not run'.
  """
  claim: str
  paper: str
  found: str
  holds: str


def load(folders: Mapping[str, str | os.PathLike]) -> dict[str, Results]:
  """`results.json` of each folder, by name.

  Raises:
    UserError: there is none, or not one of an evaluation.
  """
  result = {}
  for name, folder in folders.items():
    path = Path(folder) / RESULTS if Path(folder).is_dir() else Path(folder)
    try:
      found = storage.read_json(path, None)
    except (ValueError, OSError) as error:
      raise UserError(f'{path}: cannot be read ({error}); evaluate again') from None
    if not isinstance(found, dict) or not found.get('rows') or 'bits_per_byte' not in found:
      raise UserError(f'{path}: no results of an evaluation there; run retro_jax.evaluate first')
    result[name] = found
  return result


def write(folder: str | os.PathLike, folders: Mapping[str, str | os.PathLike],
          runs: Mapping[str, str | os.PathLike] = {}) -> Path:
  """Writes `report.html`, `report.png` and `report.json`; returns the page.

  Args:
    folder: for the three.
    folders: those with a `results.json`, by the name a person shall see.
    runs: folders of training runs whose losses are drawn, by name.

  Raises:
    UserError: no results there, or a run without metrics.
  """
  named = load(folders)
  metrics = {name: read_metrics(run) for name, run in runs.items()}
  for name, rows in metrics.items():
    if not rows:
      raise UserError(f'{runs[name]}: no metrics of a run there; name the folder of a run')
  folder = Path(folder)
  drawn = evaluation_picture.draw(folder / PICTURE, named, metrics)
  checks = {name: expectations(results) for name, results in named.items()}
  storage.write_json(folder / NUMBERS, {
      'results': {name: str(folders[name]) for name in named}, 'runs': dict(runs), 'curves': drawn,
      'expectations': {name: [dataclasses.asdict(check) for check in found]
                       for name, found in checks.items()},
      'left_out': {name: results.get('left_out', []) for name, results in named.items()},
      'bits_per_byte': {name: results['bits_per_byte'] for name, results in named.items()}})
  parts = []
  if drawn:
    parts.append(html_page.picture(folder / PICTURE, 'curves: ' + '; '.join(drawn)))
  for name, results in named.items():
    parts += [f'<h2>{text(name)}</h2>', *_section(results, checks[name])]
  html_page.write(folder / PAGE, 'What retrieval gains', '\n'.join(parts))
  return folder / PAGE


def expectations(results: Results) -> list[Expectation]:
  """What the paper leads to expect of a small RETRO, and whether it is so."""
  gains = results.get('gains', {})
  bits = results['bits_per_byte']
  made = [
      _gain('ON below the baseline', 'C4 0.98 to 0.82 with 1.75T tokens; 0.98 to 0.97 with 4B',
            gains.get('over_baseline')),
      _gain('ON below random neighbours', 'not in the paper; random is to be about OFF',
            gains.get('over_retro_random')),
      _gain('ON below the neighbours of other chunks', 'not in the paper',
            gains.get('over_shuffled'))]
  if 'baseline' in bits and 'retro_off' in bits:
    apart = bits['retro_off'] / bits['baseline'] - 1
    made.append(Expectation('OFF about the baseline', 'within 2.6 % of perplexity',
                            f'OFF {100 * apart:+.2f} % bits', 'yes' if abs(apart) < 0.03 else 'no'))
  else:
    made.append(_not_run('OFF about the baseline', 'within 2.6 % of perplexity', 'no baseline'))
  claim, paper = '[N, F] < F only < N only < none', 'share of the gain: N 22 %, F 56 %'
  order = [bits.get(name) for name in ('N and F', 'F only', 'N only', 'neither')]
  if None in order:
    made.append(_not_run(claim, paper, 'halves of neighbours were not scored'))
  else:
    made.append(Expectation(claim, paper, ' < '.join(f'{value:.4f}' for value in order)
                            if order == sorted(order) else ', '.join(f'{v:.4f}' for v in order),
                            'yes' if order == sorted(order) else 'no'))
  made += [_by_k(results), _by_fraction(results), *_by_overlap(results)]
  return made


def _not_run(claim: str, paper: str, why: str) -> Expectation:
  return Expectation(claim, paper, why, 'not run')


def _gain(claim: str, paper: str, gain: Mapping[str, float] | None) -> Expectation:
  if gain is None:
    return _not_run(claim, paper, 'that setting was not scored')
  found = (f'{100 * gain["gain"]:.2f} % fewer bits (95 %: {100 * gain["low"]:.2f} to '
           f'{100 * gain["high"]:.2f})')
  return Expectation(claim, paper, found, 'yes' if gain['low'] > 0 else
                     'no' if gain['high'] < 0 else 'unclear')


def _by_k(results: Results) -> Expectation:
  claim, paper = 'better up to 3 to 10 neighbours', 'C4 at 172M: 0.84, 0.83, 0.82 for 1, 2, 3'
  rows = [row for row in neighbor_rows(results) if row['k']]
  if len(rows) < 2:
    return _not_run(claim, paper, 'k was not swept')
  best = min(rows, key=lambda row: row['bits_per_byte'])
  return Expectation(claim, paper, f'best at k = {best["k"]} of '
                     f'{", ".join(str(row["k"]) for row in rows)}: {best["bits_per_byte"]:.4f}',
                     'yes' if 3 <= best['k'] <= 10 else 'no')


def _by_fraction(results: Results) -> Expectation:
  claim = 'better with every larger share of the database'
  paper = 'C4 at 172M: 0.97 with 4B tokens, 0.82 with 1.75T'
  rows = fraction_rows(results)
  if not rows:
    return _not_run(claim, paper, 'no share of the database was scored')
  values = [row['bits_per_byte'] for row in rows]
  found = ', '.join(f'{100 * row["database_fraction"]:g} %: {row["bits_per_byte"]:.4f}'
                    for row in rows)
  return Expectation(claim, paper, found,
                     'yes' if values == sorted(values, reverse=True) else 'no')


def _by_overlap(results: Results) -> list[Expectation]:
  claims = (('ON below the baseline where the overlap is at most 12.5 %', 'holds at every α'),
            ('ON falls faster with overlap than the baseline', 'steeper slope'))
  leakage = results.get('leakage', {})
  base = 'baseline' if 'baseline' in results['bits_per_byte'] else 'retro_off'
  gains = [gain for gain in leakage.get('gains', ()) if gain['over'] == base]
  if not gains:
    return [_not_run(*claim, 'overlap was not measured') for claim in claims]
  compared = '' if base == 'baseline' else ' (of OFF: no baseline)'
  least, most = gains[0], gains[-1]
  small = _gain(claims[0][0] + compared, claims[0][1], least)
  found = (f'gain {100 * least["gain"]:.2f} % at {100 * least["alpha"]:g} %, '
           f'{100 * most["gain"]:.2f} % at {100 * most["alpha"]:g} %')
  return [small, Expectation(claims[1][0] + compared, claims[1][1], found,
                             'yes' if most['gain'] > least['gain'] else 'no')]


def _section(results: Results, checks: list[Expectation]) -> list[str]:
  parts = [html_page.facts(_settings(results))]
  parts += ['<h3>Beside the paper</h3>', '<div class="prose">' + html_page.table(
      ('expected', 'holds', 'found', 'paper'),
      [(c.claim, c.holds, c.found, c.paper) for c in checks], left=4) + '</div>']
  rows = [(report.LABELS.get(row['setting'], row['setting']), _source(row), row.get('k', ''),
           f'{row["bits_per_byte"]:.4f}', f'{row["low"]:.4f} to {row["high"]:.4f}',
           _percents(row, 'gain', 'gain_low', 'gain_high'), f'{row["bytes"]:,}',
           f'{row.get("documents", ""):,}') for row in results['rows']]
  parts += ['<h3>Bits per byte</h3>', html_page.table(
      ('setting', 'text', 'k', 'bits per byte', '95 % interval', 'fewer bits than OFF', 'bytes',
       'documents'), rows, left=2)]
  if words := results.get('words'):
    parts += [f'<h3>Perplexity of {words["words"]:,} words</h3>', html_page.table(
        ('setting', 'perplexity'), [(report.LABELS.get(name, name), f'{value:.2f}')
                                    for name, value in words['perplexity'].items()])]
  if leakage := results.get('leakage'):
    parts += _leakage(leakage)
  parts.append('<h3>Not run</h3>')
  missing = [*results.get('left_out', ()), *(
      f'{check.claim}: {check.found}' for check in checks if check.holds == 'not run')]
  parts.append('<ul>' + ''.join(f'<li>{text(line)}</li>' for line in missing) + '</ul>'
               if missing else '<p>Nothing was left out.</p>')
  return parts


def _source(row: Mapping[str, Any]) -> str:
  return Path(str(row.get('source', ''))).name


def _percents(row: Mapping[str, Any], *keys: str) -> str:
  if keys[0] not in row:
    return ''
  gain, low, high = (100 * row[key] for key in keys)
  return f'{gain:.2f} % ({low:.2f} to {high:.2f})'


def _leakage(leakage: Mapping[str, Any]) -> list[str]:
  rows = [(f'{100 * row["alpha"]:g} %', report.LABELS.get(row['setting'], row['setting']),
           f'{row["bits_per_byte"]:.4f}', f'{row["low"]:.4f} to {row["high"]:.4f}',
           f'{row["chunks"]:,}', f'{row["bytes"]:,}') for row in leakage['rows']]
  gains = [(f'{100 * gain["alpha"]:g} %', report.LABELS.get(gain['over'], gain['over']),
            _percents(gain, 'gain', 'low', 'high')) for gain in leakage['gains']]
  settings = list(next(iter(leakage['tokens'].values()), {'bits_per_token': {}})['bits_per_token'])
  tokens = []
  for kind, facts in leakage['tokens'].items():
    over_off = [gain for gain in facts['gains'] if gain['over'] == 'retro_off']
    tokens.append((_TOKEN_KINDS[kind], f'{facts["tokens"]:,}',
                   *(f'{facts["bits_per_token"][name]:.3f}' for name in settings),
                   *(_percents(gain, 'gain', 'low', 'high') for gain in over_off)))
  return [
      f'<h3>Overlap with the {leakage["neighbors"]} nearest neighbours of each chunk: '
      f'{100 * leakage["mean_overlap"]:.1f} % on average</h3>',
      html_page.table(('overlap at most', 'setting', 'bits per byte', '95 % interval', 'chunks',
                       'bytes'), rows, left=2),
      '<h4>What ON gains there</h4>',
      html_page.table(('overlap at most', 'over', 'fewer bits (95 %, paired)'), gains, left=2),
      '<h4>Bits a token, by whether the token occurs in the neighbours read there</h4>',
      html_page.table(('token', 'tokens', *(report.LABELS.get(s, s) for s in settings),
                       'ON over OFF'), tokens)]


def _settings(results: Results) -> dict[str, Any]:
  """Settings and fingerprints, and whether the text could be in the database."""
  prints, examples = results.get('fingerprints', {}), results.get('examples', {})
  facts = {'command': results.get('command', '')}
  if protocol := results.get('protocol'):
    facts['windows'] = (f'{protocol["window"]} tokens, stride {protocol["stride"]}, inside of '
                        f'{protocol["documents"]:,} whole documents')
  for key, value in (('queries', prints.get('queries')), ('database', prints.get('database'))):
    if isinstance(value, Mapping):
      facts[key] = f'{value.get("folder")} ({value.get("fingerprint")})'
  if isinstance(prints.get('vocabulary'), Mapping):
    facts['vocabulary'] = prints['vocabulary'].get('fingerprint')
  for name, value in prints.get('models', {}).items():
    facts[f'weights of {name}'] = value
  if examples:
    facts['chunks'] = f'm = {examples["chunk_length"]}, n = {examples["sequence_length"]}'
    index = examples.get('index') or {}
    recall = index.get('recall') or {}
    facts['index'] = ', '.join(f'{key} {value}' for key, value in (
        ('', index.get('kind')), ('recall', recall.get('recall'))) if value is not None).strip()
    facts['policy'] = ', '.join(f'{key} {value}' for key, value in examples['policy'].items()
                                if value and key not in ('counts', 'deny_list'))
  facts['is the text in the database?'] = _in_database(results.get('in_database'))
  if gate := results.get('gate'):
    facts['gate'] = 'passed' if gate['passed'] else gate['why']
  return facts


def _in_database(found: Mapping[str, Any] | None) -> str:
  if not found:
    return 'not looked up'
  parts = []
  if 'evaluated_documents_in_it' in found:
    parts.append(f'{found["evaluated_documents_in_it"]:,} evaluated documents are among the '
                 f'{found["database_documents"]:,} of the database by their id '
                 f'({found["database_tokens"]:,} tokens)')
  parts.append('a document\'s own chunks are '
               + ('never retrieved' if found['exclude_query_documents'] else 'ALLOWED'))
  near = found['near_duplicate_documents'] or found['near_duplicate_chunks']
  parts.append('near-duplicates are removed' if near else
               'near-duplicates under other ids are not removed: see the overlap')
  return '; '.join(parts)
