"""Configuration: what resolves, and every way of being wrong ends in one line and exit code 2."""

import dataclasses

import pytest

from retro_jax import configuration
from retro_jax.errors import EXIT_CODE, UserError
from retro_jax.models.config import RetroConfig
from retro_jax.train import CONFIGURABLES
from retro_jax.training.loop import TrainJob

GIN = """
WIDTH = 64
RUN_DIR = %gin.REQUIRED
TrainJob.run_dir = %RUN_DIR
TrainJob.model = @RetroConfig()
TrainJob.data = @DataConfig()
RetroConfig.d_model = %WIDTH
RetroConfig.num_heads = 2
DataConfig.train = {'examples': 1.0}
"""


@pytest.fixture
def resolve(tmp_path):
  def run(*arguments, text=GIN):
    file = tmp_path / 'job.gin'
    file.write_text(text)
    line = configuration.parse_arguments([f'--gin_file={file}', *arguments])
    return configuration.resolve(TrainJob, CONFIGURABLES, line)
  return run


def test_files_macros_and_command_line_compose(resolve):
  job = resolve('--gin.RUN_DIR=runs/a', '--gin.RetroConfig.num_layers=15', '--gin.WIDTH=32')
  assert (job.run_dir, job.model.d_model, job.model.num_layers, job.model.num_heads) == (
      'runs/a', 32, 15, 2)
  assert type(job.model) is RetroConfig
  assert dataclasses.asdict(job)['data']['train'] == {'examples': 1.0}


def test_plain_strings_need_no_quotes_and_quoted_ones_keep_working(resolve):
  assert resolve('--gin.RUN_DIR=runs/a b').run_dir == 'runs/a b'
  assert resolve('--gin.RUN_DIR="x"').run_dir == 'x'
  assert resolve('--gin.RUN_DIR=').run_dir == ''


@pytest.mark.parametrize('arguments, words', [
    ((), ['RUN_DIR', 'required', '--gin.RUN_DIR=']),
    (('--gin.RUN_DIR=x', '--gin.WIDHT=3'), ['WIDHT', "did you mean 'WIDTH'"]),
    (('--gin.RUN_DIR=x', '--gin.RetroConfig.d_modle=3'), ['d_modle', "did you mean 'd_model'"]),
    (('--gin.RUN_DIR=x', '--gin.RetroConfg.d_model=3'),
     ['RetroConfg', "did you mean 'RetroConfig'"]),
    (('--gin.RUN_DIR=x', '--gin.OptimizerConfig.beta1=0.5'),
     ['OptimizerConfig.beta1', 'no OptimizerConfig']),
    (('--gin.RUN_DIR=x', '--gin.RetroConfig.num_layers=3'), ['cca_layers', '1 to 3']),
    (('--gin.RUN_DIR=x', '--gin.RetroConfig.dtype=float8'), ['dtype', 'bfloat16']),
])
def test_wrong_settings_are_refused(resolve, arguments, words):
  with pytest.raises(UserError) as error:
    resolve(*arguments)
  assert all(word in str(error.value) for word in words) and '\n' not in str(error.value)


@pytest.mark.parametrize('text, words', [
    (GIN + 'UNUSED = 3\n', ['UNUSED', 'nothing uses it']),
    (GIN.replace('%WIDTH', '%WIDHT'), ['WIDTH']),
    (GIN + 'RetroConfig.vocab_size = (\n', []),
    ("include 'nowhere.gin'\n", ['nowhere.gin']),
])
def test_wrong_files_are_refused(resolve, text, words):
  with pytest.raises(UserError) as error:
    resolve('--gin.RUN_DIR=x', text=text)
  assert all(word in str(error.value) for word in words) and '\n' not in str(error.value)


def test_a_missing_file_and_an_unknown_flag_are_refused():
  with pytest.raises(UserError, match='nowhere.gin: no such gin file'):
    configuration.resolve(TrainJob, CONFIGURABLES,
                          configuration.parse_arguments(['--gin_file=nowhere.gin']))
  with pytest.raises(UserError, match="did you mean '--gin_file'"):
    configuration.parse_arguments(['--ginfile=x'])


def test_main_prints_one_line_and_exits_with_the_documented_code(capsys):
  def fail(job):
    raise AssertionError('must not run')
  with pytest.raises(SystemExit) as stop:
    configuration.main(TrainJob, fail, CONFIGURABLES, ['--gin_file=nowhere.gin'])
  assert stop.value.code == EXIT_CODE == 2
  assert capsys.readouterr().err == 'error: nowhere.gin: no such gin file; look in gin/\n'


def test_dry_run_prints_the_resolved_configuration_and_stops(tmp_path, capsys):
  file = tmp_path / 'job.gin'
  file.write_text(GIN)
  configuration.main(TrainJob, lambda job: pytest.fail('must not run'), CONFIGURABLES,
                     [f'--gin_file={file}', '--gin.RUN_DIR=runs/a', '--dry_run'])
  printed = capsys.readouterr().out
  assert "run_dir = 'runs/a'" in printed and 'd_model = 64' in printed
  assert 'peak_learning_rate' in printed
