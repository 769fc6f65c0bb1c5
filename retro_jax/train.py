"""Pretrain RETRO or its baseline: python -m retro_jax.train --gin_file=... ."""

from retro_jax import configuration
from retro_jax.models.config import RetroConfig
from retro_jax.training import loop
from retro_jax.training.checkpoints import CheckpointConfig
from retro_jax.training.compiler import CompilerConfig
from retro_jax.training.distributed import DistributedConfig
from retro_jax.training.optimizer import OptimizerConfig
from retro_jax.training.partitioning import MeshConfig, ShardingRules

CONFIGURABLES = (RetroConfig, loop.DataConfig, loop.TrainingConfig, OptimizerConfig, MeshConfig,
                 ShardingRules, CheckpointConfig, DistributedConfig, CompilerConfig)


def main() -> None:
  configuration.main(loop.TrainJob, loop.train, CONFIGURABLES)


if __name__ == '__main__':
  main()
