"""Options of the TPU compiler, as a config that gin files of machines set."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class CompilerConfig:
  """Attributes: `options` of XLA by name, without dashes in front; values as text."""
  options: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    wrong = [name for name, value in self.options.items()
             if name.startswith('-') or not isinstance(value, str)]
    if wrong:
      raise ValueError(f'CompilerConfig.options[{wrong[0]!r}]: expected a name without dashes and '
                       "a value as text, like {'xla_tpu_scoped_vmem_limit_kib': '65536'}")
