"""The page over evaluations: what it says of numbers made by hand; hostile names stay text."""

import json

import pytest

from retro_jax import configuration
from retro_jax.errors import UserError
from retro_jax.evaluation import evaluation_report
from retro_jax.evaluation.html_page import text
from tests.evaluation import hostile
from tools.evaluation_report import EvaluationReportJob, run


def row(setting, bits, **more):
  return {'setting': setting, 'source': 'held', 'bits_per_byte': bits, 'low': bits - 0.1,
          'high': bits + 0.1, 'bytes': 1000, 'tokens': 300, 'documents': 9, **more}


def results(on=0.8, **more):
  bits = {'baseline': 1.0, 'retro_off': 1.01, 'retro_on': on}
  gain = {'gain': 1 - on, 'low': 0.9 - on, 'high': 1.1 - on}
  return {
      'command': 'python -m retro_jax.evaluate', 'bits_per_byte': bits,
      'gains': {'over_baseline': gain, 'over_retro_off': gain},
      'rows': [row(name, value) for name, value in bits.items()], **more}


def written(folder, named):
  for name, body in named.items():
    (folder / name).mkdir(parents=True)
    (folder / name / 'results.json').write_text(json.dumps(body))
  return {name: str(folder / name) for name in named}


def holds(body):
  return {check.claim: check.holds for check in evaluation_report.expectations(body)}


def test_expectations_follow_the_numbers():
  found = holds(results())
  assert found['ON below the baseline'] == 'yes' and found['OFF about the baseline'] == 'yes'
  assert found['better up to 3 to 10 neighbours'] == 'not run'
  assert holds(results(0.95))['ON below the baseline'] == 'unclear'
  assert holds(results(1.2))['ON below the baseline'] == 'no'
  parts = {'N and F': 0.8, 'F only': 0.85, 'N only': 0.9, 'neither': 1.01}
  body = results()
  body['bits_per_byte'] |= parts
  assert holds(body)['[N, F] < F only < N only < none'] == 'yes'
  body['bits_per_byte']['N only'] = 0.7
  assert holds(body)['[N, F] < F only < N only < none'] == 'no'
  body = results()
  body['rows'] += [row(f'k={k}', bits, sweep='neighbors', k=k)
                   for k, bits in ((0, 1.01), (1, 0.9), (2, 0.8), (5, 0.7), (10, 0.75))]
  assert holds(body)['better up to 3 to 10 neighbours'] == 'yes'
  body['rows'] += [row(f'f{f}', bits, sweep='database', database_fraction=f, k=2)
                   for f, bits in ((0.01, 0.99), (0.1, 0.9))]
  body['rows'][2] |= {'database_fraction': 1.0, 'k': 2}
  assert holds(body)['better with every larger share of the database'] == 'yes'
  body['rows'][2]['bits_per_byte'] = 0.95
  assert holds(body)['better with every larger share of the database'] == 'no'


def leakage():
  alphas = (0.125, 0.5, 1.0)
  return {'neighbors': 10, 'mean_overlap': 0.3, 'tokens': {'in_retrieved': {
      'tokens': 10, 'bits_per_token': {'retro_off': 3.0, 'retro_on': 1.0},
      'gains': [{'over': 'retro_off', 'gain': 0.66, 'low': 0.6, 'high': 0.7}]}},
          'rows': [{**row(name, 1 - alpha / 4), 'alpha': alpha, 'chunks': 5}
                   for name in ('baseline', 'retro_on') for alpha in alphas],
          'gains': [{'alpha': alpha, 'over': 'baseline', 'gain': alpha / 4, 'low': alpha / 8,
                     'high': alpha / 2} for alpha in alphas]}


def test_the_command_writes_page_picture_and_numbers(tmp_path, capsys):
  name = hostile.ATTACKS[1]
  body = results(leakage=leakage(), left_out=[f'k=40: {name}'], words={
      'words': 1234, 'perplexity': {'retro_on': 21.5}})
  folders = written(tmp_path, {'one': body, 'two': results(1.2)})
  configuration.main(EvaluationReportJob, run, argv=[
      '--gin_file=gin/runs/evaluation_report.gin', f'--gin.REPORT={tmp_path}/report',
      f'--gin.RESULTS={folders}'])
  assert 'report.html' in capsys.readouterr().out
  page = (tmp_path / 'report' / 'report.html').read_text()
  assert name not in page and text(name) in page
  assert 'Perplexity of 1,234 words' in page and '12.5 %' in page
  assert (tmp_path / 'report' / 'report.png').read_bytes().startswith(b'\x89PNG')
  numbers = json.loads((tmp_path / 'report' / 'report.json').read_text())
  assert [check['holds'] for check in numbers['expectations']['one']][-2:] == ['yes', 'yes']
  assert len(numbers['curves']) == 2 and numbers['left_out']['one'] == body['left_out']


@pytest.mark.parametrize('content, why', [
    (None, 'no results of an evaluation'), ('{', 'cannot be read'),
    ('{"rows": []}', 'no results of an evaluation')])
def test_folders_without_results_are_named(tmp_path, content, why):
  if content is not None:
    (tmp_path / 'results.json').write_text(content)
  with pytest.raises(UserError, match=why) as error:
    evaluation_report.write(tmp_path / 'report', {'x': tmp_path})
  assert str(tmp_path) in str(error.value)
