"""Small random public checkpoints as Hugging Face folders, and their models once more in NumPy.

Written from the papers (Touvron et al. 2023, Su et al. 2021, Ainslie et al. 2023; Radford et al.
2019), float64, one head at a time; nothing of retro_jax is used.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tests import worlds

VOCABULARY = 300
LLAMA = {
    'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'hidden_size': 16,
    'intermediate_size': 24, 'num_hidden_layers': 3, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'hidden_act': 'silu', 'rms_norm_eps': 1e-5, 'rope_theta': 500.0,
    'vocab_size': VOCABULARY, 'tie_word_embeddings': False, 'max_position_embeddings': 64,
    'bos_token_id': 0, 'eos_token_id': [1]}
LLAMA_3 = LLAMA | {
    'tie_word_embeddings': True, 'head_dim': 6, 'rope_scaling': {
        'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
        'original_max_position_embeddings': 20}}
QWEN = LLAMA | {'model_type': 'qwen2', 'architectures': ['Qwen2ForCausalLM'],
                'use_sliding_window': False, 'sliding_window': 4096}
GPT2 = {
    'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], 'n_embd': 16, 'n_layer': 3,
    'n_head': 4, 'n_positions': 32, 'layer_norm_epsilon': 1e-5, 'vocab_size': VOCABULARY,
    'activation_function': 'gelu_new', 'bos_token_id': 0, 'eos_token_id': 0}


def llama_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
  """Every array of a Llama or Qwen 2, random, under their names; matrices are [out, in]."""
  rng = np.random.default_rng(seed)
  d, f, heads = config['hidden_size'], config['intermediate_size'], config['num_attention_heads']
  c, groups = config.get('head_dim', d // heads), config['num_key_value_heads']
  draw = lambda *shape: (rng.normal(size=shape) * 0.4).astype(np.float32)
  tensors = {'model.embed_tokens.weight': draw(config['vocab_size'], d) * 3,
             'model.norm.weight': 1 + draw(d)}
  if not config['tie_word_embeddings']:
    tensors['lm_head.weight'] = draw(config['vocab_size'], d)
  for i in range(config['num_hidden_layers']):
    at = f'model.layers.{i}.'
    rows = {'q': heads * c, 'k': groups * c, 'v': groups * c}
    for name, out in rows.items():
      tensors[f'{at}self_attn.{name}_proj.weight'] = draw(out, d)
      if config['model_type'] == 'qwen2':
        tensors[f'{at}self_attn.{name}_proj.bias'] = draw(out)
    tensors[f'{at}self_attn.o_proj.weight'] = draw(d, heads * c)
    tensors[f'{at}mlp.gate_proj.weight'] = draw(f, d)
    tensors[f'{at}mlp.up_proj.weight'] = draw(f, d)
    tensors[f'{at}mlp.down_proj.weight'] = draw(d, f)
    tensors[f'{at}input_layernorm.weight'] = 1 + draw(d)
    tensors[f'{at}post_attention_layernorm.weight'] = 1 + draw(d)
  return tensors


def gpt2_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
  """Every array of a GPT-2, random, under their names; matrices are [in, out]."""
  rng = np.random.default_rng(seed)
  d = config['n_embd']
  draw = lambda *shape: (rng.normal(size=shape) * 0.4).astype(np.float32)
  tensors = {'transformer.wte.weight': draw(config['vocab_size'], d),
             'transformer.wpe.weight': draw(config['n_positions'], d)}
  for name in ('ln_f', *(f'h.{i}.{n}' for i in range(config['n_layer']) for n in ('ln_1', 'ln_2'))):
    tensors[f'transformer.{name}.weight'] = 1 + draw(d)
    tensors[f'transformer.{name}.bias'] = draw(d)
  for i in range(config['n_layer']):
    for name, rows, columns in (('attn.c_attn', d, 3 * d), ('attn.c_proj', d, d),
                                ('mlp.c_fc', d, 4 * d), ('mlp.c_proj', 4 * d, d)):
      tensors[f'transformer.h.{i}.{name}.weight'] = draw(rows, columns)
      tensors[f'transformer.h.{i}.{name}.bias'] = draw(columns)
  return tensors


def tensors_of(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
  return (gpt2_tensors if config['model_type'] == 'gpt2' else llama_tensors)(config, seed)


@functools.cache
def tokenizer(kind: str = 'byte_level') -> str:
  """A tokenizer.json trained on a few words: of GPT-2's kind, or 'metaspace', of Llama 2's."""
  import tokenizers
  from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
  rng = np.random.default_rng(0)
  texts = [worlds.text(rng, 60) for _ in range(40)]
  if kind == 'byte_level':
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ['<|begin|>', '<|end|>']
  else:
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
    made.normalizer = normalizers.Sequence([
        normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')])
    made.decoder = decoders.ByteFallback()
    alphabet = []
    specials = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256))]
  size = VOCABULARY if kind == 'byte_level' else VOCABULARY + 200
  made.train_from_iterator(texts, trainers.BpeTrainer(
      vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=[
          AddedToken(token, special=True, normalized=False) for token in specials]))
  described = json.loads(made.to_str())
  # Bytes are tokens of the model, not added ones.
  described['added_tokens'] = [token for token in described['added_tokens']
                               if not token['content'].startswith('<0x')]
  return json.dumps(described)


def write_folder(folder: Path, config: dict[str, Any], shards: int = 1, seed: int = 0
                 ) -> dict[str, np.ndarray]:
  """A Hugging Face folder; returns its arrays."""
  folder.mkdir(parents=True)
  tensors = tensors_of(config, seed)
  (folder / 'config.json').write_text(json.dumps(config))
  (folder / 'tokenizer.json').write_text(tokenizer())
  if shards == 1:
    safetensors.numpy.save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
    return tensors
  places = {}
  for shard in range(shards):
    name = f'model-{shard + 1:05d}-of-{shards:05d}.safetensors'
    part = {key: tensors[key] for key in sorted(tensors)[shard::shards]}
    safetensors.numpy.save_file(part, folder / name, {'format': 'pt'})
    places |= {key: name for key in part}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(
      {'metadata': {}, 'weight_map': places}))
  return tensors


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Causal attention of one head, [n, c] each."""
  logits = q @ k.T / math.sqrt(q.shape[1])
  logits[np.triu_indices(len(q), 1)] = -np.inf
  weights = np.exp(logits - logits.max(1, keepdims=True))
  return weights / weights.sum(1, keepdims=True) @ v


