"""A public checkpoint, a database in its own tokens, a RETROfit; OFF stays the import exactly."""

import jax
import numpy as np

from retro_jax import configuration
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.generation import decode
from retro_jax.models import retro
from retro_jax.train import CONFIGURABLES
from retro_jax.training import checkpoints, loop, metrics
from retro_jax.training.public_checkpoints import MODEL_GIN
from tests import public_models, tiny_models, worlds
from tools import import_checkpoint


def test_from_a_public_checkpoint_to_a_retrofit(tmp_path):
  public_models.write_folder(tmp_path / 'public', public_models.LLAMA_3)
  imported = tmp_path / 'imported'
  configuration_of = lambda job, known, *arguments: configuration.resolve(
      job, known, configuration.parse_arguments(list(arguments)))
  import_checkpoint.run(configuration_of(
      import_checkpoint.ImportJob, (), '--gin_file=gin/runs/import.gin',
      f'--gin.SOURCE={tmp_path}/public', f'--gin.OUTPUT={imported}'))

  vocabulary = Vocabulary.load(imported / checkpoints.VOCABULARY)
  database, _ = worlds.examples(tmp_path / 'data', worlds.documents(0, 16, longest=40),
                                tokenizer=vocabulary)
  assert database.vocabulary_fingerprint == vocabulary.fingerprint

  job = configuration_of(
      loop.TrainJob, CONFIGURABLES, f'--gin_file={imported}/{MODEL_GIN}',
      '--gin_file=gin/models/retrofit.gin', '--gin_file=gin/runs/pretrain.gin',
      '--gin_file=gin/runs/retrofit.gin', f'--gin.RUN_DIR={tmp_path}/run',
      f"--gin.TRAIN_DATA={{'{tmp_path}/data/examples': 1.0}}", f'--gin.BASELINE={imported}',
      '--gin.CCA_LAYERS=(2,)', '--gin.CHUNK_LENGTH=8', '--gin.ENCODER_WIDTH=16',
      '--gin.ENCODER_HEADS=1', '--gin.RetroConfig.encoder_head_dim=16', '--gin.BATCH_SIZE=8',
      '--gin.TRAIN_STEPS=4', '--gin.PEAK_LEARNING_RATE=0.02', '--gin.TrainingConfig.log_every=1',
      '--gin.OptimizerConfig.warmup_steps=1')
  loop.train(job)
  rows = metrics.read_metrics(job.run_dir)
  assert len(rows) == 4 and rows[-1]['loss'] < rows[0]['loss']

  theirs, before, _ = checkpoints.load_model(imported)
  model, after, facts = checkpoints.load_model(job.run_dir)
  assert facts['fingerprint'] == vocabulary.fingerprint and model.cca_layers == (2,)
  for name in ('embedding.table', 'decoder.norm.scale'):
    np.testing.assert_array_equal(after[name], before[name])
  batch = tiny_models.batch(model, np.random.default_rng(0), size=1, chunks=2)
  # The original with the model's chunk length, which means nothing to it.
  theirs = checkpoints.dataclasses.replace(theirs, chunk_length=8, retrieved_length=0)
  with jax.disable_jit():
    off = retro.apply(model, after, batch.tokens, batch.segments, None)
    np.testing.assert_array_equal(
        off, retro.apply(theirs, before, batch.tokens, batch.segments, None))

  written = decode.generate(model, after, vocabulary, None, 'def return', 6, seed=1)
  assert written.chunks[0].tokens[0] == vocabulary.bos_id
  assert written.tokens and all(vocabulary.token_bytes[i] > 0 for i in written.tokens)
