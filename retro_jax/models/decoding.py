"""Decoding with caches: each token is computed once, each chunk's neighbours are encoded once.

The same mathematics as `Retro.hidden`, for rows (requests) that stand at different places of
their windows. A `Cache` keeps for every layer the keys and values of the tokens, for every CCA
layer those of the neighbours being read, and the last m rows of H, which condition the encoder.
Two functions change it: `advance`, one token for every row that reads no new neighbours with it,
and `extend`, some tokens of one row, with which neighbours may come. They are compiled for each
shape: `extend` for m tokens, of prompts, and for 1.
Where rows stand is known to the caller (generation/engine.py); nothing here counts.

Layers are not stacked and scanned as in decoder.py but lie one by one (`Weights`): a step would
copy each one's weights, keys and values out of the stack, which takes longer than to use them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.models import layouts, retro
from retro_jax.models.chunked_cross_attention import ChunkedCrossAttention
from retro_jax.models.config import RetroConfig
from retro_jax.models.decoder import DecoderLayer, SelfAttention

Array = jax.Array
# Keys of distances of one layer: of its self-attention [h, n, c], of its CCA [h, m + r - 1, c];
# None for what has no relative positions.
Tables = tuple[Array | None, Array | None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
  """A model's parameters with its layers one by one, and what depends on them and n alone.

  Attributes:
    shared: parameters that belong to no layer of the decoder, by dotted name.
    layers: of each layer, by name within the layer.
    tables: of each layer.
  """
  shared: retro.Parameters
  layers: tuple[retro.Parameters, ...]
  tables: tuple[Tables, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """What one layer keeps of B rows.

  Attributes:
    keys, values: of tokens, [B, kv heads, n, c]; what is beyond a row's place means nothing.
    neighbor_keys, neighbor_values: of the k neighbours being read, [B, h, k r, c], in CCA layers
      that read.
  """
  keys: Array
  values: Array
  neighbor_keys: Array | None = None
  neighbor_values: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What the model keeps of B rows between calls.

  Attributes:
    layers: a `LayerCache` for each layer.
    recent: H of the last m tokens, the latest last, [B, m, d]; None without neighbours.
    neighbor_mask: bool [B, k r], of the neighbours being read.
  """
  layers: tuple[LayerCache, ...]
  recent: Array | None = None
  neighbor_mask: Array | None = None


class Places(NamedTuple):
  """Where rows stand; each int32 [b].

  Attributes:
    place: of the next token in the window, from 0.
    start: of the row's first token: what is before it, padding, is read by nobody.
    since: how many tokens were read since the row's neighbours came, that with which they came
      included.
  """
  place: Array
  start: Array
  since: Array


def empty_cache(config: RetroConfig, rows: int, window: int, num_neighbors: int = 0) -> Cache:
  """A cache of zeros.

  Args:
    config: of the model.
    rows: B.
    window: n, tokens a row can hold.
    num_neighbors: k; 0 where nothing is retrieved, which needs no place for neighbours.
  """
  dtype, k = config.compute_dtype, num_neighbors if config.has_retrieval else 0
  own = (rows, config.kv_heads, window, config.head_dim)
  read = (rows, config.num_heads, k * config.retrieved_length, config.head_dim)
  layers = []
  for number in range(1, config.num_layers + 1):
    shapes = (own, own, read, read) if k and number in config.cca_layers else (own, own)
    layers.append(LayerCache(*(jnp.zeros(shape, dtype) for shape in shapes)))
  if not k:
    return Cache(tuple(layers))
  return Cache(tuple(layers), jnp.zeros((rows, config.chunk_length, config.d_model), dtype),
               jnp.zeros((rows, read[2]), bool))


