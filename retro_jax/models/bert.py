"""BERT, the frozen retriever: the encoder, and loading it from a Hugging Face folder.

Here: sizes read from config.json, the network (a Flax NNX module over one functional
forward pass, layers stacked and scanned) and its parameters from model.safetensors.
Not here: tokenisation, batching by length, pooling policy of a checkpoint and
normalisation, which are the business of retro_jax/retrieval/embedders.py.

The paper embeds chunks with a pre-trained BERT averaged over time and never trains it
(section 2.3), so there is no dropout, no pooler and no second segment here.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.errors import UserError

CONFIG_FILE = 'config.json'
WEIGHTS_FILE = 'model.safetensors'

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_new': lambda x: jax.nn.gelu(x, approximate=True),
    'gelu_pytorch_tanh': lambda x: jax.nn.gelu(x, approximate=True),
    'relu': jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """Sizes of a BERT encoder, named as in a checkpoint's config.json."""

  vocab_size: int = 30522
  hidden_size: int = 384
  num_hidden_layers: int = 6
  num_attention_heads: int = 12
  intermediate_size: int = 1536
  max_position_embeddings: int = 512
  type_vocab_size: int = 2
  layer_norm_eps: float = 1e-12
  hidden_act: str = 'gelu'

  @classmethod
  def from_folder(cls, folder: str | os.PathLike) -> 'BertConfig':
    """Reads config.json of a checkpoint folder.

    Raises:
      UserError: no such file, not JSON, not a BERT, or a size missing or impossible.
    """
    path = Path(folder) / CONFIG_FILE
    values = read_json(path)
    kind = values.get('model_type', 'bert')
    if kind != 'bert':
      raise UserError(f"{path}: model_type is {kind!r}, expected 'bert'; give a BERT checkpoint")
    positions = values.get('position_embedding_type', 'absolute')
    if positions != 'absolute':
      raise UserError(f"{path}: position_embedding_type is {positions!r}; only 'absolute' is read")
    arguments = {}
    for field in dataclasses.fields(cls):
      if field.name in values:
        value = arguments[field.name] = values[field.name]
        if field.type is str:
          fits, wanted = isinstance(value, str), 'a string'
        else:
          kinds = (int, float) if field.type is float else int
          fits = isinstance(value, kinds) and not isinstance(value, bool) and value > 0
          wanted = f'a positive {field.type.__name__}'
        if not fits:
          raise UserError(f'{path}: {field.name} is {value!r}, expected {wanted}')
      elif field.name not in ('layer_norm_eps', 'hidden_act', 'type_vocab_size'):
        raise UserError(f'{path}: {field.name} is missing; is this a BERT checkpoint?')
    config = cls(**arguments)
    if config.hidden_act not in _ACTIVATIONS:
      raise UserError(f'{path}: hidden_act is {config.hidden_act!r}, expected one of '
                      f'{", ".join(_ACTIVATIONS)}')
    if config.hidden_size % config.num_attention_heads:
      raise UserError(f'{path}: hidden_size {config.hidden_size} is no multiple of '
                      f'num_attention_heads {config.num_attention_heads}')
    return config


def read_json(path: Path) -> dict[str, Any]:
  """A checkpoint's JSON object, or a UserError that names the file."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError(f'{path}: missing; a BERT folder holds config.json, model.safetensors and '
                    'tokenizer.json') from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f'{path}: not valid JSON ({error}); fetch the checkpoint again') from None
  if not isinstance(value, dict):
    raise UserError(f'{path}: expected a JSON object; fetch the checkpoint again')
  return value


class Bert(nnx.Module):
  """The encoder, with parameters that somebody else trained.

  Args:
    config: sizes.
    parameters: float32 arrays by name, shapes as in `parameter_shapes`; layers are stacked
      on a leading axis.
  """

  def __init__(self, config: BertConfig, parameters: Mapping[str, jax.Array | np.ndarray]):
    shapes = {name: value.shape for name, value in parameters.items()}
    if shapes != parameter_shapes(config):
      raise ValueError(f'parameters have shapes {shapes}, expected {parameter_shapes(config)}')
    self.config = config
    self.parameters = nnx.Dict(
        {name: nnx.Param(jnp.asarray(value)) for name, value in parameters.items()})

  def __call__(self, tokens: jax.Array, mask: jax.Array, precision: str = 'highest') -> jax.Array:
    """Last layer's activations [b, t, hidden]; see `encode`."""
    return encode(self.raw_parameters(), self.config, tokens, mask, precision)

  def raw_parameters(self) -> dict[str, jax.Array]:
    """Plain arrays by name, as `encode` takes them."""
    return {name: parameter[...] for name, parameter in self.parameters.items()}


