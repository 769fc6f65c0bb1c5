"""Where layers lie, against the order in which the slow reference takes them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retro_jax.models.config import RetroConfig
from retro_jax.models.layouts import groups, origin
from tests import reference

patterns = st.sets(st.integers(1, 9), max_size=5).map(lambda layers: tuple(sorted(layers)))


def marked(config: RetroConfig) -> dict[str, np.ndarray]:
  """A parameter a layer that holds the layer's number, in this config's groups."""
  return {f'{group}.feed_forward.wi': np.float64(layers[0] if group == 'decoder.entry' else layers)
          for group, layers in groups(config).items()}


@given(patterns)
def test_groups_are_those_of_the_reference(pattern):
  config = RetroConfig(num_layers=9, cca_layers=pattern)
  found = reference.decoder_layers(marked(config), 9, pattern)
  assert [float(layer['feed_forward.wi']) for layer in found] == list(range(1, 10))


@given(patterns, patterns)
def test_layers_are_found_by_their_number(one, other):
  here, there = (RetroConfig(num_layers=9, cca_layers=p) for p in (one, other))
  source = marked(there)
  for name, expected in marked(here).items():
    found = origin(name, here, there)
    take = lambda part: source[part.name] if part.index is None else source[part.name][part.index]
    made = np.stack([take(p) for p in found.parts]) if found.stacked else take(found.parts[0])
    np.testing.assert_array_equal(made, expected)
  found = origin('decoder.norm.scale', here, there)
  assert [p.name for p in found.parts] == ['decoder.norm.scale'] and not found.stacked
