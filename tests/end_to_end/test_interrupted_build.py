"""benchmarks/interrupted_build.py on a small corpus: kills at random moments change no byte."""

import random

from benchmarks import interrupted_build
from tests import worlds


def test_a_build_killed_at_random_ends_with_the_same_bytes(tmp_path, capsys):
  (tmp_path / 'in').mkdir()
  for i in range(3):
    worlds.write_source(tmp_path / 'in' / f'{i}.jsonl',
                        worlds.documents(i, 40, longest=300, prefix=f'{i}'))
  settings = [
      f'--gin.TRAIN={tmp_path}/in/*.jsonl', f'--gin.VOCABULARY={worlds.vocabulary().path}',
      '--gin.CHUNK_LENGTH=16', '--gin.SEQUENCE_LENGTH=64', '--gin.NUM_NEIGHBORS=2',
      '--gin.DatabaseConfig.chunks_per_shard=150', '--gin.ExamplesConfig.examples_per_shard=20',
      '--gin.IndexConfig.vectors_per_part=400']
  assert interrupted_build.compare(tmp_path / 'runs', settings, kills=4, seed=random.randrange(99),
                                   ways=('one process', 'two processes'))
  said = capsys.readouterr().out
  assert said.count('the same bytes') == 3 and 'killed 4 times' in said
