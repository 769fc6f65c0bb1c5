"""Decoding with caches: each token is computed once, each chunk's neighbours are encoded once.

The same mathematics as `Retro.hidden`, for rows (requests) that stand at different places of
their windows. A `Cache` keeps for every layer the keys and values of the tokens, for every CCA
layer those of the neighbours being read, and the last m rows of H, which condition the encoder.
Two programs change it, each compiled once: `advance`, one token for every row that reads no new
neighbours with it, and `extend`, up to m tokens of one row, with which neighbours may come.
Where rows stand is known to the caller (generation/engine.py); nothing here counts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.models import retro
from retro_jax.models.attention_kernels import Part
from retro_jax.models.chunked_cross_attention import ChunkedCrossAttention
from retro_jax.models.config import RetroConfig, layer_plan
from retro_jax.models.decoder import DecoderLayer, Period, SelfAttention

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """What one layer keeps of B rows; stacked layers have a leading axis more.

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
    layers: a `LayerCache` for each layer, in groups as in decoder.py.
    recent: H of the last m tokens, the latest last, [B, m, d]; None without neighbours.
    neighbor_mask: bool [B, k r], of the neighbours being read.
  """
  layers: dict[str, Any]
  recent: Array | None = None
  neighbor_mask: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
  """What depends on parameters and window alone: keys of distances, by layer as in `Cache`.

  Attributes:
    layers: for each layer (self-attention [h, n, c], CCA [h, m + r - 1, c]); None for what has no
      relative positions.
  """
  layers: dict[str, Any]


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

  def layer(retro: bool, *stacked: int) -> LayerCache:
    zeros = lambda shape: jnp.zeros((*stacked, *shape), dtype)
    if not (retro and k):
      return LayerCache(zeros(own), zeros(own))
    return LayerCache(zeros(own), zeros(own), zeros(read), zeros(read))

  plan = layer_plan(config)
  layers = {
      'prefix': layer(False, plan.prefix) if plan.prefix else None,
      'entry': layer(True) if plan.has_entry else None,
      'periods': [([layer(False, repeats) for _ in range(lm_layers)], layer(True, repeats))
                  for lm_layers, repeats in plan.periods],
      'tail': layer(False, plan.tail) if plan.tail else None}
  if not k:
    return Cache(layers)
  return Cache(layers, jnp.zeros((rows, config.chunk_length, config.d_model), dtype),
               jnp.zeros((rows, read[2]), bool))


@functools.partial(jax.jit, static_argnums=(0, 2))
def make_tables(config: RetroConfig, parameters: retro.Parameters, window: int) -> Tables:
  """The tables of a window of n = `window` tokens."""
  decoder, dtype = retro.build(config, parameters).decoder, config.compute_dtype
  m, r = config.chunk_length, config.retrieved_length

  def of(layer: DecoderLayer) -> tuple[Array | None, Array | None]:
    own, cca = layer.attention.attention, layer.cca and layer.cca.attention
    falling = lambda attention, *ends: (
        attention.distance_keys(np.arange(*ends, -1), dtype).swapaxes(0, 1)
        if attention is not None and attention.relative_positions else None)
    return falling(own, window - 1, -1), falling(cca, 2 * m - 2, m - 1 - r)

  def stacked(stack: nnx.Module | None) -> Any:
    if stack is None:
      return None
    structure, values = nnx.split(stack)

    def run(values: Any) -> Any:
      module = nnx.merge(structure, values)
      if isinstance(module, Period):
        return [of(layer) for layer in module.lm], of(module.retro)
      return of(module)

    return jax.vmap(run)(values)

  return Tables({'prefix': stacked(decoder.prefix),
                 'entry': of(decoder.entry) if decoder.entry is not None else None,
                 'periods': [stacked(period) for period in decoder.periods],
                 'tail': stacked(decoder.tail)})


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def advance(config: RetroConfig, parameters: retro.Parameters, tables: Tables, cache: Cache,
            tokens: Array, places: Places, active: Array) -> tuple[Cache, Array]:
  """One token of every active row, which brings no new neighbours.

  Args:
    config: of the model.
    parameters: by dotted name.
    tables: of the window.
    cache: given up for the one returned.
    tokens: int32 [B].
    places: of the rows; the place of an active one is less than n.
    active: bool [B]; nothing of the other rows changes.

  Returns:
    cache, and float32 logits [B, V] about the token after this one, of active rows.
  """
  model = retro.build(config, parameters)
  window = _window(cache)
  run = _Run(config, places, window, cache.neighbor_mask)
  hidden, new, h = run(model, tokens[:, None], cache.layers, tables.layers)
  rows = jnp.arange(len(tokens))
  written = jnp.where(active, places.place, window)[:, None]  # beyond the window: dropped
  layers = _with_tokens(cache.layers, new, rows, written)
  recent = cache.recent
  if recent is not None:
    later = jnp.concatenate([recent[:, 1:], h], 1)
    recent = jnp.where(active[:, None, None], later, recent)
  return Cache(layers, recent, cache.neighbor_mask), model.read(hidden[:, 0])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def extend(config: RetroConfig, parameters: retro.Parameters, tables: Tables, cache: Cache,
           row: Array, tokens: Array, count: Array, places: Places, fresh: Array,
           complete: Array, found: retro.Retrieval | None) -> tuple[Cache, Array]:
  """The next tokens of one row; with the last of them may come new neighbours.

  Args:
    config: of the model.
    parameters: by dotted name.
    tables: of the window.
    cache: given up for the one returned.
    row: which.
    tokens: int32 [m], the first `count` of which are read.
    count: at least 1.
    places: of this row, each [1].
    fresh: whether the row begins here, and reads none of the neighbours that lie there.
    complete: whether the last m tokens, with the last of these, asked for `found`. That token
      is the first that reads them, as position um is the first to read E_u.
    found: neighbours, [1, 1, k, r]; None where the cache has no place for any.

  Returns:
    cache, and float32 logits [V] about the token after the last one.
  """
  model, m = retro.build(config, parameters), config.chunk_length
  window = _window(cache)
  own = lambda x, axis=0: jax.lax.dynamic_slice_in_dim(x, row, 1, axis)
  layers = jax.tree.map(lambda x: own(x, x.ndim - 4), cache.layers)
  mask = recent = encode = None
  if found is not None:
    mask = own(cache.neighbor_mask) & ~fresh
    recent = own(cache.recent)
    last = places.place + count - m + jnp.arange(m)  # places of the last m tokens
    # A token before this call has its H in the cache, even if it is of an earlier chunk.
    h_mask = (last >= places.start[0])[None, None]

    def encode(h: Array) -> Array:
      asking = _last(recent, h, count)[:, None]
      run = lambda: model.encode(found, asking, h_mask)
      return jax.lax.cond(complete, run, lambda: jnp.zeros_like(jax.eval_shape(run)))[:, 0]

  run = _Run(config, places, window, mask, encode, complete, count - 1,
             None if found is None else found.mask.reshape(1, -1))
  hidden, new, h = run(model, tokens[None], layers, tables.layers)
  written = places.place + jnp.arange(m)
  written = jnp.where(jnp.arange(m) < count, written, window)[None]
  layers = _with_tokens(cache.layers, new, row[None], written)
  layers = _with_neighbors(layers, new, row)
  if found is not None:
    put = lambda x, value: jax.lax.dynamic_update_slice_in_dim(x, value, row, 0)
    mask = jnp.where(complete, found.mask.reshape(1, -1), mask)
    cache = Cache(layers, put(cache.recent, _last(recent, h, count)),
                  put(cache.neighbor_mask, mask))
  else:
    cache = Cache(layers)
  return cache, model.read(hidden[0, count - 1])


class _New(NamedTuple):
  """What a layer adds to its cache: keys and values of tokens and, if they came, of neighbours."""
  keys: Array
  values: Array
  neighbor_keys: Array | None = None
  neighbor_values: Array | None = None


@dataclasses.dataclass(frozen=True)
class _Run:
  """One pass of [b, t] tokens over caches of b rows.

  Attributes:
    places: of the rows; the t tokens stand side by side.
    window: n.
    neighbor_mask: bool [b, k r], of the neighbours that are there; None for no retrieval.
    encode: gives E [b, k, r, d'] from H [b, t, d], where neighbours may come.
    complete, last: whether they do come, and with which token.
    found_mask: bool [b, k r], of those that come.
  """
  config: RetroConfig
  places: Places
  window: int
  neighbor_mask: Array | None
  encode: Callable[[Array], Array] | None = None
  complete: Array | None = None
  last: Array | None = None
  found_mask: Array | None = None

  def __call__(self, model: retro.Retro, tokens: Array, caches: dict[str, Any],
               tables: dict[str, Any]) -> tuple[Array, dict[str, Any], Array | None]:
    """Activations [b, t, d] for READ, what the caches gain, and H."""
    dtype, decoder = self.config.compute_dtype, model.decoder
    h = model.embedding(tokens, dtype)
    if model.position_embedding is not None:
      h += model.position_embedding(self._own(tokens) - self.places.start[:, None], dtype)
    new: dict[str, Any] = {'entry': None, 'periods': []}
    h, new['prefix'] = self._scan(decoder.prefix, h, caches['prefix'], tables['prefix'], None)
    of_entry = encoded = None
    if decoder.entry is not None:
      cache, table = caches['entry'], tables['entry']
      of_entry, added = self._attend(decoder.entry.attention, h, cache, table)
      encoded = self.encode(of_entry) if self.encode is not None else None
      h, found = self._read(decoder.entry.cca, of_entry, cache, table, encoded)
      h, new['entry'] = decoder.entry.feed_forward(h), _New(*added, *found)
    for period, cache, table in zip(decoder.periods, caches['periods'], tables['periods']):
      h, gained = self._scan(period, h, cache, table, encoded)
      new['periods'].append(gained)
    h, new['tail'] = self._scan(decoder.tail, h, caches['tail'], tables['tail'], None)
    return decoder.norm(h), new, of_entry

  def _scan(self, stack: nnx.Module | None, h: Array, caches: Any, tables: Any,
            encoded: Array | None) -> tuple[Array, Any]:
    """Applies a stack of equal modules, each to its own cache."""
    if stack is None:
      return h, None
    structure, parameters = nnx.split(stack)

    def body(h: Array, one: Any) -> tuple[Array, Any]:
      values, cache, table = one
      module = nnx.merge(structure, values)
      if not isinstance(module, Period):
        return self._layer(module, h, cache, table, None)
      gained = []
      for layer, own, own_table in zip(module.lm, cache[0], table[0]):
        h, new = self._layer(layer, h, own, own_table, None)
        gained.append(new)
      h, new = self._layer(module.retro, h, cache[1], table[1], encoded)
      return h, (gained, new)

    return jax.lax.scan(body, h, (parameters, caches, tables))

  def _layer(self, layer: DecoderLayer, h: Array, cache: LayerCache, tables: Any,
             encoded: Array | None) -> tuple[Array, _New]:
    h, added = self._attend(layer.attention, h, cache, tables)
    found = ()
    if layer.cca is not None:
      h, found = self._read(layer.cca, h, cache, tables, encoded)
    return layer.feed_forward(h), _New(*added, *found)

  def _own(self, tokens: Array) -> Array:
    """Places of the tokens, int32 [b, t]; those of unread ones stay inside the window."""
    return jnp.minimum(self.places.place[:, None] + jnp.arange(tokens.shape[1]), self.window - 1)

  def _attend(self, attention: SelfAttention, h: Array, cache: LayerCache, tables: Any
              ) -> tuple[Array, tuple[Array, Array]]:
    """ATTN: to the row's tokens in the cache, and to these up to each."""
    rows, window = self._own(h), self.window
    normed = attention.norm(h)
    keys, values = attention.attention.keys_and_values(normed, rows, window)
    order, t = jnp.arange(window)[None], h.shape[1]
    there = (order < self.places.place[:, None]) & (order >= self.places.start[:, None])
    there = jnp.broadcast_to(there[:, None], (len(h), t, window))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (len(h), t, t))
    parts = (Part(cache.keys, cache.values, there, order), Part(keys, values, causal, rows))
    read = attention.attention.read(normed, rows, parts, tables[0], 0, window)
    return h + read, (keys, values)

  def _read(self, cca: ChunkedCrossAttention, h: Array, cache: LayerCache, tables: Any,
            encoded: Array | None) -> tuple[Array, tuple[Array, ...]]:
    """CCA: of the neighbours in the cache, and of those that come with the last token."""
    if self.neighbor_mask is None:
      return h, ()
    config, t = self.config, h.shape[1]
    m, r = config.chunk_length, config.retrieved_length
    k = self.neighbor_mask.shape[-1] // r
    columns = jnp.tile(jnp.arange(r), k)[None]
    normed = cca.norm(h)

    def read(x: Array, since: Array, keys: Array, values: Array, mask: Array) -> Array:
      part = Part(keys, values, mask[:, None] & (since < m)[..., None], columns)
      return cca.attention.read(x, jnp.minimum(since, m - 1), (part,), tables[1], m - 1, m)

    since = self.places.since[:, None] + jnp.arange(t)
    old = cache.neighbor_keys, cache.neighbor_values
    mixed = read(normed, since, *old, self.neighbor_mask)
    if encoded is None:
      return h + mixed, ()
    keys, values = cca.attention.keys_and_values(encoded, jnp.arange(r), r)
    # [b, k, h, r, c] -> [b, h, k r, c]
    flat = lambda x: x.swapaxes(1, 2).reshape(len(h), x.shape[2], k * r, x.shape[-1])
    new = flat(keys), flat(values)
    asking = jax.lax.dynamic_slice_in_dim(normed, self.last, 1, 1)
    first = read(asking, jnp.zeros((len(h), 1), jnp.int32), *new, self.found_mask)
    here = (jnp.arange(t) == self.last)[None, :, None] & self.complete
    kept = tuple(jnp.where(self.complete, mine, other) for mine, other in zip(new, old))
    return h + jnp.where(here, first, mixed), kept