def parameter_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
  """Shapes by name; names under `layers_` have the layer as leading axis."""
  d, f, n = config.hidden_size, config.intermediate_size, config.num_hidden_layers
  return {
      'word_embedding': (config.vocab_size, d),
      'position_embedding': (config.max_position_embeddings, d),
      'type_embedding': (config.type_vocab_size, d),
      'embedding_norm_scale': (d,),
      'embedding_norm_bias': (d,),
      'layers_query_key_value_kernel': (n, d, 3 * d),
      'layers_query_key_value_bias': (n, 3 * d),
      'layers_attention_output_kernel': (n, d, d),
      'layers_attention_output_bias': (n, d),
      'layers_attention_norm_scale': (n, d),
      'layers_attention_norm_bias': (n, d),
      'layers_up_kernel': (n, d, f),
      'layers_up_bias': (n, f),
      'layers_down_kernel': (n, f, d),
      'layers_down_bias': (n, d),
      'layers_output_norm_scale': (n, d),
      'layers_output_norm_bias': (n, d),
  }


def encode(parameters: Mapping[str, jax.Array], config: BertConfig, tokens: jax.Array,
           mask: jax.Array, precision: str = 'highest') -> jax.Array:
  """Activations of the last layer.

  Args:
    parameters: arrays by name, shapes as in `parameter_shapes`.
    config: sizes.
    tokens: int32 [b, t], t at most max_position_embeddings.
    mask: bool [b, t], True for tokens to attend to.
    precision: of the matrix products, 'highest' for float32 on every device.

  Returns:
    float32 [b, t, hidden_size]; positions outside the mask hold no meaning.
  """
  length = tokens.shape[1]
  if length > config.max_position_embeddings:
    raise ValueError(f'{length} tokens, the model has {config.max_position_embeddings} positions')
  x = (parameters['word_embedding'][tokens] + parameters['position_embedding'][:length]
       + parameters['type_embedding'][0])
  x = _layer_norm(x, parameters['embedding_norm_scale'], parameters['embedding_norm_bias'],
                  config.layer_norm_eps)
  prefix = 'layers_'
  stacked = {name.removeprefix(prefix): value for name, value in parameters.items()
             if name.startswith(prefix)}
  # Scanned rather than unrolled: same speed, and a compilation that does not grow with
  # depth, which counts because every length bucket compiles its own.
  x, _ = jax.lax.scan(
      lambda x, layer: (_layer(x, layer, config, mask, precision), None), x, stacked)
  return x


