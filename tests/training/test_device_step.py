"""benchmarks/device_step.py on the CPUs of the tests: its numbers and the table of its profile."""

import json
import re
import sys

import pytest

from benchmarks import device_step

SETTINGS = ['--gin_file=gin/models/retro_smoke.gin', '--gin_file=gin/models/rotary.gin',
            '--gin_file=gin/machines/gpu.gin', '--gin.BATCH_SIZE=8', '--gin.SEQUENCE_LENGTH=64']


def run(monkeypatch, *arguments):
  monkeypatch.setattr(sys, 'argv', ['device_step.py', *SETTINGS, '--rounds=1', '--steps=1',
                                    *arguments])
  device_step.main()


def test_measures_and_says_where_the_time_goes(tmp_path, monkeypatch, capsys):
  deeper = 'RetroConfig.encoder_layers=2;RetroConfig.remat=full'
  run(monkeypatch, f'--variant={deeper}', f'--output={tmp_path}/out.json',
      f'--profile={tmp_path}/profile')
  said = capsys.readouterr().out
  contenders = json.loads((tmp_path / 'out.json').read_text())['contenders']
  retro, baseline = contenders['RETRO'], contenders['baseline']
  assert list(contenders) == ['RETRO', 'baseline', f'RETRO, {deeper}']
  assert retro['tokens_per_second'] == pytest.approx(8 * 64 / retro['seconds_per_step'][0])
  assert retro['losses'][-1] < retro['losses'][0]
  # From gin/models/retro_smoke.gin: more FLOPs with neighbours, and with a second layer for them.
  assert (baseline['model_flops_per_step'] < retro['model_flops_per_step']
          < contenders[f'RETRO, {deeper}']['model_flops_per_step'])
  assert re.search(r'^RETRO over baseline: time [\d.]+, model FLOPs [\d.]+: [\d.]+$', said, re.M)
  rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line}
  assert {'attention', 'cca', 'encoder', 'ffw', 'loss', 'optimizer'} <= set(rows)
  whole = float(rows['sum'][-1])
  assert whole == pytest.approx(sum(float(rows[part][-2]) for part in (
      *device_step.PARTS,) if part in rows), abs=0.1) and whole > 0


def test_unknown_contender(monkeypatch, capsys):
  with pytest.raises(SystemExit):
    run(monkeypatch, '--only', 'RETR0')
  assert "no contender 'RETR0', only RETRO, baseline" in capsys.readouterr().err
