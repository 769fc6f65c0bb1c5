"""Scaling laws: a power law, with an offset where there are points enough, and how sure it is.

Pure arithmetic on two lists of numbers; what they mean is summary.py's.
"""

import dataclasses

import numpy as np

_DRAWS = 400
_EXPONENTS = (0.01, 3.0)  # searched, for a law with an offset


@dataclasses.dataclass(frozen=True)
class Law:
  """y = offset + scale (x / reference)^-exponent.

  Attributes:
    exponent, scale, offset: `offset` is 0 in a plain power law.
    reference: the geometric mean of x; there y is offset + scale.
    has_offset: whether the offset was fitted.
    deviation: of the residuals, root of their sum of squares over the degrees of freedom;
      None without any.
    points, sizes: how many, and how many different x.
    spread: 5th and 95th percentile of each parameter over refits of the law with normal noise of
      that deviation; None without degrees of freedom.
    determined: False where the best exponent is at the edge of the search or nothing falls
      with x: the points lie on no such law.
  """
  exponent: float
  scale: float
  offset: float
  reference: float
  has_offset: bool
  deviation: float | None
  points: int
  sizes: int
  spread: dict[str, tuple[float, float]] | None
  determined: bool

  @property
  def freedom(self) -> int:
    return self.points - (3 if self.has_offset else 2)

  def __call__(self, x: np.ndarray) -> np.ndarray:
    return self.offset + self.scale * (np.asarray(x, float) / self.reference) ** -self.exponent


def fit(x: np.ndarray, y: np.ndarray) -> Law | None:
  """The law through these points by least squares; None for fewer than two different x.

  With four or more different x an offset is fitted, of y; with fewer a plain power law, of
  log y.
  """
  x, y = np.asarray(x, float), np.asarray(y, float)
  sizes = len(np.unique(x))
  if sizes < 2 or not (x > 0).all() or not (y > 0).all():
    return None
  reference = float(np.exp(np.log(x).mean()))
  log_x = np.log(x / reference)
  with_offset = sizes >= 4
  solve = _with_offset if with_offset else _plain
  target = y if with_offset else np.log(y)
  parameters = solve(log_x, target[None])[0]
  fitted = _predict(parameters, log_x, with_offset)
  freedom = len(y) - (3 if with_offset else 2)
  deviation = spread = None
  if freedom > 0:
    deviation = float(np.sqrt(((target - fitted) ** 2).sum() / freedom))
    # Resampling residuals of four points would show fewer values than there are; noise of
    # their size says the same and is smooth.
    noise = np.random.default_rng(0).normal(size=(_DRAWS, len(y))) * deviation
    low, high = np.percentile(solve(log_x, fitted + noise), [5, 95], axis=0)
    spread = {name: (float(low[i]), float(high[i]))
              for i, name in enumerate(('exponent', 'scale', 'offset')) if i < 2 or with_offset}
  exponent, scale, offset = map(float, parameters)
  determined = exponent > 0 and scale > 0
  if with_offset:
    determined = determined and _EXPONENTS[0] * 1.01 < exponent < _EXPONENTS[1] * 0.99
  return Law(exponent, scale, offset, reference, with_offset, deviation, len(y), sizes, spread,
             determined)


def _predict(parameters: np.ndarray, log_x: np.ndarray, with_offset: bool) -> np.ndarray:
  exponent, scale, offset = parameters
  if with_offset:
    return offset + scale * np.exp(-exponent * log_x)
  return np.log(scale) - exponent * log_x


def _plain(log_x: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """(exponent, scale, 0) of each row of log y."""
  slope, level = np.polyfit(log_x, targets.T, 1)
  return np.stack([-slope, np.exp(level), np.zeros_like(slope)], axis=1)


def _with_offset(log_x: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """(exponent, scale, offset) of each row of y; scale and offset at least 0.

  For a given exponent the best scale and offset are a linear problem, so only the exponent is
  searched: on a grid that narrows around the best.
  """
  rows = np.arange(len(targets))
  low = np.full(len(targets), np.log(_EXPONENTS[0]))
  high = np.full(len(targets), np.log(_EXPONENTS[1]))
  for _ in range(8):
    grid = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, 41)
    falls = np.exp(-np.exp(grid)[..., None] * log_x)  # [row, exponent, point]
    scale, offset, error = _linear(falls, targets[:, None, :])
    best = error.argmin(axis=1)
    low = grid[rows, np.maximum(best - 1, 0)]
    high = grid[rows, np.minimum(best + 1, grid.shape[1] - 1)]
  return np.stack([np.exp(grid[rows, best]), scale[rows, best], offset[rows, best]], axis=1)


def _linear(f: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The best y = scale f + offset over the last axis, neither negative; and its squared error."""
  mean_f, mean_y = f.mean(axis=-1), np.broadcast_to(y.mean(axis=-1), f.shape[:-1])
  centred = f - mean_f[..., None]
  scale = (centred * y).sum(axis=-1) / np.maximum((centred ** 2).sum(axis=-1), 1e-300)
  offset = mean_y - scale * mean_f
  # At the edge of what is allowed the other of the two is fitted alone.
  alone = (f * y).sum(axis=-1) / (f ** 2).sum(axis=-1)
  scale, offset = np.where(offset < 0, alone, scale), np.maximum(offset, 0)
  scale, offset = np.maximum(scale, 0), np.where(scale < 0, mean_y, offset)
  error = ((y - scale[..., None] * f - offset[..., None]) ** 2).sum(axis=-1)
  return scale, offset, error
