"""Small models that tests train for seconds, on one device: on eight fake ones most of the time
would go into their talking."""

import jax

from retro_jax.data import batches, tasks
from retro_jax.models.config import RetroConfig
from retro_jax.training import optimizer, partitioning, state, step
from retro_jax.training.optimizer import OptimizerConfig


def one_device():
  return partitioning.make_mesh(partitioning.MeshConfig(1, 1), jax.devices()[:1])


def trainer(model: RetroConfig, steps: int):
  """A function from a folder of examples to parameters trained on them; compiles once."""
  mesh, config = one_device(), OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=20)
  rule = optimizer.make_optimizer(config, steps)
  abstract = state.abstract_state(model, rule, partitioning.ShardingRules(), mesh)
  train_step = step.make_train_step(
      model, rule, optimizer.schedule(config, steps), mesh, abstract)

  def train(folder):
    tasks.register_task('learnt', folder, model.num_neighbors)
    current = state.init_state(model, rule, 0, abstract)
    for batch in batches.batches('learnt', 16, num_steps=steps):
      inputs = {name: batch[name] for name in step.batch_inputs(model)}
      current, _ = train_step(current, batches.to_global(inputs, mesh))
    return jax.device_get(current.parameters)

  return train
