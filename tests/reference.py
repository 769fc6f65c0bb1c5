"""RETRO once more, as slowly and plainly as the paper's equations read: the tests' yardstick.

NumPy float64 and Python loops over positions, heads and keys; nothing of retro_jax is used
but the names of the parameters. Positions, chunks, layers and retrieved tokens are counted
from 1, as in the paper (arXiv 2112.04426, sections 2.3, 2.4 and B.1.2). What the paper leaves
open follows docs/decisions.md: pre-norm, Transformer-XL biases, scale 1/sqrt(c), masks.
"""

import cmath
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Parameters = Mapping[str, np.ndarray]


def under(parameters: Parameters, prefix: str) -> dict[str, np.ndarray]:
  """The parameters of one module, under their names inside it."""
  return {name[len(prefix) + 1:]: np.asarray(value, np.float64)
          for name, value in parameters.items() if name.startswith(prefix + '.')}


def norm(p: Parameters, x: np.ndarray, epsilon: float) -> np.ndarray:
  """RMSNorm, or with a bias the norm of Ba et al. 2016."""
  if 'bias' not in p:
    return rms_norm(x, p['scale'], epsilon)
  rows = []
  for row in x:
    mean = sum(row) / len(row)
    variance = sum((v - mean) ** 2 for v in row) / len(row)
    rows.append([(v - mean) / math.sqrt(variance + epsilon) for v in row])
  return np.array(rows) * p['scale'] + p['bias']


