"""AdamW and its schedule as in the paper's C.1, and which parameters it trains.

What C.1 leaves open is in docs/decisions.md.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import optax

from retro_jax.errors import UserError, nearest
from retro_jax.models import retro
from retro_jax.training.gradients import clip_by_global_norm
from retro_jax.training.spikes import skip_spikes as skipping_spikes


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with linear warm-up, cosine decay and a clip of the global gradient norm.

  Attributes:
    peak_learning_rate: reached after `warmup_steps`.
    initial_learning_rate: at step 0.
    final_fraction: of the peak, reached at the last step.
    warmup_steps: linear.
    beta1, beta2, epsilon, weight_decay: of AdamW; decay applies to matrices only, not
      to norm scales and attention biases.
    clip_norm: global norm of the gradient.
    trainable: regular expressions; only parameters whose whole name matches one are trained, the
      others stay as the run begins and have no moments. () for all.
  """
  peak_learning_rate: float = 2e-4
  initial_learning_rate: float = 1e-7
  final_fraction: float = 0.1
  warmup_steps: int = 750
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  trainable: Sequence[str] = ()


def trained(config: OptimizerConfig, names: Iterable[str]) -> frozenset[str]:
  """Those of `names` that are trained.

  Raises:
    UserError: an expression that is none, or that matches no parameter.
  """
  names = list(names)
  if not config.trainable:
    return frozenset(names)
  chosen: set[str] = set()
  for pattern in config.trainable:
    try:
      found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
      raise UserError(f'OptimizerConfig.trainable: {pattern!r} is no regular expression '
                      f'({error})') from None
    if not found:
      raise UserError(f'OptimizerConfig.trainable: {pattern!r} matches no parameter of the model'
                      f'{nearest(pattern, names)}; model-info.txt lists them')
    chosen.update(found)
  return frozenset(chosen)


def schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
  """Learning rate by step."""
  return optax.warmup_cosine_decay_schedule(
      init_value=config.initial_learning_rate,
      peak_value=config.peak_learning_rate,
      warmup_steps=min(config.warmup_steps, max(total_steps - 1, 0)),
      decay_steps=total_steps,
      end_value=config.final_fraction * config.peak_learning_rate)


def make_optimizer(config: OptimizerConfig, total_steps: int, skip_spikes: bool = False
                   ) -> optax.GradientTransformation:
  """The whole update rule, over a flat dict of parameters; `skip_spikes` as in spikes.py.

  Its state is made from all parameters and holds moments of those that are trained; updates are
  given and taken for the latter only.
  """
  rule = optax.chain(
      clip_by_global_norm(config.clip_norm),
      optax.adamw(schedule(config, total_steps), b1=config.beta1, b2=config.beta2,
                  eps=config.epsilon, weight_decay=config.weight_decay,
                  mask=lambda parameters: {name: retro.is_matrix(name) for name in parameters}))
  rule = skipping_spikes(rule) if skip_spikes else rule
  if not config.trainable:
    return rule

  def init(parameters: retro.Parameters) -> optax.OptState:
    chosen = trained(config, parameters)
    return rule.init({name: parameters[name] for name in parameters if name in chosen})

  return optax.GradientTransformationExtraArgs(
      init, optax.with_extra_args_support(rule).update)
