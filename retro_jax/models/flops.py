"""Model FLOPs by formula: what the equations of a RETRO need, whatever a program computes.

Matrix products alone, a multiply-add is 2; softmax, norms, GELU and embedding lookups count
nothing. The compiled program's own FLOPs, recomputation included, are in topology/.
"""

import dataclasses

from retro_jax.models.config import RetroConfig

# The backward pass of a matrix product is two of the same size.
TRAINING_OVER_FORWARD = 3


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
  """FLOPs of one forward pass over a batch, by part; each is a float.

  Attributes:
    attention: decoder self-attention with its projections.
    ffw: decoder feed-forward layers.
    cca: chunked cross-attention, K and V of the neighbours included.
    encoder: the neighbour encoder.
    read: logits over the vocabulary.
  """
  attention: float
  ffw: float
  cca: float
  encoder: float
  read: float

  @property
  def total(self) -> float:
    return self.attention + self.ffw + self.cca + self.encoder + self.read


def forward_flops(config: RetroConfig, batch_size: int, sequence_length: int, *,
                  as_computed: bool = False) -> ForwardFlops:
  """FLOPs of one forward pass over `batch_size` sequences of n tokens, retrieval on.

  Args:
    config: the model.
    batch_size: b.
    sequence_length: n, a multiple of m.
    as_computed: count what the plain implementation computes: all pairs of causal attention
      instead of the half below the diagonal, and a position logit for every distance instead
      of one for every pair.
  """
  n, m = sequence_length, config.chunk_length
  k, r = config.num_neighbors, config.retrieved_length
  tokens = batch_size * n
  chunks = tokens // m
  retrieved = chunks * k * r
  width, d = config.num_heads * config.head_dim, config.d_model

  def attention(rows: float, columns: float, groups: float, in_dim: int, context_dim: int,
                inner: int, *, context_rows: float, distances: int, causal: bool = False,
                key_groups: int = 1, kv_inner: int = 0,
                positions: str = config.positions_of_retrieval) -> float:
    """`groups` times attention of `rows` to `columns`; `context_rows` tokens give K and V."""
    projections = 2 * 2.0 * (inner * groups * rows * in_dim
                             + (kv_inner or inner) * context_rows * context_dim)
    share = 0.5 if causal and not as_computed else 1.0
    pairs = groups * rows * columns * share
    products = 2 * 2.0 * pairs * inner
    if positions == 'relative':
      products += 2.0 * inner * (
          groups * rows * distances if as_computed else pairs / key_groups)
      projections += 2.0 * distances * in_dim * inner  # once for the whole batch
    return projections + products

  self_attention = attention(n, n, batch_size, d, d, width, context_rows=tokens, distances=n,
                             causal=True, kv_inner=config.kv_heads * config.head_dim,
                             positions=config.positions)
  cca = encoder = 0.0
  if config.has_retrieval:
    d_encoder, inner = config.encoder_d_model, config.encoder_heads * config.encoder_head_dim
    cca = len(config.cca_layers) * attention(
        m, k * r, chunks, d, d_encoder, width, context_rows=retrieved, distances=m + r - 1,
        key_groups=k, positions=config.positions_of_cca)
    encoder = config.encoder_layers * (
        attention(r, r, chunks * k, d_encoder, d_encoder, inner, context_rows=retrieved,
                  distances=2 * r - 1)
        + 2 * 2.0 * retrieved * d_encoder * config.encoder_d_ff)
    encoder += len(config.encoder_cross_attention_layers) * attention(
        r, m, chunks * k, d_encoder, d, inner, context_rows=tokens, distances=r + m - 1)
  return ForwardFlops(
      attention=config.num_layers * self_attention,
      ffw=config.num_layers * (3 if config.gated else 2) * 2.0 * tokens * d * config.d_ff,
      cca=cca, encoder=encoder, read=2.0 * tokens * d * config.vocab_size)


def training_flops(config: RetroConfig, batch_size: int, sequence_length: int) -> float:
  """Model FLOPs of one training step over all devices: forward and backward, nothing twice."""
  return TRAINING_OVER_FORWARD * forward_flops(config, batch_size, sequence_length).total
