"""Whether a RETRO gains from the neighbours it was given, as a yes or no for scripts.

ON is held against neighbours that do not belong to the text; a model that does not read
what it retrieves, or a retriever that finds nothing of use, does not pass.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from retro_jax.errors import RunStopped, UserError
from retro_jax.evaluation.bits_per_byte import Score, gain_interval


class GateFailed(RunStopped):
  """The numbers are written, and not good enough."""

  exit_code = 3


@dataclasses.dataclass(frozen=True)
class GateConfig:
  """What `retro_on` has to show.

  Attributes:
    margin: fraction of bits that it has to need less; the whole 95 % interval of the gain,
      paired by document, has to lie above it.
    over: the setting it is held against: 'retro_random' or 'shuffled'.
  """
  margin: float = 0.0
  over: str = 'retro_random'

  def __post_init__(self):
    if not 0 <= self.margin < 1 or self.over not in ('retro_random', 'shuffled'):
      raise UserError(f'GateConfig(margin={self.margin}, over={self.over!r}), expected a fraction '
                      "from 0 to below 1, and 'retro_random' or 'shuffled'")


def check_possible(config: GateConfig, settings: Iterable) -> None:
  """Refuses a gate whose two settings are not scored, before anything is.

  Raises:
    UserError: says what to give.
  """
  names = [setting.name for setting in settings]
  if 'retro_on' not in names or config.over not in names:
    how = ('EvaluateJob.random_examples' if config.over == 'retro_random'
           else 'SweepConfig.shuffled')
    raise UserError(f'the gate compares retro_on with {config.over}, and one of them is not '
                    f'scored; set EvaluateJob.retro and {how}')


def why_not_passed(config: GateConfig, scores: Mapping[str, Score]) -> str | None:
  """None when the gate is passed, else what was found and what was asked."""
  on, other = scores['retro_on'], scores[config.over]
  if len(on.bits) < 2:
    return 'gate: a single document was scored, which gives no interval; score more'
  low, high = gain_interval(on, other)
  if low > config.margin:
    return None
  gain = 1 - on.bits.sum() / other.bits.sum()
  return (f'gate: retro_on needs {100 * gain:.2f} % fewer bits than {config.over}, 95 % interval '
          f'{100 * low:.2f} to {100 * high:.2f} %, paired over {len(on.bits)} documents; all of it '
          f'has to lie above {100 * config.margin:.2f} %')
