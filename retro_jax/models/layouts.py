"""Where each of the decoder's layers lies among the parameters, and how to move it elsewhere.

Layers are stacked in groups that can be scanned (config.py, `layer_plan`), so the same layer has
another name and another place in its array in a baseline than in a RETRO of the same depth, or
with another P. Reading and placing arrays is training/checkpoints.py's business.
"""

import dataclasses
from collections.abc import Mapping

import jax

from retro_jax.models.config import RetroConfig, layer_plan

_ENTRY = 'decoder.entry'


@dataclasses.dataclass(frozen=True)
class Part:
  """An array of a model, or one layer of it.

  Attributes:
    name: of the parameter.
    index: in its first axis, where layers are stacked; None for the whole array.
  """
  name: str
  index: int | None


@dataclasses.dataclass(frozen=True)
class Origin:
  """What a parameter is made of.

  Attributes:
    parts: of another model, one unless `stacked`.
    stacked: they become the layers of one array, in this order.
  """
  parts: tuple[Part, ...]
  stacked: bool


def groups(config: RetroConfig) -> dict[str, tuple[int, ...]]:
  """The layers (from 1) of each group, in the order of their stack, by the group's name.

  Only decoder.entry is no stack.
  """
  plan = layer_plan(config)
  found = {'decoder.prefix': tuple(range(1, plan.prefix + 1))}
  last = plan.prefix
  if plan.has_entry:
    last += 1
    found[_ENTRY] = (last,)
  for number, (lm_layers, repeats) in enumerate(plan.periods):
    starts = [last + 1 + i * (lm_layers + 1) for i in range(repeats)]
    for j in range(lm_layers):
      found[f'decoder.periods.{number}.lm.{j}'] = tuple(first + j for first in starts)
    found[f'decoder.periods.{number}.retro'] = tuple(first + lm_layers for first in starts)
    last += repeats * (lm_layers + 1)
  found['decoder.tail'] = tuple(range(last + 1, last + plan.tail + 1))
  return {name: layers for name, layers in found.items() if layers}


def origin(name: str, here: RetroConfig, there: RetroConfig) -> Origin:
  """What of `there` parameter `name` of `here` is made of.

  Args:
    name: a parameter of `here`.
    here, there: two models whose decoders have equally many layers.
  """
  if groups(here) != groups(there):
    places = {}
    for group, layers in groups(there).items():
      for index, layer in enumerate(layers):
        places[layer] = group, None if group == _ENTRY else index
    for group, layers in groups(here).items():
      if name.startswith(group + '.'):
        rest = name.removeprefix(group)
        parts = tuple(Part(places[layer][0] + rest, places[layer][1]) for layer in layers)
        return Origin(parts, stacked=group != _ENTRY)
  return Origin((Part(name, None),), stacked=False)


def by_layer(config: RetroConfig, parameters: Mapping[str, jax.Array]
             ) -> tuple[dict[str, jax.Array], tuple[dict[str, jax.Array], ...]]:
  """A model's parameters with the decoder's layers taken out of their stacks.

  Returns:
    those of no layer, by name, and those of each layer, 1 to L, by name within it.
  """
  shared, layers = dict(parameters), [{} for _ in range(config.num_layers)]
  for group, numbers in groups(config).items():
    for name in [name for name in shared if name.startswith(group + '.')]:
      array = shared.pop(name)
      for index, number in enumerate(numbers):
        own = array if group == _ENTRY else array[index]
        layers[number - 1][name.removeprefix(group + '.')] = own
  return shared, tuple(layers)
