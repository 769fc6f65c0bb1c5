"""One set of held-out sequences, scored by the models and in the retrieval settings that matter.

`baseline` (the same decoder trained without retrieval), `retro_off`, `retro_on` and
`retro_random` (neighbours that were not retrieved for the text) are the four whose order
says whether retrieval is used. Arithmetic is in bits_per_byte.py, files in results.py.
"""

import dataclasses
import functools
from typing import Any

from retro_jax.data import batches
from retro_jax.errors import UserError
from retro_jax.evaluation import bits_per_byte
from retro_jax.evaluation.bits_per_byte import Score
from retro_jax.training import checkpoints, partitioning, step

TASK = 'evaluated'


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Attributes: sequences a batch, how many in all (0: every one), k read (0: as in training)."""
  batch_size: int = 8
  max_examples: int = 0
  num_neighbors: int = 0


def compare(retro: str, baseline: str, examples: str, random_examples: str,
            config: EvaluationConfig, mesh_config: partitioning.MeshConfig) -> dict[str, Score]:
  """Scores by setting; settings whose model or examples are '' are left out.

  Args:
    retro, baseline: folders of runs or exported models.
    examples: folder of retrieval examples with the neighbours to judge.
    random_examples: the same sequences with random neighbours.
    config: how.
    mesh_config: devices.

  Raises:
    UserError: a model and examples of different vocabularies or chunk lengths, or nothing
      to score.
  """
  mesh = partitioning.make_mesh(mesh_config)
  settings = [('baseline', baseline, examples, False), ('retro_off', retro, examples, False),
              ('retro_on', retro, examples, True), ('retro_random', retro, random_examples, True)]
  load = functools.cache(checkpoints.load_model)  # three settings share the RETRO
  scores: dict[str, Score] = {}
  for setting, model_folder, folder, retrieval in settings:
    if model_folder and folder:
      scores[setting] = _score(model_folder, load(model_folder), folder, retrieval, config, mesh)
      value = scores[setting].bits_per_byte
      print(f'evaluate: {setting:13s} {value:.4f} bits per byte', flush=True)
  if not scores:
    raise UserError('nothing to evaluate; name a model (retro or baseline) and its examples')
  return scores


def _score(model_folder: str, loaded: tuple[Any, Any, Any], folder: str, retrieval: bool,
           config: EvaluationConfig, mesh: partitioning.Mesh) -> Score:
  from retro_jax.data import tasks  # brings TensorFlow
  model, parameters, vocabulary = loaded
  if retrieval and not model.has_retrieval:
    raise UserError(f'{model_folder}: is a baseline without retrieval, no RETRO')
  tasks.register_task(TASK, folder, config.num_neighbors or model.num_neighbors)
  facts = tasks.info(TASK)
  if facts.vocabulary_fingerprint != vocabulary['fingerprint']:
    raise UserError(f'{model_folder} was trained with vocabulary {vocabulary["fingerprint"]}, but '
                    f'{folder} was made with {facts.vocabulary_fingerprint}; rebuild the examples '
                    "with the model's vocabulary")
  if facts.chunk_length != model.chunk_length:
    raise UserError(f'{model_folder} has chunks of {model.chunk_length} tokens, {folder} of '
                    f'{facts.chunk_length}; rebuild the examples')
  everywhere = partitioning.replicated(mesh)
  shardings = {name: everywhere for name in parameters}
  inputs = step.batch_inputs(model)
  examples = batches.evaluation_batches(
      TASK, config.batch_size, max_examples=config.max_examples or None,
      rows=batches.rows_of_process(mesh, config.batch_size))
  run = step.make_evaluation_step(model, mesh, shardings, retrieval)
  return bits_per_byte.score(run, parameters, examples, inputs, mesh)