def rms_norm(x: np.ndarray, scale: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
  """Each row of x [rows, d] divided by the root of its mean square, times scale [d]."""
  return np.array([row / math.sqrt(sum(v * v for v in row) / len(row) + epsilon) * scale
                   for row in x])


def position_vector(distance: int, width: int) -> np.ndarray:
  """Sines, then cosines, of the distance at wave lengths from 2 pi to 20,000 pi; [width]."""
  angles = [distance / 10_000 ** (2 * i / width) for i in range(width // 2)]
  return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def attention(
    p: Parameters, x: np.ndarray, context: np.ndarray, may_read: Callable[[int, int], bool],
    distance: Callable[[int, int], int] | None, frequency: Callable[[int, int], float] | None = None
    ) -> np.ndarray:
  """CA of equation 4 with many heads and the positional logits of B.1.2, or rotary positions.

  Args:
    p: query, key, value, output; relative, content_bias, position_bias unless rotary; biases of
      the projections where the model has them. Head h asks the key head of its group.
    x: rows that ask, [q, d].
    context: rows that are read, [s, d_context].
    may_read: whether row i reads row j, both from 1.
    distance: between row i and row j; None for positions that are already in x.
    frequency: of rotary plane i of so many, radians a position; Su et al.'s by default.

  Returns:
    [q, d]; a row that may read nothing is 0.
  """
  result = np.zeros_like(x)
  heads, c = p['query'].shape[1:]
  group = heads // p['key'].shape[1]
  project = lambda row, name, h: row @ p[name][:, h] + (
      p[f'{name}_bias'][h] if f'{name}_bias' in p else 0)
  positions = {}
  for i in range(1, len(x) + 1):
    readable = [j for j in range(1, len(context) + 1) if may_read(i, j)]
    if not readable:
      continue
    for h in range(heads):
      q = project(x[i - 1], 'query', h)
      logits = []
      for j in readable:
        key = project(context[j - 1], 'key', h // group)
        at = distance(i, j) if distance else 0
        if 'relative' not in p:
          logits.append(rotary_logit(q, key, at, frequency) / math.sqrt(c))
          continue
        if (at, h) not in positions:
          positions[at, h] = position_vector(at, x.shape[1]) @ p['relative'][:, h]
        content = (q + p['content_bias'][h]) @ key
        position = (q + p['position_bias'][h]) @ positions[at, h]
        logits.append((content + position) / math.sqrt(c))
      largest = max(logits)
      exponentials = [math.exp(logit - largest) for logit in logits]
      mixed = sum(e / sum(exponentials) * project(context[j - 1], 'value', h // group)
                  for e, j in zip(exponentials, readable))
      result[i - 1] += mixed @ p['output'][h]
    result[i - 1] += p.get('output_bias', 0)
  return result


def rotary_logit(q: np.ndarray, key: np.ndarray, distance: int,
                 frequency: Callable[[int, int], float] | None = None) -> float:
  """Su et al. 2021, equation 12: complex pairs, the key's turned back by the distance."""
  half = len(q) // 2
  frequency = frequency or (lambda i, planes: 10_000 ** (-i / planes))
  total = 0.0
  for i in range(half):
    one, other = complex(q[i], q[half + i]), complex(key[i], key[half + i])
    total += (one * other.conjugate() * cmath.exp(1j * distance * frequency(i, half))).real
  return total


def activation(y: np.ndarray, kind: str = 'gelu') -> np.ndarray:
  """GELU in its tanh form; 'gelu_exact' or 'silu', value by value."""
  if kind == 'gelu':
    return 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y ** 3)))
  exact = {'gelu_exact': lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
           'silu': lambda v: v / (1 + math.exp(-v))}
  return np.vectorize(exact[kind])(y)


def feed_forward(p: Parameters, x: np.ndarray, epsilon: float = 1e-6, kind: str = 'gelu'
                 ) -> np.ndarray:
  """FFW, residual: x [rows, d] to the same; with a gate where p has one."""
  normed = norm(under(p, 'norm'), x, epsilon)
  y = normed @ p['wi'] + p.get('wi_bias', 0)
  if 'gate' in p:
    y = y * activation(normed @ p['gate'] + p.get('gate_bias', 0), kind)
  else:
    y = activation(y, kind)
  return x + y @ p['wo'] + p.get('wo_bias', 0)


def self_attention(
    p: Parameters, h: np.ndarray, documents: Sequence[int], epsilon: float = 1e-6,
    learned: bool = False, frequency: Callable[[int, int], float] | None = None) -> np.ndarray:
  """ATTN, residual: causal and inside one document; h [n, d], documents [n]."""
  normed = norm(under(p, 'norm'), h, epsilon)
  return h + attention(
      under(p, 'attention'), normed, normed,
      may_read=lambda i, j: j <= i and documents[i - 1] == documents[j - 1],
      distance=None if learned else lambda i, j: i - j, frequency=frequency)


def chunked_cross_attention(
    p: Parameters, h: np.ndarray, encoded: np.ndarray, neighbor_mask: np.ndarray,
    documents: Sequence[int], m: int, placeless: bool = False) -> np.ndarray:
  """CCA of equations 3 and 6, residual, one position at a time.

  Position pos = u m + i - 1 is row i of C_u^+ and reads E_u; with u = floor(pos / m) that
  is i = pos - u m + 1. Positions before m read nothing.

  Args:
    p: norm.scale and attention.
    h: [n, d].
    encoded: E, [l, k, r, d'].
    neighbor_mask: bool [l, k, r].
    documents: [n], 0 for padding; a chunk's neighbours serve its own document only.
    m: chunk length.
    placeless: distances do not count, the paper's ablation.
  """
  result = h.copy()
  inner = under(p, 'attention')
  _, k, r, _ = encoded.shape
  for pos in range(m, len(h) + 1):
    u = pos // m
    i = pos - u * m + 1
    owner = max(documents[(u - 1) * m:u * m])  # padding may stand before and after its tokens
    if owner == 0 or documents[pos - 1] != owner:
      continue
    # One softmax over all neighbours: key number (j - 1) r + i' of the k r keys.
    keys = encoded[u - 1].reshape(k * r, -1)
    readable = neighbor_mask[u - 1].reshape(k * r)
    result[pos - 1] += attention(
        inner, rms_norm(h[pos - 1:pos], p['norm.scale']), keys,
        may_read=lambda _, key: readable[key - 1],
        distance=None if placeless else lambda _, key: i - ((key - 1) % r + 1) + m - 1)[0]
  return result


def encode(
    p: Parameters, embedded: np.ndarray, neighbor_mask: np.ndarray, h: np.ndarray,
    documents: Sequence[int], m: int, cross_layers: Sequence[int]) -> np.ndarray:
  """The encoder of Algorithm 1, one neighbour at a time.

  Args:
    p: layers.0..., norm.scale.
    embedded: [l, k, r, d'].
    neighbor_mask: bool [l, k, r].
    h: decoder activations, [n, d].
    documents: [n], 0 for padding.
    m: chunk length.
    cross_layers: P_enc, from 1.
  """
  num_layers = 1 + max(int(name.split('.')[1]) for name in p if name.startswith('layers.'))
  result = np.zeros_like(embedded)
  for u in range(1, len(embedded) + 1):
    h_u = h[(u - 1) * m:u * m]
    real = documents[(u - 1) * m:u * m]
    for j in range(embedded.shape[1]):
      e, valid = embedded[u - 1, j], neighbor_mask[u - 1, j]
      for layer in range(1, num_layers + 1):
        q = under(p, f'layers.{layer - 1}')
        normed = rms_norm(e, q['norm.scale'])
        e = e + attention(under(q, 'attention'), normed, normed,
                          may_read=lambda _, other: valid[other - 1],
                          distance=lambda one, other: one - other)
        if layer in cross_layers:
          # d_enc(i', i) = i' - i, equation 7.
          e = e + attention(under(q, 'cross_attention'), rms_norm(e, q['cross_norm.scale']),
                            rms_norm(h_u, q['context_norm.scale']),
                            may_read=lambda _, i: real[i - 1] != 0,
                            distance=lambda i_retrieved, i: i_retrieved - i)
        e = feed_forward(under(q, 'feed_forward'), e)
      result[u - 1, j] = rms_norm(e, p['norm.scale'])
  return result


def decoder_layers(parameters: Parameters, num_layers: int, cca_layers: Sequence[int]
                   ) -> list[dict[str, np.ndarray]]:
  """The decoder's layers 1..L in order, each with its own arrays, out of the stacked groups."""
  take = lambda prefix, index: {name: value[index]
                                for name, value in under(parameters, prefix).items()}
  if not cca_layers:
    return [take('decoder.prefix', i) for i in range(num_layers)]
  first, last = cca_layers[0], cca_layers[-1]
  layers = [take('decoder.prefix', i) for i in range(first - 1)]
  layers.append(under(parameters, 'decoder.entry'))
  group, repeat, gap = -1, 0, None
  for before, after in zip(cca_layers, cca_layers[1:]):
    if after - before == gap:
      repeat += 1
    else:
      group, repeat, gap = group + 1, 0, after - before
    for i in range(after - before - 1):
      layers.append(take(f'decoder.periods.{group}.lm.{i}', repeat))
    layers.append(take(f'decoder.periods.{group}.retro', repeat))
  return layers + [take('decoder.tail', i) for i in range(num_layers - last)]


def place_in_document(documents: Sequence[int]) -> list[int]:
  """How many tokens of its document stand before each, in this sequence."""
  return [sum(one == other for one in documents[:i]) for i, other in enumerate(documents)]


def embed(table: np.ndarray, tokens: np.ndarray) -> np.ndarray:
  """Rows of the table times the root of its width."""
  return np.asarray(table, np.float64)[tokens] * math.sqrt(table.shape[1])


def retro(
    parameters: Parameters, tokens: np.ndarray, documents: np.ndarray,
    neighbors: tuple[np.ndarray, np.ndarray] | None, *, m: int, num_layers: int,
    cca_layers: Sequence[int], encoder_cross_layers: Sequence[int] = (1,),
    epsilon: float = 1e-6, kind: str = 'gelu', scaled: bool = True, first_id: int = 0,
    frequency: Callable[[int, int], float] | None = None) -> np.ndarray:
  """Algorithm 1 for one sequence.

  Args:
    parameters: under their dotted names.
    tokens: [n].
    documents: [n], 0 for padding.
    neighbors: tokens [l, k, r] and mask [l, k, r], or None for RETRO[OFF].
    m: chunk length.
    num_layers: L.
    cca_layers: P.
    encoder_cross_layers: P_enc.
    epsilon, kind, scaled, first_id, frequency: what decoders of other families have otherwise:
      of their norms, of the activation, of the embeddings (see RetroConfig), rotary frequencies.

  Returns:
    Logits, float64 [n, V]; of the ids with a row.
  """
  look_up = lambda name, ids: embed(parameters[name], np.maximum(ids - first_id, 0))
  h = look_up('embedding.table', tokens)
  if not scaled:
    h = h / math.sqrt(h.shape[1])
  learned = parameters.get('position_embedding.table')
  if learned is not None:
    h = h + np.asarray(learned, np.float64)[place_in_document(documents)]
  own: dict[str, Any] = {'epsilon': epsilon, 'learned': learned is not None, 'frequency': frequency}
  encoded = None
  for number, p in enumerate(decoder_layers(parameters, num_layers, cca_layers), start=1):
    h = self_attention(under(p, 'attention'), h, documents, **own)
    if neighbors is not None and number in cca_layers:
      if number == min(cca_layers):
        table = ('encoder_embedding' if 'encoder_embedding.table' in parameters else 'embedding')
        encoded = encode(under(parameters, 'encoder'), look_up(f'{table}.table', neighbors[0]),
                         neighbors[1], h, documents, m, encoder_cross_layers)
      h = chunked_cross_attention(under(p, 'cca'), h, encoded, neighbors[1], documents, m)
    h = feed_forward(under(p, 'feed_forward'), h, epsilon, kind)
  h = norm(under(parameters, 'decoder.norm'), h, epsilon)
  read = parameters.get('head.table', parameters['embedding.table'])
  return h @ np.asarray(read, np.float64).T
