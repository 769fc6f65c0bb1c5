"""A public checkpoint as a folder of ours: python tools/import_checkpoint.py
--gin_file=gin/runs/import.gin --gin.SOURCE=... --gin.OUTPUT=... .

The folder holds model.safetensors, model.json, the vocabulary, model.gin and a manifest with
checksums; every tool that takes a run folder takes it too, and a RETROfit can begin with it
(docs/retrofit.md).
"""

import dataclasses

from retro_jax import configuration
from retro_jax.training.public_checkpoints import import_model


@dataclasses.dataclass(frozen=True)
class ImportJob:
  """What to import.

  Attributes:
    source: folder with config.json, tokenizer.json and model.safetensors or its shards.
    output: folder to write.
  """
  source: str
  output: str


def run(job: ImportJob) -> None:
  model = import_model(job.source, job.output)
  print(f'import: wrote {job.output}, {model.num_layers} layers of width {model.d_model}')


if __name__ == '__main__':
  configuration.main(ImportJob, run)
