"""Options of the TPU compiler, as a config that gin files of machines set."""

import dataclasses
from collections.abc import Mapping

from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class CompilerConfig:
  """Attributes: `options` of XLA by name, without dashes in front; values as text."""
  options: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def on(self, mesh: Mesh) -> dict[str, str] | None:
    """What jax.jit takes for these devices: the options are a TPU compiler's."""
    is_tpu = mesh.devices.flat[0].platform == 'tpu'
    return dict(self.options) if is_tpu and self.options else None

  def __post_init__(self):
    wrong = [name for name, value in self.options.items()
             if name.startswith('-') or not isinstance(value, str)]
    if wrong:
      raise ValueError(f'CompilerConfig.options[{wrong[0]!r}]: expected a name without dashes and '
                       "a value as text, like {'xla_tpu_scoped_vmem_limit_kib': '65536'}")
