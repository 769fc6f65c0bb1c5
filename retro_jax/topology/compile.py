"""Compiles the training step of this code base for a slice that is not there.

Everything is abstract: shapes, dtypes and shardings go in, a program and its memory plan come
out, nothing is allocated. `lower` is the one place that knows the signatures of training/.
"""

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from retro_jax.data import batches
from retro_jax.errors import UserError
from retro_jax.models import flops
from retro_jax.models.config import RetroConfig
from retro_jax.topology import chips, cost, program
from retro_jax.topology.chips import GIB, Topology
from retro_jax.topology.cost import Cost
from retro_jax.training import optimizer, partitioning, state, step
from retro_jax.training.compiler import CompilerConfig
from retro_jax.training.optimizer import OptimizerConfig
from retro_jax.training.partitioning import MeshConfig, ShardingRules

# For gin: what a StepConfig is made of, and the file that is read before all others.
CONFIGURABLES = (RetroConfig, MeshConfig, ShardingRules, OptimizerConfig, CompilerConfig)
BASE = 'gin/runs/compile_for_topology.gin'
# The schedule's length is a constant of the program; its value changes no cost.
SCHEDULE = 100_000


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """A training step to compile.

  Attributes:
    model, mesh, rules, optimizer, compiler, microbatch_tokens: as in training.
    batch_size: sequences over all devices.
    sequence_length: n, tokens of a sequence.
  """
  model: RetroConfig
  mesh: MeshConfig = MeshConfig()
  rules: ShardingRules = ShardingRules()
  optimizer: OptimizerConfig = OptimizerConfig()
  compiler: CompilerConfig = CompilerConfig()
  batch_size: int = 256
  microbatch_tokens: int = 0
  sequence_length: int = 2048

  def __post_init__(self):
    if self.batch_size < 1 or self.sequence_length % self.model.chunk_length:
      raise ValueError(f'StepConfig: batch_size {self.batch_size} must be at least 1 and '
                       f'sequence_length {self.sequence_length} a multiple of chunk_length '
                       f'{self.model.chunk_length}')


@dataclasses.dataclass(frozen=True)
class Result:
  """Attributes: `cost`; `text` of the program, '' when it was not compiled."""
  cost: Cost
  text: str


def batch_shapes(model: RetroConfig, batch_size: int, sequence_length: int
                 ) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Shape and dtype of what data/features.py makes and the step reads."""
  b, n, k, r = batch_size, sequence_length, model.num_neighbors, model.retrieved_length
  l = n // model.chunk_length
  known = {
      'tokens': ((b, n), jnp.int32), 'targets': ((b, n), jnp.int32),
      'loss_weights': ((b, n), jnp.float32), 'documents': ((b, l), jnp.int32),
      'text_bytes': ((b, l), jnp.int32), 'neighbor_tokens': ((b, l, k, r), jnp.int32),
      'neighbor_mask': ((b, l, k, r), jnp.bool_)}
  return {name: known[name] for name in step.batch_inputs(model)}


def compile_step(config: StepConfig, topology: Topology) -> Result:
  """Compiles and prices a step.

  Raises:
    UserError: no libtpu, a mesh or sharding that does not fit the slice, a compiler option
      that does not exist.
  """
  mesh = partitioning.make_mesh(config.mesh, chips.devices(topology))
  model_flops = flops.training_flops(config.model, config.batch_size, config.sequence_length)
  lowered = lower(config, mesh)
  start = time.monotonic()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    taken = time.monotonic() - start
    if 'INVALID_ARGUMENT' in str(error):
      reason = str(error).strip().splitlines()[0]
      raise UserError(f'the compiler refuses the step: {reason}') from error
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return Result(too_large(str(error), topology, model_flops, taken), '')
  taken = time.monotonic() - start
  text = compiled.as_text()
  # Replica groups count devices in the order of the mesh.
  coordinates = [list(device.coords) for device in mesh.devices.flat]
  priced = cost.of_program(program.parse(text), topology, coordinates,
                           _memory(compiled.memory_analysis()), model_flops, taken)
  return Result(priced, text)


def lower(config: StepConfig, mesh: jax.sharding.Mesh) -> Any:
  """The step of training/, traced and lowered with abstract arguments."""
  microbatches = batches.microbatches(mesh, config.batch_size, config.sequence_length,
                                      config.microbatch_tokens)
  rule = optimizer.make_optimizer(config.optimizer, SCHEDULE)
  abstract = state.abstract_state(config.model, rule, config.rules, mesh)
  train_step = step.make_train_step(
      config.model, rule, optimizer.schedule(config.optimizer, SCHEDULE), mesh, abstract,
      config.rules, microbatches, config.compiler,
      optimizer.trained(config.optimizer, abstract.parameters))
  examples = partitioning.batch_sharding(mesh)
  shapes = batch_shapes(config.model, config.batch_size, config.sequence_length)
  batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=examples)
           for name, (shape, dtype) in shapes.items()}
  return train_step.lower(abstract, batch)


def _memory(analysis: Any) -> cost.Memory:
  return cost.Memory(
      arguments=analysis.argument_size_in_bytes, temporaries=analysis.temp_size_in_bytes,
      outputs=analysis.output_size_in_bytes, aliased=analysis.alias_size_in_bytes,
      code=analysis.generated_code_size_in_bytes)


def too_large(message: str, topology: Topology, model_flops: float, seconds: float) -> Cost:
  """The report of a program for which the memory, of HBM or VMEM, does not suffice."""
  needed, capacity = memory_in_message(message)
  return Cost(
      topology=topology.name, num_devices=topology.num_devices, fits=False,
      hbm_capacity_bytes=capacity or topology.chip.hbm_bytes, hbm_bytes_per_device=needed,
      model_flops_per_step=model_flops, compile_seconds=seconds,
      reason=message.strip().splitlines()[0])


def memory_in_message(message: str) -> tuple[float | None, float | None]:
  """(bytes needed, bytes there are) of HBM in an out-of-memory message; None if not told."""
  amount = r'([\d.]+)([KMGT]?)'
  for pattern in (rf'Used {amount} of {amount} hbm',
                  rf'\({amount}\) exceeds available HBM \({amount}\)'):
    if match := re.search(pattern, message):
      scale = {'': 1, 'K': 2 ** 10, 'M': 2 ** 20, 'G': GIB, 'T': 2 ** 40}
      return float(match[1]) * scale[match[2]], float(match[3]) * scale[match[4]]
  return None, None