@functools.partial(jax.jit, static_argnums=(0, 2))
def prepare(config: RetroConfig, parameters: retro.Parameters, window: int) -> Weights:
  """A model's parameters, by dotted name, for a window of n = `window` tokens."""
  shared, layers = layouts.by_layer(config, parameters)
  dtype, m, r = config.compute_dtype, config.chunk_length, config.retrieved_length

  def tables(layer: DecoderLayer) -> Tables:
    own, cca = layer.attention.attention, layer.cca and layer.cca.attention
    falling = lambda attention, *ends: (
        attention.distance_keys(np.arange(*ends, -1), dtype).swapaxes(0, 1)
        if attention is not None and attention.relative_positions else None)
    return falling(own, window - 1, -1), falling(cca, 2 * m - 2, m - 1 - r)

  return Weights(shared, layers, tuple(
      tables(layer) for layer in _layers(config, layers)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(config: RetroConfig, weights: Weights, cache: Cache, tokens: Array, places: Places,
            active: Array) -> tuple[Cache, Array]:
  """One token of every active row, which brings no new neighbours.

  Args:
    config: of the model.
    weights: of the model and the window.
    cache: given up for the one returned.
    tokens: int32 [B].
    places: of the rows; the place of an active one is less than n.
    active: bool [B]; nothing of the other rows changes.

  Returns:
    cache, and float32 logits [B, V] about the token after this one, of active rows.
  """
  run = _Run(config, places, jnp.arange(len(tokens)), active[:, None], cache.neighbor_mask)
  model, kept, hidden, h = run(weights, tokens[:, None], cache.layers)
  recent = cache.recent
  if recent is not None:
    later = jnp.concatenate([recent[:, 1:], h], 1)
    recent = jnp.where(active[:, None, None], later, recent)
  return Cache(kept, recent, cache.neighbor_mask), model.read(hidden[:, 0])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def extend(config: RetroConfig, weights: Weights, cache: Cache, row: Array, tokens: Array,
           count: Array, places: Places, fresh: Array, complete: Array,
           found: retro.Retrieval | None) -> tuple[Cache, Array]:
  """The next tokens of one row; with the last of them may come new neighbours.

  Args:
    config: of the model.
    weights: of the model and the window.
    cache: given up for the one returned.
    row: which.
    tokens: int32 [t], the first `count` of which are read; t is 1 to m.
    count: at least 1.
    places: of this row, each [1].
    fresh: whether the row begins here, and reads none of the neighbours that lie there.
    complete: whether the last m tokens, with the last of these, asked for `found`. That token
      is the first that reads them, as position um is the first to read E_u.
    found: neighbours, [1, 1, k, r]; None where the cache has no place for any.

  Returns:
    cache, and float32 logits [V] about the token after the last one.
  """
  m = config.chunk_length
  read = (jnp.arange(len(tokens)) < count)[None]
  if found is None:
    run = _Run(config, places, row[None], read)
    model, kept, hidden, _ = run(weights, tokens[None], cache.layers)
    return Cache(kept), model.read(hidden[0, count - 1])

  recent, found_mask = _row(cache.recent, row), found.mask.reshape(1, -1)
  mask = _row(cache.neighbor_mask, row) & ~fresh
  last = places.place + count - m + jnp.arange(m)  # places of the last m tokens
  # A token before this call has its H in the cache, even if it is of an earlier chunk.
  h_mask = (last >= places.start[0])[None, None]

  def encode(model: retro.Retro, h: Array) -> Array:
    asking = _last(recent, h, count)[:, None]
    run = lambda: model.encode(found, asking, h_mask)
    return jax.lax.cond(complete, run, lambda: jnp.zeros_like(jax.eval_shape(run)))[:, 0]

  run = _Run(config, places, row[None], read, mask, encode, complete, count - 1, found_mask)
  model, kept, hidden, h = run(weights, tokens[None], cache.layers)
  cache = Cache(kept, _with_row(cache.recent, _last(recent, h, count), row),
                _with_row(cache.neighbor_mask, jnp.where(complete, found_mask, mask), row))
  return cache, model.read(hidden[0, count - 1])


@dataclasses.dataclass(frozen=True)
class _Run:
  """One pass of [b, t] tokens, which lie side by side in b rows of a cache.

  Attributes:
    config: of the model.
    places: of the rows.
    rows: int32 [b], which of the cache's: all of them, or one.
    read: bool [b, t]; of tokens that are not read nothing is kept, and activations mean nothing.
    neighbor_mask: bool [b, k r], of the neighbours that are there; None for no retrieval.
    encode: gives E [b, k, r, d'] from H [b, t, d], where neighbours may come.
    complete, last: whether they do come, and with which token.
    found_mask: bool [b, k r], of those that come.
  """
  config: RetroConfig
  places: Places
  rows: Array
  read: Array
  neighbor_mask: Array | None = None
  encode: Callable[[retro.Retro, Array], Array] | None = None
  complete: Array | None = None
  last: Array | None = None
  found_mask: Array | None = None

  def __call__(self, weights: Weights, tokens: Array, caches: Sequence[LayerCache]
               ) -> tuple[retro.Retro, tuple[LayerCache, ...], Array, Array | None]:
    """The model, for READ, the new caches, activations [b, t, d] to read, and H."""
    model, entry = _model(self.config, weights), min(self.config.cca_layers, default=0)
    layers, dtype = _layers(self.config, weights.layers), self.config.compute_dtype
    x = model.embedding(tokens, dtype)
    if model.position_embedding is not None:
      own = jnp.minimum(self._own_places, caches[0].keys.shape[2] - 1)
      x += model.position_embedding(own - self.places.start[:, None], dtype)
    kept, h, encoded = [], None, None
    for number, (layer, cache, table) in enumerate(zip(layers, caches, weights.tables), start=1):
      x, cache = self._attend(layer.attention, x, cache, table[0])
      if number == entry:
        h = x
        encoded = self.encode(model, h) if self.encode is not None else None
      if layer.cca is not None and self.neighbor_mask is not None:
        x, cache = self._ask(layer.cca, x, cache, table[1], encoded)
      x = layer.feed_forward(x)
      kept.append(cache)
    return model, tuple(kept), model.decoder.norm(x), h

  @property
  def _own_places(self) -> Array:
    """Places of the tokens, int32 [b, t]; those of unread ones may lie beyond the window."""
    return self.places.place[:, None] + jnp.arange(self.read.shape[1])

  def _of_rows(self, x: Array) -> Array:
    """This pass's rows of a cache."""
    return x if len(self.rows) == len(x) else _row(x, self.rows[0])

  def _attend(self, attention: SelfAttention, x: Array, cache: LayerCache,
              of_distance: Array | None) -> tuple[Array, LayerCache]:
    """ATTN. Tokens are first put into the cache and then read from it like all others.

    Not the other way around: a cache that is read after it was changed is changed in place.
    """
    window = cache.keys.shape[2]
    own, order = jnp.minimum(self._own_places, window - 1), jnp.arange(window)
    normed = attention.norm(x)
    keys, values = attention.attention.keys_and_values(normed, own, window)
    cache = dataclasses.replace(cache, keys=self._with_tokens(cache.keys, keys),
                                values=self._with_tokens(cache.values, values))
    mask = (order <= own[..., None]) & (order >= self.places.start[:, None, None])
    mixed = attention.attention.read(
        normed, own, self._of_rows(cache.keys), self._of_rows(cache.values), mask, order[None],
        of_distance, 0, window)
    return x + mixed, cache

  def _with_tokens(self, x: Array, value: Array) -> Array:
    """A cache with what its rows' tokens gave, [b, kv heads, t, c]."""
    places = jnp.where(self.read, self._own_places, x.shape[2])
    at = self.rows[:, None, None], jnp.arange(x.shape[1])[:, None], places[:, None]
    return x.at[at].set(value, mode='drop')  # beyond the window: dropped

  def _ask(self, cca: ChunkedCrossAttention, x: Array, cache: LayerCache,
           of_distance: Array | None, encoded: Array | None) -> tuple[Array, LayerCache]:
    """CCA: of the neighbours in the cache, and of those that come with the last token."""
    config, t = self.config, x.shape[1]
    m, r = config.chunk_length, config.retrieved_length
    k = self.neighbor_mask.shape[-1] // r
    columns = jnp.tile(jnp.arange(r), k)[None]
    normed = cca.norm(x)

    def read(asking: Array, since: Array, keys: Array, values: Array, mask: Array) -> Array:
      readers = mask[:, None] & (since < m)[..., None]
      return cca.attention.read(asking, jnp.minimum(since, m - 1), keys, values, readers, columns,
                                of_distance, m - 1, m)

    since = self.places.since[:, None] + jnp.arange(t)
    old = self._of_rows(cache.neighbor_keys), self._of_rows(cache.neighbor_values)
    mixed = read(normed, since, *old, self.neighbor_mask)
    if encoded is None:
      return x + mixed, cache
    keys, values = cca.attention.keys_and_values(encoded, jnp.arange(r), r)
    # [b, k, h, r, c] -> [b, h, k r, c]
    flat = lambda y: y.swapaxes(1, 2).reshape(len(x), y.shape[2], k * r, y.shape[-1])
    new = flat(keys), flat(values)
    asking = jax.lax.dynamic_slice_in_dim(normed, self.last, 1, 1)
    first = read(asking, jnp.zeros((len(x), 1), jnp.int32), *new, self.found_mask)
    here = (jnp.arange(t) == self.last)[None, :, None] & self.complete
    put = lambda whole, mine, other: _with_row(
        whole, jnp.where(self.complete, mine, other), self.rows[0])
    cache = dataclasses.replace(
        cache, neighbor_keys=put(cache.neighbor_keys, new[0], old[0]),
        neighbor_values=put(cache.neighbor_values, new[1], old[1]))
    return x + jnp.where(here, first, mixed), cache


def _model(config: RetroConfig, weights: Weights) -> retro.Retro:
  """The model but for the decoder's layers, which are there by shape only."""
  shapes = jax.eval_shape(lambda: retro.init_parameters(config, jax.random.key(0)))
  return retro.build(config, {**shapes, **weights.shared})


def _layers(config: RetroConfig, parameters: Sequence[retro.Parameters]) -> list[DecoderLayer]:
  """The decoder's layers, 1 to L."""
  return [retro.filled(
      lambda: DecoderLayer(config, retro=number in config.cca_layers, rngs=nnx.Rngs(params=0)),
      own) for number, own in enumerate(parameters, start=1)]


def _row(x: Array, row: Array) -> Array:
  """One row of a cache, [1, ...]."""
  return jax.lax.dynamic_slice_in_dim(x, row, 1)


def _with_row(x: Array, value: Array, row: Array) -> Array:
  """A cache with another row."""
  return jax.lax.dynamic_update_slice_in_dim(x, value, row, 0)


def _last(recent: Array, h: Array, count: Array) -> Array:
  """The m rows of H that end with the `count`-th of h [1, t, d]; recent [1, m, d] are before."""
  both = jnp.concatenate([recent, h], 1)
  return jax.lax.dynamic_slice_in_dim(both, count, recent.shape[1], 1)
