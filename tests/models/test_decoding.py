"""Cached decoding against the full forward pass, for rows that stand at different places."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.models import decoding, retro
from retro_jax.models.config import RetroConfig
from tests import tiny_models

M, WINDOW, ROWS = 4, 16, 3
CONFIGS = {
    'relative': tiny_models.tiny(),
    'relative, one CCA layer and a tail': tiny_models.tiny(cca_layers=(2,), share_embeddings=False),
    'rotary, grouped': tiny_models.tiny(
        positions='rotary', num_kv_heads=1, num_layers=5, cca_layers=(1, 3, 5), norm='layer',
        gated=True, activation='silu', rotary_scaling=(8., 1., 4., 8192.), tied_read=False),
    'relative, none in CCA': tiny_models.tiny(cca_positions='none',
                                              encoder_cross_attention_layers=()),
    'learned': tiny_models.tiny(
        positions='learned', max_positions=WINDOW, qkv_bias=True, output_bias=True, ffw_bias=True,
        padding_row=False),
    'baseline': tiny_models.tiny(cca_layers=(), num_kv_heads=1, num_layers=2),
}
_apply = jax.jit(retro.apply, static_argnums=0)


@dataclasses.dataclass
class Row:
  """One request: its window with the neighbours of each chunk, and how far it was read."""
  tokens: np.ndarray
  neighbors: np.ndarray | None
  start: int = 0
  place: int = 0
  since: int = 0

  @property
  def completes(self) -> bool:
    return (self.place + 1) % M == 0 and self.neighbors is not None


class Player:
  """Reads rows through the two functions and keeps the logits of each place."""

  def __init__(self, config: RetroConfig, parameters, rows: list[Row], k: int):
    self.config, self.rows, self.k = config, rows, k
    self.weights = decoding.prepare(config, parameters, WINDOW)
    self.cache = decoding.empty_cache(config, len(rows), WINDOW, k)
    # What an earlier request left behind must not show.
    rng = np.random.default_rng(9)
    self.cache = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 3 > 0 if x.dtype == bool else
                              rng.normal(size=x.shape) * 3, x.dtype), self.cache)
    self.logits = [{} for _ in rows]

  def extend(self, number: int, count: int) -> None:
    """Reads `count` tokens of a row, up to the end of its chunk at most."""
    row, found = self.rows[number], None
    complete = (row.place + count) % M == 0 and row.neighbors is not None
    if self.k:
      r = self.config.retrieved_length
      tokens = row.neighbors[row.place // M] if complete else np.zeros((self.k, r), np.int32)
      found = retro.Retrieval(tokens[None, None], tokens[None, None] != 0)
    tokens = np.zeros(1 if count == 1 else M, np.int32)
    tokens[:count] = row.tokens[row.place:row.place + count]
    places = decoding.Places(*(np.array([x], np.int32) for x in (row.place, row.start, row.since)))
    self.cache, logits = decoding.extend(
        self.config, self.weights, self.cache, np.int32(number), tokens, np.int32(count), places,
        row.place == row.start, complete, found)
    row.place += count
    row.since = 1 if complete else row.since + count
    self.logits[number][row.place - 1] = np.array(logits)

  def advance(self, numbers: list[int]) -> None:
    """Reads one token of each of these rows."""
    active = np.isin(np.arange(len(self.rows)), numbers)
    pick = lambda of: np.array([of(row) for row in self.rows], np.int32)
    places = decoding.Places(pick(lambda row: row.place), pick(lambda row: row.start),
                             pick(lambda row: row.since))
    tokens = pick(lambda row: row.tokens[min(row.place, WINDOW - 1)])
    self.cache, logits = decoding.advance(self.config, self.weights, self.cache, tokens, places,
                                          active)
    for number in numbers:
      row = self.rows[number]
      self.logits[number][row.place] = np.array(logits[number])
      row.place, row.since = row.place + 1, row.since + 1

  def play(self, prompts: list[int]) -> None:
    """Reads prompts chunk by chunk, then all rows to the ends of their windows."""
    for number, prompt in enumerate(prompts):
      row = self.rows[number]
      row.place = row.start
      while row.place < prompt:
        self.extend(number, min(prompt, (row.place // M + 1) * M) - row.place)
    while any(row.place < WINDOW for row in self.rows):
      going = [i for i, row in enumerate(self.rows) if row.place < WINDOW]
      completing = [i for i in going if self.rows[i].completes]
      if alone := [i for i in going if i not in completing]:
        self.advance(alone)
      for number in completing:
        self.extend(number, 1)


def make_rows(config: RetroConfig, seed: int = 0, k: int = 2) -> list[Row]:
  batch = tiny_models.batch(config, np.random.default_rng(seed), size=ROWS,
                            chunks=WINDOW // M, k=k, documents=False)
  batch.neighbors[0, 1, 1, 3:] = 0  # a short neighbour, and none at all
  batch.neighbors[1, 0] = 0
  rows = [Row(batch.tokens[i], batch.neighbors[i] if config.has_retrieval else None)
          for i in range(ROWS)]
  rows[2].start = 2
  rows[2].tokens[:2] = 0
  return rows


def full(config: RetroConfig, parameters, row: Row) -> np.ndarray:
  """Logits of every place by one forward pass."""
  retrieval = None
  if row.neighbors is not None:
    retrieval = retro.Retrieval(row.neighbors[None], row.neighbors[None] != 0)
  segments = (np.arange(WINDOW) >= row.start).astype(np.int32)[None]
  return np.array(_apply(config, parameters, row.tokens[None], segments, retrieval))[0]


@pytest.mark.parametrize('name', CONFIGS)
def test_every_logit_is_that_of_the_full_forward_pass(name):
  config = CONFIGS[name]
  parameters = tiny_models.parameters(config)
  rows = make_rows(config)
  player = Player(config, parameters, rows, 2 if config.has_retrieval else 0)
  player.play([9, 4, 3])
  compared = 0
  for row, logits in zip(rows, player.logits):
    expected = full(config, parameters, row)
    for place, values in logits.items():
      np.testing.assert_allclose(values, expected[place], atol=1e-4, rtol=1e-4)
      compared += 1
  assert compared > 2 * WINDOW
  if config.has_retrieval:  # the comparison sees a difference if there is one
    off = full(config, parameters, dataclasses.replace(rows[0], neighbors=None))
    on = full(config, parameters, rows[0])
    assert np.abs(off[M - 1:, 1:] - on[M - 1:, 1:]).max() > 1e-2  # id 0 may have no row


def test_a_row_without_retrieval_beside_rows_with_it():
  config = CONFIGS['relative']
  parameters = tiny_models.parameters(config)
  rows = make_rows(config)
  rows[1].neighbors = None
  player = Player(config, parameters, rows, 2)
  player.play([9, 4, 3])
  expected = full(config, parameters, rows[1])
  for place, values in player.logits[1].items():
    np.testing.assert_allclose(values, expected[place], atol=1e-4, rtol=1e-4)


def test_a_row_does_not_depend_on_the_others():
  config = CONFIGS['relative']
  parameters = tiny_models.parameters(config)
  made = []
  for seed in (0, 1):
    rows = make_rows(config)
    others = make_rows(config, seed)
    rows[0], rows[2] = others[0], others[2]
    player = Player(config, parameters, rows, 2)
    player.play([9, 5, 3] if seed == 0 else [2, 5, 11])
    made.append(player.logits[1])
  assert made[0].keys() == made[1].keys()
  for place, values in made[0].items():
    np.testing.assert_allclose(values, made[1][place], atol=1e-6, rtol=1e-6)


def test_three_programs_for_everything():
  config = CONFIGS['baseline']
  parameters = tiny_models.parameters(config)
  decoding.advance.clear_cache()
  decoding.extend.clear_cache()
  for prompts in ([1, 2, 3], [9, 8, 16]):
    Player(config, parameters, make_rows(config), 0).play(prompts)
  assert decoding.advance._cache_size() == 1 and decoding.extend._cache_size() == 2
