"""The next token out of its logits: greedy, or drawn from a truncated softmax."""

import numpy as np

from retro_jax.errors import UserError

# How many of the likeliest ids are ordered first; nearly always they are enough.
_FIRST_WIDTH = 256


def choose(logits: np.ndarray, temperature: float, top_k: int, top_p: float,
           rng: np.random.Generator) -> int:
  """The id of the next token; equal logits are ordered by id.

  One number is drawn for each token, so that equal generators give equal texts.

  Args:
    logits: float [V]; minus infinity for what must not be written.
    temperature: divides the logits; 0 always takes the likeliest token.
    top_k: draws among so many likeliest tokens; 0 for all.
    top_p: draws among the fewest likeliest tokens that hold this probability; 1 for all.
    rng: of the draw.
  """
  if temperature == 0:
    return int(np.argmax(logits))
  size = len(logits)
  weigh = lambda ids: np.exp((logits[ids].astype(np.float64) - logits.max()) / temperature)
  limit = min(top_k or size, size)
  # With top_k the probabilities are those among k tokens, else those among all.
  total = weigh(slice(None)).sum() if limit == size else weigh(_likeliest(logits, limit)).sum()
  draw, width = rng.random(), min(_FIRST_WIDTH, limit)
  while True:
    order = _likeliest(logits, width)
    cumulative = np.cumsum(weigh(order) / total)
    enough = cumulative[-1] >= top_p if top_p < 1 else cumulative[-1] > draw
    if enough or width == limit:
      break
    width = min(8 * width, limit)
  if top_p < 1:
    cumulative = cumulative[:int(np.searchsorted(cumulative, top_p)) + 1]
    draw *= cumulative[-1]
  # Rounding must not lead past the end of what was kept.
  return int(order[min(int(np.searchsorted(cumulative, draw, 'right')), len(cumulative) - 1)])


def _likeliest(logits: np.ndarray, count: int) -> np.ndarray:
  """The ids of the `count` largest logits, largest first, equal ones by id."""
  ids = np.arange(len(logits))
  if count < len(logits):
    least = np.partition(logits, len(logits) - count)[len(logits) - count]
    ids = np.flatnonzero(logits >= least)
  return ids[np.argsort(-logits[ids].astype(np.float64), kind='stable')][:count]


def check_settings(max_new_tokens: int, temperature: float, top_k: int, top_p: float,
                   seed: int) -> None:
  """Refuses settings out of range with a `UserError`."""
  for name, value, good, expected in (
      ('max_new_tokens', max_new_tokens, max_new_tokens >= 1, 'at least 1'),
      ('temperature', temperature, temperature >= 0, '0 or more'),
      ('top_k', top_k, top_k >= 0, '0 (all) or more'),
      ('top_p', top_p, 0 < top_p <= 1, 'more than 0 and at most 1'),
      ('seed', seed, seed >= 0, '0 or more')):
    if not good:
      raise UserError(f'{name} is {value}, expected {expected}')
