"""Decoders of public models: a Hugging Face folder as an exported model of ours, without retrieval.

Llama's family (with Mistral and Qwen 2, where they compute the same) and GPT-2. What their
config.json says becomes switches of RetroConfig, their arrays ours under our names; whatever
changes the result and is not known here is refused. Nothing of theirs is run.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from retro_jax import storage
from retro_jax.data import public_vocabulary
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.errors import UserError
from retro_jax.models.config import RetroConfig
from retro_jax.models.retro import init_parameters
from retro_jax.training.checkpoints import SAFETENSORS, VOCABULARY, write_model_description

MODEL_GIN = 'model.gin'
# What a decoder is, and model.gin says; the rest of RetroConfig is the user's.
_FIELDS = ('vocab_size', 'd_model', 'num_layers', 'num_heads', 'num_kv_heads', 'head_dim', 'd_ff',
           'positions', 'max_positions', 'rotary_base', 'rotary_scaling', 'norm', 'norm_epsilon',
           'activation', 'gated', 'qkv_bias', 'output_bias', 'ffw_bias', 'tied_read',
           'scaled_embeddings', 'padding_row')
_ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'gelu': 'gelu_exact', 'gelu_new': 'gelu',
                'gelu_pytorch_tanh': 'gelu'}
Tensors = Mapping[str, np.ndarray]


def import_model(source: str | os.PathLike, folder: str | os.PathLike) -> RetroConfig:
  """Writes the decoder in a Hugging Face folder as an exported model.

  Args:
    source: with config.json, tokenizer.json, and model.safetensors or its shards with their
      index.
    folder: to write, replaced as a whole: model.safetensors, model.json, the vocabulary, and
      model.gin, the decoder's settings for a run that begins with it.

  Returns:
    The model's config.

  Raises:
    UserError: a file is missing or damaged, or the model has something that this decoder has not.
  """
  source = Path(source)
  described = _read_json(source / 'config.json')
  model = read_config(described, str(source / 'config.json'))
  packed = _vocabulary(source, described)
  with storage.building(folder, {'kind': 'exported-model', 'imported': {
      'model_type': described['model_type'], 'name': described.get('_name_or_path', '')}}
                        ) as temporary:
    vocabulary_path = Path(temporary) / VOCABULARY
    vocabulary_path.write_bytes(packed)
    vocabulary = Vocabulary.load(vocabulary_path)
    if vocabulary.size > model.vocab_size:
      raise UserError(f'{source}: tokenizer.json has {vocabulary.size - 1:,} ids, but config.json '
                      f'vocab_size {model.vocab_size - 1:,}; the two do not belong together')
    write_model_description(temporary, model, {
        'size': vocabulary.size, 'fingerprint': vocabulary.fingerprint})
    safetensors.numpy.save_file(read_parameters(source, described, model),
                                Path(temporary) / SAFETENSORS)
    (Path(temporary) / MODEL_GIN).write_text(_as_gin(model, str(source)), encoding='utf-8')
  return model


def read_config(described: Mapping[str, Any], where: str) -> RetroConfig:
  """The baseline that a config.json describes.

  Raises:
    UserError: names the field that this decoder cannot follow.
  """
  families = {'llama': _llama, 'mistral': _llama, 'qwen2': _llama, 'gpt2': _gpt2}
  kind = described.get('model_type')
  if kind not in families:
    raise UserError(f'{where}: model_type is {kind!r}, expected one of {", ".join(families)}')
  if described.get('quantization_config'):
    raise UserError(f'{where}: quantization_config is set; give the model as it was trained')
  try:
    return RetroConfig(cca_layers=(), scaled_embeddings=False, padding_row=False,
                       **families[kind](described, where))
  except KeyError as error:
    raise UserError(f'{where}: has no field {error}') from None


def _llama(described: Mapping[str, Any], where: str) -> dict[str, Any]:
  heads = described['num_attention_heads']
  _refuse(described, where, partial_rotary_factor=(1, 1.0), pretraining_tp=(1,))
  # Qwen 2 names a window even where it is switched off.
  if described.get('use_sliding_window', True):
    _refuse(described, where, sliding_window=())
  for kind in described.get('layer_types') or ():
    if kind != 'full_attention':
      raise UserError(f'{where}: layer_types has {kind!r}, expected \'full_attention\' throughout')
  base, scaling = _rotary(described, where)
  qwen = described['model_type'] == 'qwen2'
  biases = bool(described.get('attention_bias', False))
  return {
      'vocab_size': described['vocab_size'] + 1, 'd_model': described['hidden_size'],
      'num_layers': described['num_hidden_layers'], 'num_heads': heads,
      'num_kv_heads': described.get('num_key_value_heads') or heads,
      'head_dim': described.get('head_dim') or described['hidden_size'] // heads,
      'd_ff': described['intermediate_size'], 'positions': 'rotary', 'rotary_base': base,
      'rotary_scaling': scaling, 'norm': 'rms', 'norm_epsilon': described['rms_norm_eps'],
      'activation': _activation(described, 'hidden_act', where), 'gated': True,
      'qkv_bias': qwen or biases, 'output_bias': biases and not qwen,
      'ffw_bias': bool(described.get('mlp_bias', False)),
      'tied_read': bool(described.get('tie_word_embeddings', False))}


def _rotary(described: Mapping[str, Any], where: str) -> tuple[float, tuple[float, ...]]:
  """Base and scaling, in either of the two ways in which config.json has had them."""
  newer = described.get('rope_parameters') or {}
  scaling = newer or described.get('rope_scaling') or {}
  base = newer.get('rope_theta') or described.get('rope_theta') or 10_000.0
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if kind == 'default':
    return float(base), ()
  if kind != 'llama3':
    field = 'rope_parameters' if newer else 'rope_scaling'
    raise UserError(f"{where}: {field} has rope_type {kind!r}, expected 'default' or 'llama3'")
  return float(base), tuple(float(scaling[name]) for name in (
      'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'))


def _gpt2(described: Mapping[str, Any], where: str) -> dict[str, Any]:
  _refuse(described, where, scale_attn_weights=(True,), add_cross_attention=(False,),
          scale_attn_by_inverse_layer_idx=(False,), tie_word_embeddings=(True,))
  width, heads = described['n_embd'], described['n_head']
  return {
      'vocab_size': described['vocab_size'] + 1, 'd_model': width,
      'num_layers': described['n_layer'], 'num_heads': heads, 'head_dim': width // heads,
      'd_ff': described.get('n_inner') or 4 * width, 'positions': 'learned',
      'max_positions': described['n_positions'], 'norm': 'layer',
      'norm_epsilon': described['layer_norm_epsilon'],
      'activation': _activation(described, 'activation_function', where), 'qkv_bias': True,
      'output_bias': True, 'ffw_bias': True, 'tied_read': True}


def _refuse(described: Mapping[str, Any], where: str, **allowed: tuple[Any, ...]) -> None:
  """Fields that may be absent, null or one of some values, as long as nobody knows the others."""
  for field, values in allowed.items():
    value = described.get(field)
    if value is not None and value not in values:
      expected = ' or '.join(map(repr, values)) or 'null'
      raise UserError(f'{where}: {field} is {value!r}, expected {expected}; '
                      'this decoder cannot compute it otherwise')


def _activation(described: Mapping[str, Any], field: str, where: str) -> str:
  value = described.get(field, 'gelu_new')
  if value not in _ACTIVATIONS:
    raise UserError(f'{where}: {field} is {value!r}, expected one of {", ".join(_ACTIVATIONS)}')
  return _ACTIVATIONS[value]


def read_parameters(source: Path, described: Mapping[str, Any], model: RetroConfig
                    ) -> dict[str, np.ndarray]:
  """Our parameters, float32, out of the folder's arrays.

  Raises:
    UserError: an array is missing or of another shape than config.json says.
  """
  found = _Arrays(source)
  of_family = _of_gpt2 if described['model_type'] == 'gpt2' else _of_llama
  layers = [of_family(found, model, number) for number in range(model.num_layers)]
  parameters = {f'decoder.prefix.{name}': np.stack([layer[name] for layer in layers])
                for name in layers[0]}
  parameters |= _outside_gpt2(found) if of_family is _of_gpt2 else _outside_llama(found, model)
  expected = jax.eval_shape(lambda: init_parameters(model, jax.random.key(0)))
  assert parameters.keys() == expected.keys(), parameters.keys() ^ expected.keys()
  for name, leaf in expected.items():
    if parameters[name].shape != leaf.shape:
      raise UserError(f'{source}: arrays for {name} are {parameters[name].shape}, config.json asks '
                      f'for {leaf.shape}; the two do not belong together')
  # safetensors writes memory as it lies, so a transposed view has to be copied.
  return {name: np.ascontiguousarray(value) for name, value in parameters.items()}


def _of_llama(found: '_Arrays', model: RetroConfig, number: int) -> dict[str, np.ndarray]:
  """One layer. Their matrices are [out, in]."""
  take = lambda name: found(f'model.layers.{number}.{name}')
  by_head = lambda x: x.reshape(*x.shape[:-1], -1, model.head_dim)
  layer = {'attention.norm.scale': take('input_layernorm.weight'),
           'feed_forward.norm.scale': take('post_attention_layernorm.weight')}
  for ours, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v')):
    layer[f'attention.attention.{ours}'] = by_head(take(f'self_attn.{theirs}_proj.weight').T)
    if model.qkv_bias:
      layer[f'attention.attention.{ours}_bias'] = by_head(take(f'self_attn.{theirs}_proj.bias'))
  layer['attention.attention.output'] = by_head(take('self_attn.o_proj.weight')).transpose(1, 2, 0)
  if model.output_bias:
    layer['attention.attention.output_bias'] = take('self_attn.o_proj.bias')
  for ours, theirs in (('gate', 'gate'), ('wi', 'up'), ('wo', 'down')):
    layer[f'feed_forward.{ours}'] = take(f'mlp.{theirs}_proj.weight').T
    if model.ffw_bias:
      layer[f'feed_forward.{ours}_bias'] = take(f'mlp.{theirs}_proj.bias')
  return layer


def _outside_llama(found: '_Arrays', model: RetroConfig) -> dict[str, np.ndarray]:
  outside = {'embedding.table': found('model.embed_tokens.weight'),
             'decoder.norm.scale': found('model.norm.weight')}
  if not model.tied_read:
    outside['head.table'] = found('lm_head.weight')
  return outside


def _of_gpt2(found: '_Arrays', model: RetroConfig, number: int) -> dict[str, np.ndarray]:
  """One layer. Their matrices are [in, out], queries, keys and values side by side."""
  take = lambda name: found(f'h.{number}.{name}', 'transformer.')
  heads = (model.num_heads, model.head_dim)
  layer = {}
  for ours, theirs in (('attention', 'ln_1'), ('feed_forward', 'ln_2')):
    layer[f'{ours}.norm.scale'] = take(f'{theirs}.weight')
    layer[f'{ours}.norm.bias'] = take(f'{theirs}.bias')
  kernels = np.split(take('attn.c_attn.weight'), 3, axis=1)
  biases = np.split(take('attn.c_attn.bias'), 3)
  for ours, kernel, bias in zip(('query', 'key', 'value'), kernels, biases, strict=True):
    layer[f'attention.attention.{ours}'] = kernel.reshape(-1, *heads)
    layer[f'attention.attention.{ours}_bias'] = bias.reshape(heads)
  layer['attention.attention.output'] = take('attn.c_proj.weight').reshape(*heads, -1)
  layer['attention.attention.output_bias'] = take('attn.c_proj.bias')
  for ours, theirs in (('wi', 'c_fc'), ('wo', 'c_proj')):
    layer[f'feed_forward.{ours}'] = take(f'mlp.{theirs}.weight')
    layer[f'feed_forward.{ours}_bias'] = take(f'mlp.{theirs}.bias')
  return layer


def _outside_gpt2(found: '_Arrays') -> dict[str, np.ndarray]:
  take = lambda name: found(name, 'transformer.')
  return {'embedding.table': take('wte.weight'), 'position_embedding.table': take('wpe.weight'),
          'decoder.norm.scale': take('ln_f.weight'), 'decoder.norm.bias': take('ln_f.bias')}


class _Arrays:
  """The arrays of a folder by name, read one at a time."""

  def __init__(self, source: Path):
    self._source, index = source, source / 'model.safetensors.index.json'
    if (source / 'model.safetensors').exists():
      names = ['model.safetensors']
    elif index.exists():
      names = sorted(set(_read_json(index)['weight_map'].values()))
    else:
      raise UserError(f'{source}: no model.safetensors there, nor its index '
                      f'({index.name}); convert other formats to safetensors first')
    self._file_of: dict[str, Callable[[str], Any]] = {}
    for name in names:
      try:
        file = safetensors.safe_open(source / name, framework='flax')  # which knows bfloat16
      except (safetensors.SafetensorError, FileNotFoundError) as error:
        raise UserError(f'{source / name}: missing or damaged ({error}); '
                        'fetch it again') from None
      self._file_of |= {key: file.get_tensor for key in file.keys()}

  def __call__(self, name: str, prefix: str = '') -> np.ndarray:
    """float32, under its name or that with `prefix`."""
    for known in (name, prefix + name):
      if known in self._file_of:
        return np.asarray(self._file_of[known](known)).astype(np.float32)
    raise UserError(f'{self._source}: holds no array {name}, which config.json asks for; '
                    'the two do not belong together')


def _vocabulary(source: Path, described: Mapping[str, Any]) -> bytes:
  """The vocabulary's file: tokenizer.json with what its neighbours say of bos and eos."""
  path, beside = source / 'tokenizer.json', source / 'tokenizer_config.json'
  settings = _read_json(path)
  ids = {token['content']: token['id'] for token in settings.get('added_tokens', ())}
  ids = {**settings['model'].get('vocab', {}), **ids}
  told = _read_json(beside) if beside.exists() else {}

  def special(role: str) -> int | None:
    token = told.get(f'{role}_token')
    token = token.get('content') if isinstance(token, dict) else token
    if token in ids:
      return ids[token]
    number = described.get(f'{role}_token_id')
    return number[0] if isinstance(number, list) else number

  eos = special('eos')
  if eos is None:
    raise UserError(f'{source}: neither tokenizer_config.json (eos_token) nor config.json '
                    '(eos_token_id) says what ends a document')
  bos = special('bos')
  return public_vocabulary.pack(path.read_text(encoding='utf-8'), eos if bos is None else bos, eos)


def _as_gin(model: RetroConfig, source: str) -> str:
  lines = [f'# The decoder of {os.path.basename(os.path.normpath(source))}; before',
           '# gin/models/retrofit.gin, which adds CCA and encoder.', '']
  values = dataclasses.asdict(model)
  return '\n'.join(lines + [f'RetroConfig.{name} = {values[name]!r}' for name in _FIELDS]) + '\n'


def _read_json(path: Path) -> Any:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError(f'{path}: not there; give a folder as Hugging Face has it') from None
  except json.JSONDecodeError as error:
    raise UserError(f'{path}: not valid JSON ({error}); fetch it again') from None