def _layer(x: jax.Array, layer: Mapping[str, jax.Array], config: BertConfig, mask: jax.Array,
           precision: str) -> jax.Array:
  """One post-norm transformer layer: x [b, t, d] to [b, t, d]."""
  b, t, d = x.shape
  heads = config.num_attention_heads
  matmul = lambda a, kernel: jnp.matmul(a, kernel, precision=precision)
  qkv = matmul(x, layer['query_key_value_kernel']) + layer['query_key_value_bias']
  # Heads before time: on XLA:CPU the two products are then plain batched matrix products
  # (about 10 % of the whole pass at 66 tokens).
  q, k, v = (qkv.reshape(b, t, 3, heads, d // heads)[:, :, i].transpose(0, 2, 1, 3)
             for i in range(3))
  scores = jnp.einsum('bhqd,bhkd->bhqk', q, k, precision=precision) / math.sqrt(d // heads)
  # A finite floor, so that a padding row (nothing to attend to) stays finite too.
  scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
  mixed = jnp.einsum('bhqk,bhkd->bhqd', jax.nn.softmax(scores, axis=-1), v, precision=precision)
  mixed = mixed.transpose(0, 2, 1, 3).reshape(b, t, d)
  x = _layer_norm(
      x + matmul(mixed, layer['attention_output_kernel']) + layer['attention_output_bias'],
      layer['attention_norm_scale'], layer['attention_norm_bias'], config.layer_norm_eps)
  hidden = _ACTIVATIONS[config.hidden_act](matmul(x, layer['up_kernel']) + layer['up_bias'])
  return _layer_norm(
      x + matmul(hidden, layer['down_kernel']) + layer['down_bias'],
      layer['output_norm_scale'], layer['output_norm_bias'], config.layer_norm_eps)


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
  centred = x - x.mean(axis=-1, keepdims=True)
  variance = jnp.square(centred).mean(axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + epsilon) * scale + bias


def mean_over_time(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of x [b, t, d] over the positions in mask [b, t]: [b, d], zeros where there are none."""
  total = jnp.einsum('btd,bt->bd', x, mask.astype(x.dtype), precision='highest')
  return total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)


def load_bert(folder: str | os.PathLike) -> Bert:
  """A BERT with the weights of a Hugging Face checkpoint folder.

  Tensors may be named with or without the prefix 'bert.', layer norms weight/bias or the
  older gamma/beta; heads and the pooler are not read.

  Args:
    folder: holds config.json and model.safetensors.

  Raises:
    UserError: a file or tensor is missing, unreadable or of another shape than config.json
      says.
  """
  config = BertConfig.from_folder(folder)
  path = Path(folder) / WEIGHTS_FILE
  if not path.is_file():
    raise UserError(f'{path}: missing; save the checkpoint in the safetensors format')
  return Bert(config, _read_parameters(path, config))


def _read_parameters(path: Path, config: BertConfig) -> dict[str, np.ndarray]:
  """Arrays by our names and in our shapes, from a safetensors file."""
  import safetensors  # Only a process that loads a checkpoint needs it.

  d, f = config.hidden_size, config.intermediate_size
  try:
    with safetensors.safe_open(path, 'numpy') as file:
      names = set(file.keys())

      def read(name: str, *shape: int) -> np.ndarray:
        older = name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
            'LayerNorm.bias', 'LayerNorm.beta')
        found = next((n for n in (name, f'bert.{name}', older, f'bert.{older}') if n in names),
                     None)
        if found is None:
          raise UserError(f'{path}: tensor {name} is missing; is this a BERT checkpoint?')
        tensor = file.get_tensor(found)
        if tensor.shape != shape:
          raise UserError(f'{path}: tensor {found} has shape {list(tensor.shape)}, expected '
                          f'{list(shape)} by {CONFIG_FILE}')
        return tensor.astype(np.float32)

      def layer(i: int) -> dict[str, np.ndarray]:
        at = f'encoder.layer.{i}.'
        parts = [at + f'attention.self.{part}.' for part in ('query', 'key', 'value')]
        kernel = lambda name, rows, columns: read(at + name + '.dense.weight', rows, columns).T
        return {
            'query_key_value_kernel': np.concatenate(
                [read(p + 'weight', d, d).T for p in parts], axis=1),
            'query_key_value_bias': np.concatenate([read(p + 'bias', d) for p in parts]),
            'attention_output_kernel': kernel('attention.output', d, d),
            'attention_output_bias': read(at + 'attention.output.dense.bias', d),
            'attention_norm_scale': read(at + 'attention.output.LayerNorm.weight', d),
            'attention_norm_bias': read(at + 'attention.output.LayerNorm.bias', d),
            'up_kernel': kernel('intermediate', f, d),
            'up_bias': read(at + 'intermediate.dense.bias', f),
            'down_kernel': kernel('output', d, f),
            'down_bias': read(at + 'output.dense.bias', d),
            'output_norm_scale': read(at + 'output.LayerNorm.weight', d),
            'output_norm_bias': read(at + 'output.LayerNorm.bias', d),
        }

      layers = [layer(i) for i in range(config.num_hidden_layers)]
      return {
          'word_embedding': read('embeddings.word_embeddings.weight', config.vocab_size, d),
          'position_embedding': read('embeddings.position_embeddings.weight',
                                     config.max_position_embeddings, d),
          'type_embedding': read('embeddings.token_type_embeddings.weight',
                                 config.type_vocab_size, d),
          'embedding_norm_scale': read('embeddings.LayerNorm.weight', d),
          'embedding_norm_bias': read('embeddings.LayerNorm.bias', d),
          **{f'layers_{name}': np.stack([layer[name] for layer in layers]) for name in layers[0]},
      }
  except safetensors.SafetensorError as error:
    raise UserError(f'{path}: cannot be read ({error}); fetch the checkpoint again') from None
