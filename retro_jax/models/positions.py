"""How distance enters attention: sinusoids of relative positions, and rotary positions.

Distances are those of the paper's B.1.2: query row i sees key column j at i - j + offset.
What is done with them is in attention.py.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def distances(rows: int, columns: int, offset: int, causal: bool) -> np.ndarray:
  """The distances i - j + offset that occur, in falling order, and one more, for `skew`."""
  largest = rows - 1 + offset
  smallest = offset if causal else offset - (columns - 1)
  return np.arange(largest, smallest - 2, -1)


def sinusoid(distance: np.ndarray, width: int) -> np.ndarray:
  """[len(distance), width] float32: sines then cosines of distance / 10000^(2i/width)."""
  frequency = 10_000.0 ** (-np.arange(0, width, 2) / width)
  angle = distance[:, None] * frequency[None, :]
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)


def skew(by_distance: Array, columns: int) -> Array:
  """Turns what rows have by distance into what they have by key, without a gather.

  Column t of the input is the t-th distance of `distances`; row i needs, for key j,
  t = (rows - 1) - i + j. Seen as rows that are one column narrower, the flattened array
  has those below each other, so that this is one slice and one reshape (Dai et al. 2019,
  appendix B). What the distance too many gave ends up where nobody reads it.

  Args:
    by_distance: [..., rows, number of distances].
    columns: number of keys.

  Returns:
    [..., rows, columns]. When only the non-negative distances of a causal attention
    were given, entries above the diagonal are meaningless and must be masked.
  """
  *lead, rows, width = by_distance.shape
  flat = by_distance.reshape(*lead, rows * width)
  flat = flat[..., rows - 1:rows - 1 + rows * (width - 1)]
  return flat.reshape(*lead, rows, width - 1)[..., :columns]


def rotate(x: Array, first: int = 0, base: float = 10_000.0, scaling: Sequence[float] = ()
           ) -> Array:
  """Rotary positions (Su et al. 2021): the dot product of two rotated vectors knows their distance.

  The first and the second half of the head are the two coordinates of c/2 planes, plane i
  turned by position / base^(2i/c) (the layout of Llama's checkpoints).

  Args:
    x: [..., rows, heads, c], c even; row i stands at position first + i.
    first: position of the first row, may be negative.
    base: of the wavelengths.
    scaling: of the frequencies, see `scaled_frequencies`; () for none.
  """
  places = first + np.arange(x.shape[-3])
  return turned(x, *rotation(places, x.shape[-1], base, scaling))


def rotation(places: np.ndarray, width: int, base: float = 10_000.0,
             scaling: Sequence[float] = ()) -> tuple[Array, Array]:
  """Sines and cosines of heads of `width` at places [p]: float32 [p, 1, width/2] each."""
  frequency = scaled_frequencies(base ** (-np.arange(0, width, 2) / width), scaling)
  angle = places[:, None, None] * frequency
  sine, cosine = (jnp.asarray(f(angle), jnp.float32) for f in (np.sin, np.cos))
  return sine, cosine


def turned(x: Array, sine: Array, cosine: Array) -> Array:
  """x [..., rows, heads, c], row by row turned by `rotation` [..., rows, 1, c/2]."""
  one, two = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  both = jnp.concatenate([one * cosine - two * sine, two * cosine + one * sine], axis=-1)
  return both.astype(x.dtype)


def scaled_frequencies(frequency: np.ndarray, scaling: Sequence[float]) -> np.ndarray:
  """The slow planes of rotary positions made slower, as Llama 3 was extended to long contexts.

  Args:
    frequency: [c/2], radians a position.
    scaling: () for none, or (factor, low, high, n): planes that turn less than `low` times in n
      positions are slowed by `factor`, those that turn more than `high` times are left alone,
      and between them the factor's inverse is interpolated linearly in the number of turns.
  """
  if not scaling:
    return frequency
  factor, low, high, positions = scaling
  turns = positions * frequency / (2 * np.pi)
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return frequency * (kept + (1 - kept) / factor)


def places(segments: Array) -> Array:
  """int32 [b, n]: the place of each token in its document's part of the sequence, from 0.

  Args:
    segments: int32 [b, n], equal for the tokens of one document, which stand side by side.
  """
  order = jnp.arange(segments.shape[1], dtype=jnp.int32)
  begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  return order - jax.lax.cummax(jnp.where(begins, order, 0), axis=1)