def _window(cache: Cache) -> int:
  leaf = next(x for x in jax.tree.leaves(cache.layers, is_leaf=_is_layer) if _is_layer(x))
  return leaf.keys.shape[-2]


def _is_layer(x: Any) -> bool:
  return isinstance(x, LayerCache)


def _last(recent: Array, h: Array, count: Array) -> Array:
  """The m rows of H that end with the `count`-th of h [1, t, d]; recent [1, m, d] are before."""
  both = jnp.concatenate([recent, h], 1)
  return jax.lax.dynamic_slice_in_dim(both, count, recent.shape[1], 1)


def _with_tokens(layers: dict[str, Any], new: dict[str, Any], rows: Array, places: Array
                 ) -> dict[str, Any]:
  """The caches with what tokens gave [..., b, kv heads, t, c] at `places` [b, t] of `rows` [b]."""
  def put(x: Array, value: Array) -> Array:
    stacked, heads = (slice(None),) * (x.ndim - 4), jnp.arange(x.shape[-3])
    at = (*stacked, rows[:, None, None], heads[:, None], places[:, None])
    return x.at[at].set(value, mode='drop')

  return jax.tree.map(lambda cache, gained: dataclasses.replace(
      cache, keys=put(cache.keys, gained.keys), values=put(cache.values, gained.values)),
      layers, new, is_leaf=_is_layer)


def _with_neighbors(layers: dict[str, Any], new: dict[str, Any], row: Array) -> dict[str, Any]:
  """The caches with the neighbours that one row now reads."""
  def put(x: Array, value: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, value, row, x.ndim - 4)

  def of(cache: LayerCache, gained: _New) -> LayerCache:
    if gained.neighbor_keys is None:
      return cache
    return dataclasses.replace(
        cache, neighbor_keys=put(cache.neighbor_keys, gained.neighbor_keys),
        neighbor_values=put(cache.neighbor_values, gained.neighbor_values))

  return jax.tree.map(of, layers, new, is_leaf=_is_layer)
