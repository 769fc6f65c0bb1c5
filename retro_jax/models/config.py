"""Sizes of a model, the pattern of its layers, and its parameter counts by formula-free means.

Symbols of the paper: n sequence length, m `chunk_length`, k `num_neighbors`,
r `retrieved_length`, d `d_model`, d' `encoder_d_model`, L `num_layers`,
P `cca_layers`, L_enc `encoder_layers`, P_enc `encoder_cross_attention_layers`.
The arrays themselves live in the modules beside this file.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from retro_jax.models.attention_kernels import KERNELS, RELATIVE_KERNELS, ROTARY_KERNELS

_DTYPES = ('float32', 'bfloat16')
_POSITIONS = ('relative', 'rotary', 'learned')
_RETRIEVAL_POSITIONS = ('', 'relative', 'rotary')
_CCA_POSITIONS = (*_RETRIEVAL_POSITIONS, 'none')
_NORMS = ('rms', 'layer')
_ACTIVATIONS = ('gelu', 'gelu_exact', 'silu')
_REMAT = ('none', 'dots', 'projections', 'attention', 'full')

# What parameters of a decoder mean beside their shapes.
OF_THE_DECODER = ('positions', 'rotary_base', 'rotary_scaling', 'norm', 'norm_epsilon',
                  'activation', 'gated', 'tied_read', 'scaled_embeddings', 'padding_row')


@dataclasses.dataclass(frozen=True)
class RetroConfig:
  """One RETRO model, or, with `cca_layers=()`, its baseline without retrieval.

  Attributes:
    vocab_size: V, rows of the embedding table (128,000 in the paper).
    d_model: d, width of the decoder.
    num_layers: L.
    num_heads, head_dim: of every attention in the decoder, CCA included.
    d_ff: width of the feed-forward layer; 0 means 4 d, as in the paper.
    chunk_length: m, tokens to a chunk.
    num_neighbors: k in training; any k can be used in evaluation.
    retrieved_length: r, tokens to a neighbour with its continuation; 0 means 2 m.
    cca_layers: P, 1-indexed layers with chunked cross-attention; () is the baseline.
    encoder_*: the same for the neighbour encoder; `encoder_d_ff=0` means 4 d'.
    encoder_cross_attention_layers: P_enc, 1-indexed.
    share_embeddings: one table for decoder and encoder (needs d = d').
    dtype: of activations and matrix products; parameters, softmax and loss are float32.
    remat: what the backward pass recomputes, layer by layer: 'none'; 'dots', all but products
      with parameters and what attention gave; 'projections', all but queries, keys, values
      and what attention gave; 'attention', all but the latter; 'full', everything.
    scan_layers: whether layers that repeat are compiled once and looped over. If not, each is
      compiled for itself: XLA for CPUs and GPUs then copies less; parameters stay stacked.
    positions: 'relative' as in the paper; 'rotary', which has no parameters of its own and which
      the fused kernels know; or 'learned', a vector for each place in a document, added to the
      embeddings (GPT-2).
    retrieval_positions: 'relative' or 'rotary', of CCA and encoder; '' for those of the decoder,
      beside learned ones 'relative'.
    cca_positions: of CCA alone: '' for `retrieval_positions`, or 'none', the paper's ablation.
    max_positions: rows of the table of 'learned' positions: the longest sequence.
    rotary_base: of the decoder's self-attention; CCA and encoder have 10,000.
    rotary_scaling: () or Llama 3's (factor, low_freq_factor, high_freq_factor,
      original_max_position), in the decoder's self-attention.
    num_kv_heads: heads of keys and values in the decoder's self-attention, each for as many of
      queries; 0 for num_heads.
    norm, norm_epsilon: 'rms' or 'layer' (with bias), in the decoder's own layers; CCA and encoder
      always have 'rms'.
    activation, gated: of the decoder's FFW: 'gelu' (its tanh form), 'gelu_exact' or 'silu'; gated
      multiplies what comes out of it by a third matrix's product.
    qkv_bias, output_bias, ffw_bias: of the decoder's self-attention and FFW.
    tied_read: READ has the table of the embeddings; else one of its own.
    scaled_embeddings: multiply the decoder's by sqrt(d).
    padding_row: id 0, padding, has a row in the tables, as every id. Vocabularies of public
      models know no padding: their ids are moved up by one, and the tables have no row for 0.
    attention_kernel: how decoder self-attention is computed (attention_kernels.py).
    attention_block: rows at a time in it, 0 for the kernel's choice.
    loss_block: tokens of each sequence whose logits exist at a time, 0 for all.
  """
  vocab_size: int = 128_000
  d_model: int = 896
  num_layers: int = 12
  num_heads: int = 16
  head_dim: int = 64
  d_ff: int = 0
  chunk_length: int = 64
  num_neighbors: int = 2
  retrieved_length: int = 0
  cca_layers: Sequence[int] = (6, 9, 12)
  encoder_d_model: int = 896
  encoder_layers: int = 2
  encoder_heads: int = 16
  encoder_head_dim: int = 64
  encoder_d_ff: int = 0
  encoder_cross_attention_layers: Sequence[int] = (1,)
  share_embeddings: bool = False
  dtype: str = 'float32'
  remat: str = 'none'
  scan_layers: bool = True
  positions: str = 'relative'
  retrieval_positions: str = ''
  cca_positions: str = ''
  max_positions: int = 0
  rotary_base: float = 10_000.0
  rotary_scaling: Sequence[float] = ()
  num_kv_heads: int = 0
  norm: str = 'rms'
  norm_epsilon: float = 1e-6
  activation: str = 'gelu'
  gated: bool = False
  qkv_bias: bool = False
  output_bias: bool = False
  ffw_bias: bool = False
  tied_read: bool = True
  scaled_embeddings: bool = True
  padding_row: bool = True
  attention_kernel: str = 'blocked'
  attention_block: int = 0
  loss_block: int = 512

  def __post_init__(self):
    fill = lambda name, value: object.__setattr__(self, name, value)
    fill('cca_layers', tuple(self.cca_layers))
    fill('encoder_cross_attention_layers', tuple(self.encoder_cross_attention_layers))
    fill('rotary_scaling', tuple(self.rotary_scaling))
    fill('d_ff', self.d_ff or 4 * self.d_model)
    fill('encoder_d_ff', self.encoder_d_ff or 4 * self.encoder_d_model)
    fill('retrieved_length', self.retrieved_length or 2 * self.chunk_length)
    self._check()

  def _check(self) -> None:
    for field in ('vocab_size', 'd_model', 'num_layers', 'num_heads', 'head_dim', 'chunk_length',
                  'num_neighbors', 'encoder_d_model', 'encoder_layers', 'encoder_heads'):
      if getattr(self, field) < 1:
        raise ValueError(f'RetroConfig.{field} = {getattr(self, field)}, expected at least 1')
    for field, top in (('cca_layers', self.num_layers),
                       ('encoder_cross_attention_layers', self.encoder_layers)):
      layers = getattr(self, field)
      if list(layers) != sorted(set(layers)) or any(not 1 <= p <= top for p in layers):
        raise ValueError(f'RetroConfig.{field} = {layers}, expected rising layer numbers from 1 to '
                         f'{top}')
    if self.d_model % 2 or self.encoder_d_model % 2:
      raise ValueError('RetroConfig: widths must be even (sine and cosine halves of the positions)')
    if self.share_embeddings and self.cca_layers and self.d_model != self.encoder_d_model:
      raise ValueError(f'RetroConfig.share_embeddings needs d_model = encoder_d_model, '
                       f'got {self.d_model} and {self.encoder_d_model}')
    for field, known in (('dtype', _DTYPES), ('remat', _REMAT), ('positions', _POSITIONS),
                         ('retrieval_positions', _RETRIEVAL_POSITIONS),
                         ('cca_positions', _CCA_POSITIONS), ('norm', _NORMS),
                         ('activation', _ACTIVATIONS), ('attention_kernel', KERNELS)):
      value = getattr(self, field)
      if value not in known:
        raise ValueError(f'RetroConfig.{field} = {value!r}, expected one of {known}')
    if self.attention_kernel in ROTARY_KERNELS and self.positions == 'relative':
      raise ValueError(
          f'RetroConfig.attention_kernel = {self.attention_kernel!r} knows no relative positions; '
          "set RetroConfig.positions = 'rotary' (gin/models/rotary.gin), or "
          "RetroConfig.attention_kernel = 'blocked'")
    if self.attention_kernel in RELATIVE_KERNELS and self.positions != 'relative':
      raise ValueError(
          f'RetroConfig.attention_kernel = {self.attention_kernel!r} is for relative positions, but '
          f"positions = {self.positions!r}; set RetroConfig.attention_kernel = 'splash'")
    rotary = 'rotary' in (self.positions, self.positions_of_retrieval, self.positions_of_cca)
    if rotary and (self.head_dim % 2 or self.encoder_head_dim % 2):
      raise ValueError('RetroConfig: rotary positions need an even head_dim')
    for field in ('attention_block', 'loss_block', 'num_kv_heads', 'max_positions'):
      if getattr(self, field) < 0:
        raise ValueError(f'RetroConfig.{field} = {getattr(self, field)}, expected 0 or more')
    if self.num_heads % self.kv_heads:
      raise ValueError(f'RetroConfig.num_kv_heads = {self.num_kv_heads} does not divide num_heads '
                       f'= {self.num_heads}')
    if (self.positions == 'learned') != (self.max_positions > 0):
      raise ValueError(f'RetroConfig.max_positions = {self.max_positions}: the number of learned '
                       f'positions, but positions = {self.positions!r}')
    if self.positions != 'rotary' and (self.rotary_scaling or self.rotary_base != 10_000.0):
      raise ValueError('RetroConfig: rotary_base and rotary_scaling change rotary positions, but '
                       f'positions = {self.positions!r}')
    if self.rotary_scaling and (len(self.rotary_scaling) != 4 or min(self.rotary_scaling) <= 0):
      raise ValueError(f'RetroConfig.rotary_scaling = {self.rotary_scaling}, expected () or '
                       '(factor, low_freq_factor, high_freq_factor, original_max_position)')

  @property
  def compute_dtype(self):
    return jnp.dtype(self.dtype)

  @property
  def kv_heads(self) -> int:
    """Heads of keys and values in the decoder's self-attention."""
    return self.num_kv_heads or self.num_heads

  @property
  def positions_of_retrieval(self) -> str:
    """'relative' or 'rotary': positions of the encoder, and of CCA if it has no others."""
    own = 'relative' if self.positions == 'learned' else self.positions
    return self.retrieval_positions or own

  @property
  def positions_of_cca(self) -> str:
    """'relative', 'rotary' or 'none'."""
    return self.cca_positions or self.positions_of_retrieval

  @property
  def rows(self) -> int:
    """Rows of the tables of embeddings and of READ."""
    return self.vocab_size - self.first_id

  @property
  def first_id(self) -> int:
    """The id whose vector is the first row of those tables."""
    return 0 if self.padding_row else 1

  @property
  def has_retrieval(self) -> bool:
    return bool(self.cca_layers)

  def baseline(self) -> 'RetroConfig':
    """The same decoder without retrieval."""
    return dataclasses.replace(self, cca_layers=())