def _turned(x: np.ndarray, config: dict[str, Any]) -> np.ndarray:
  """Rotary positions of one head [n, c], as complex numbers."""
  half = x.shape[1] // 2
  frequency = np.array([config['rope_theta'] ** (-2 * i / x.shape[1]) for i in range(half)])
  if scaling := config.get('rope_scaling'):
    for i, plain in enumerate(frequency):
      length = 2 * math.pi / plain
      n = scaling['original_max_position_embeddings']
      if length > n / scaling['low_freq_factor']:
        frequency[i] = plain / scaling['factor']
      elif length > n / scaling['high_freq_factor']:
        low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
        smooth = (n / length - low) / (high - low)
        frequency[i] = (1 - smooth) * plain / scaling['factor'] + smooth * plain
  turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.outer(np.arange(len(x)), frequency))
  return np.concatenate([turned.real, turned.imag], axis=1)


def llama(config: dict[str, Any], tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
  """Logits [n, V] of one text."""
  t = {name: value.astype(np.float64) for name, value in tensors.items()}
  heads, groups = config['num_attention_heads'], config['num_key_value_heads']
  size = lambda x: np.sqrt((x * x).mean(1, keepdims=True) + config['rms_norm_eps'])
  norm = lambda x, scale: x / size(x) * scale
  h = t['model.embed_tokens.weight'][tokens]
  for i in range(config['num_hidden_layers']):
    p = {name.removeprefix(f'model.layers.{i}.'): value for name, value in t.items()}
    x = norm(h, p['input_layernorm.weight'])
    q, k, v = (x @ p[f'self_attn.{name}_proj.weight'].T + p.get(f'self_attn.{name}_proj.bias', 0)
               for name in 'qkv')
    c = q.shape[1] // heads
    of = lambda y, head: y[:, head * c:(head + 1) * c]
    mixed = [_attend(_turned(of(q, head), config), _turned(of(k, head * groups // heads), config),
                     of(v, head * groups // heads)) for head in range(heads)]
    h = h + np.concatenate(mixed, 1) @ p['self_attn.o_proj.weight'].T
    x = norm(h, p['post_attention_layernorm.weight'])
    gate = x @ p['mlp.gate_proj.weight'].T
    h = h + (gate / (1 + np.exp(-gate)) * (x @ p['mlp.up_proj.weight'].T)) @ p[
        'mlp.down_proj.weight'].T
  h = norm(h, t['model.norm.weight'])
  return h @ t.get('lm_head.weight', t['model.embed_tokens.weight']).T


def gpt2(config: dict[str, Any], tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
  """Logits [n, V] of one text."""
  t = {name.removeprefix('transformer.'): value.astype(np.float64)
       for name, value in tensors.items()}
  heads, c = config['n_head'], config['n_embd'] // config['n_head']

  def norm(x, name):
    x = x - x.mean(1, keepdims=True)
    x = x / np.sqrt((x * x).mean(1, keepdims=True) + config['layer_norm_epsilon'])
    return x * t[f'{name}.weight'] + t[f'{name}.bias']

  dense = lambda x, name: x @ t[f'{name}.weight'] + t[f'{name}.bias']
  h = t['wte.weight'][tokens] + t['wpe.weight'][:len(tokens)]
  for i in range(config['n_layer']):
    q, k, v = np.split(dense(norm(h, f'h.{i}.ln_1'), f'h.{i}.attn.c_attn'), 3, axis=1)
    of = lambda y, head: y[:, head * c:(head + 1) * c]
    mixed = [_attend(of(q, head), of(k, head), of(v, head)) for head in range(heads)]
    h = h + dense(np.concatenate(mixed, 1), f'h.{i}.attn.c_proj')
    x = dense(norm(h, f'h.{i}.ln_2'), f'h.{i}.mlp.c_fc')
    x = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    h = h + dense(x, f'h.{i}.mlp.c_proj')
  return norm(h, 'ln_f') @ t['wte.weight'].T


def logits(config: dict[str, Any], tensors: dict[str, np.ndarray], tokens: np.ndarray
           ) -> np.ndarray:
  """Logits [n, V] of one text."""
  return (gpt2 if config['model_type'] == 'gpt2' else llama)(config, tensors, tokens)
