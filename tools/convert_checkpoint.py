"""A run's newest checkpoint as a small folder to hand on: python tools/convert_checkpoint.py
--gin_file=gin/runs/export.gin --gin.RUN_DIR=... --gin.VOCABULARY=... --gin.OUTPUT=... .

The folder holds model.safetensors, model.json, the vocabulary and a manifest with checksums;
every tool that takes a run folder takes it too.
"""

import dataclasses

from retro_jax import configuration
from retro_jax.training.checkpoints import export_model


@dataclasses.dataclass(frozen=True)
class ExportJob:
  """What to export.

  Attributes:
    run_dir: of the training run.
    vocabulary: SentencePiece model of its training.
    output: folder to write.
    dtype: of the stored values, 'float32' or 'float16'.
    note: how it was trained and on what hardware, kept in the manifest.
  """
  run_dir: str
  vocabulary: str
  output: str
  dtype: str = 'float32'
  note: str = ''


def run(job: ExportJob) -> None:
  export_model(job.run_dir, job.vocabulary, job.output,
               {'trained': job.note, 'dtype': job.dtype}, job.dtype)
  print(f'export: wrote {job.output}')


if __name__ == '__main__':
  configuration.main(ExportJob, run)