@dataclasses.dataclass(frozen=True)
class LayerPlan:
  """How the decoder's L layers are grouped so that equal groups can be scanned.

  Attributes:
    prefix: number of LM layers before the first RETRO layer (all layers, in a baseline).
    has_entry: whether a RETRO layer min(P) follows; the encoder runs inside it.
    periods: (number of LM layers before each RETRO layer, how often this repeats).
    tail: number of LM layers after the last RETRO layer.
  """
  prefix: int
  has_entry: bool
  periods: tuple[tuple[int, int], ...]
  tail: int


def layer_plan(config: RetroConfig) -> LayerPlan:
  """Groups layers 1..L by the gaps between the layers of P."""
  if not config.cca_layers:
    return LayerPlan(prefix=config.num_layers, has_entry=False, periods=(), tail=0)
  periods: list[tuple[int, int]] = []
  for before, after in zip(config.cca_layers, config.cca_layers[1:]):
    lm_layers = after - before - 1
    if periods and periods[-1][0] == lm_layers:
      periods[-1] = (lm_layers, periods[-1][1] + 1)
    else:
      periods.append((lm_layers, 1))
  return LayerPlan(prefix=config.cca_layers[0] - 1, has_entry=True, periods=tuple(periods),
                   tail=config.num_layers - config.cca_layers[-1])
