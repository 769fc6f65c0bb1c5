"""The frozen BERT: against committed vectors of sentence-transformers, and against NumPy loops."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from retro_jax.errors import UserError
from retro_jax.models import bert
from retro_jax.retrieval.embedders import BertEmbedder

GOLDEN = json.loads((Path(__file__).parent / 'golden_minilm.json').read_text())
SMALL = {'model_type': 'bert', 'vocab_size': 31, 'hidden_size': 8, 'num_hidden_layers': 2,
         'num_attention_heads': 2, 'intermediate_size': 12, 'max_position_embeddings': 9,
         'type_vocab_size': 2, 'layer_norm_eps': 1e-5, 'hidden_act': 'gelu'}


def tensors(sizes=SMALL, seed=0):
  """Random tensors under Hugging Face's names, in PyTorch's [out, in] layout."""
  rng = np.random.default_rng(seed)
  d, f = sizes['hidden_size'], sizes['intermediate_size']
  shapes = {
      'embeddings.word_embeddings.weight': (sizes['vocab_size'], d),
      'embeddings.position_embeddings.weight': (sizes['max_position_embeddings'], d),
      'embeddings.token_type_embeddings.weight': (sizes['type_vocab_size'], d),
      'embeddings.LayerNorm.weight': (d,), 'embeddings.LayerNorm.bias': (d,),
      'pooler.dense.weight': (d, d), 'pooler.dense.bias': (d,),
  }
  for i in range(sizes['num_hidden_layers']):
    at = f'encoder.layer.{i}.'
    for name, (rows, columns) in {
        'attention.self.query': (d, d), 'attention.self.key': (d, d),
        'attention.self.value': (d, d), 'attention.output.dense': (d, d),
        'intermediate.dense': (f, d), 'output.dense': (d, f)}.items():
      shapes[f'{at}{name}.weight'], shapes[f'{at}{name}.bias'] = (rows, columns), (rows,)
    for name in ('attention.output.LayerNorm', 'output.LayerNorm'):
      shapes[f'{at}{name}.weight'] = shapes[f'{at}{name}.bias'] = (d,)
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder, values, sizes=SMALL):
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(sizes))
  save_file(values, folder / 'model.safetensors')
  return folder


def numpy_bert(values, sizes, tokens):
  """One text, one position and one head at a time, in float64, from the definition."""
  w = {name: value.astype(np.float64) for name, value in values.items()}
  dense = lambda name, x: w[f'{name}.weight'] @ x + w[f'{name}.bias']
  def norm(name, x):
    deviation = math.sqrt(sum((x - x.mean()) ** 2) / len(x) + sizes['layer_norm_eps'])
    return (x - x.mean()) / deviation * w[f'{name}.weight'] + w[f'{name}.bias']
  act = {'gelu': lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
         'relu': lambda x: max(x, 0.0)}[sizes['hidden_act']]
  xs = [norm('embeddings.LayerNorm', w['embeddings.word_embeddings.weight'][token]
             + w['embeddings.position_embeddings.weight'][p]
             + w['embeddings.token_type_embeddings.weight'][0]) for p, token in enumerate(tokens)]
  heads, size = sizes['num_attention_heads'], sizes['hidden_size'] // sizes['num_attention_heads']
  for i in range(sizes['num_hidden_layers']):
    at = f'encoder.layer.{i}.'
    q, k, v = ([dense(f'{at}attention.self.{part}', x) for x in xs]
               for part in ('query', 'key', 'value'))
    after = []
    for p, x in enumerate(xs):
      mixed = []
      for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        weights = [math.exp(q[p][own] @ k[j][own] / math.sqrt(size)) for j in range(len(xs))]
        mixed.extend(sum(a * v[j][own] for j, a in enumerate(weights)) / sum(weights))
      x = norm(f'{at}attention.output.LayerNorm',
               x + dense(f'{at}attention.output.dense', np.array(mixed)))
      hidden = np.array([act(y) for y in dense(f'{at}intermediate.dense', x)])
      after.append(norm(f'{at}output.LayerNorm', x + dense(f'{at}output.dense', hidden)))
    xs = after
  return np.array(xs)


@pytest.fixture(scope='module')
def minilm():
  return BertEmbedder()


def test_golden_vectors_of_sentence_transformers(minilm):
  cases = GOLDEN['cases']
  ours = minilm.embed([case['text'] for case in cases])
  np.testing.assert_allclose(ours, [case['vector'] for case in cases], atol=1e-5, rtol=0)
  facts = minilm.describe()
  assert facts['weights_sha256'] == GOLDEN['provenance']['weights_sha256']
  assert facts['max_length'] == GOLDEN['provenance']['max_seq_length'] == 256
  assert facts['normalize'] and 'Normalize' in GOLDEN['provenance']['modules']


def test_golden_cases_are_told_apart_and_one_is_cut():
  vectors = np.array([case['vector'] for case in GOLDEN['cases']])
  products = vectors @ vectors.T - np.eye(len(vectors))
  assert products.max() < 0.9
  assert max(case['word_pieces'] for case in GOLDEN['cases']) > 256


@pytest.mark.parametrize('act', ['gelu', 'relu'])
def test_equals_numpy_loops(tmp_path, act):
  sizes = {**SMALL, 'hidden_act': act}
  values = tensors(sizes)
  model = bert.load_bert(write(tmp_path / 'b', values, sizes))
  tokens = np.array([[3, 1, 30, 7, 7, 0], [5, 9, 4, 0, 0, 0]], np.int32)
  lengths = [6, 3]
  mask = np.arange(6) < np.array(lengths)[:, None]
  ours = np.asarray(model(jnp.asarray(tokens), jnp.asarray(mask)))
  means = np.asarray(bert.mean_over_time(jnp.asarray(ours), jnp.asarray(mask)))
  for row, length in enumerate(lengths):
    expected = numpy_bert(values, sizes, tokens[row, :length])
    np.testing.assert_allclose(ours[row, :length], expected, atol=2e-5)
    np.testing.assert_allclose(means[row], expected.mean(axis=0), atol=2e-5)


def test_masked_tokens_have_no_influence_and_empty_rows_stay_finite(tmp_path):
  model = bert.load_bert(write(tmp_path / 'b', tensors()))
  mask = jnp.array([[True] * 4 + [False] * 2, [False] * 6])
  first = jnp.array([[3, 1, 30, 7, 0, 0], [0] * 6])
  other = first.at[0, 4:].set(jnp.array([11, 12]))
  a, b = (np.asarray(model(tokens, mask)) for tokens in (first, other))
  np.testing.assert_array_equal(a[0, :4], b[0, :4])
  assert np.isfinite(a).all()
  np.testing.assert_array_equal(bert.mean_over_time(jnp.asarray(a), mask)[1], np.zeros(8))


def test_names_with_prefix_and_older_layer_norms_and_half_precision(tmp_path):
  values = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors().items()}
  plain = {name: value.astype(np.float32) for name, value in values.items()}
  older = lambda name: 'bert.' + name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
      'LayerNorm.bias', 'LayerNorm.beta')
  variants = [
      plain,
      {f'bert.{name}': value for name, value in plain.items() if 'pooler' not in name},
      {older(name): value for name, value in plain.items()},
      values,
  ]
  states = [bert.load_bert(write(tmp_path / str(i), variant)).raw_parameters()
            for i, variant in enumerate(variants)]
  for state in states[1:]:
    for name, value in states[0].items():
      assert state[name].dtype == jnp.float32
      np.testing.assert_array_equal(value, state[name], err_msg=name)


def test_loading_fills_every_parameter_in_its_place(tmp_path):
  loaded = bert.load_bert(write(tmp_path / 'b', tensors())).raw_parameters()
  stored = load_file(tmp_path / 'b' / 'model.safetensors')
  np.testing.assert_array_equal(loaded['layers_down_kernel'][1],
                                stored['encoder.layer.1.output.dense.weight'].T)
  np.testing.assert_array_equal(loaded['layers_query_key_value_kernel'][0, :, 8:16],
                                stored['encoder.layer.0.attention.self.key.weight'].T)
  config = bert.BertConfig.from_folder(tmp_path / 'b')
  with pytest.raises(ValueError, match='parameters have shapes'):
    bert.Bert(config, {**loaded, 'layers_up_bias': loaded['layers_up_bias'][:1]})


def test_more_tokens_than_positions_is_refused(tmp_path):
  model = bert.load_bert(write(tmp_path / 'b', tensors()))
  with pytest.raises(ValueError, match='10 tokens, the model has 9 positions'):
    model(jnp.zeros((1, 10), jnp.int32), jnp.ones((1, 10), bool))


@pytest.mark.parametrize('name', ['embeddings.LayerNorm.weight',
                                  'encoder.layer.1.attention.self.key.bias'])
def test_missing_tensor_or_wrong_shape_is_named(tmp_path, name):
  values = tensors()
  values[name] = np.zeros(5, np.float32)
  with pytest.raises(UserError, match=rf'model\.safetensors: tensor {name} has shape \[5\], '
                                      r'expected \[8\] by config\.json'):
    bert.load_bert(write(tmp_path / 'b', values))
  del values[name]
  with pytest.raises(UserError, match=rf'model\.safetensors: tensor {name} is missing'):
    bert.load_bert(write(tmp_path / 'b', values))


def test_missing_or_broken_files_are_named(tmp_path):
  folder = write(tmp_path / 'b', tensors())
  (folder / 'model.safetensors').write_bytes(b'not a checkpoint')
  with pytest.raises(UserError, match=r'model\.safetensors: cannot be read'):
    bert.load_bert(folder)
  (folder / 'model.safetensors').unlink()
  with pytest.raises(UserError, match=r'model\.safetensors: missing'):
    bert.load_bert(folder)
  (folder / 'config.json').write_text('{')
  with pytest.raises(UserError, match=r'config\.json: not valid JSON'):
    bert.load_bert(folder)
  with pytest.raises(UserError, match=r'nowhere/config\.json: missing'):
    bert.load_bert(tmp_path / 'nowhere')


@pytest.mark.parametrize('change, message', [
    ({'model_type': 'roberta'}, "model_type is 'roberta'"),
    ({'position_embedding_type': 'relative_key'}, "only 'absolute' is read"),
    ({'hidden_act': 'swish'}, "hidden_act is 'swish', expected one of gelu"),
    ({'hidden_size': 7}, 'hidden_size 7 is no multiple of num_attention_heads 2'),
    ({'num_hidden_layers': 0}, 'num_hidden_layers is 0, expected a positive int'),
    ({'vocab_size': 'many'}, "vocab_size is 'many', expected a positive int"),
    ({'intermediate_size': None}, 'intermediate_size is None'),
])
def test_unfit_configs_are_refused(tmp_path, change, message):
  folder = write(tmp_path / 'b', tensors(), {**SMALL, **change})
  with pytest.raises(UserError, match=message):
    bert.load_bert(folder)
  missing = {key: value for key, value in SMALL.items() if key != 'hidden_size'}
  (folder / 'config.json').write_text(json.dumps(missing))
  with pytest.raises(UserError, match='hidden_size is missing'):
    bert.load_bert(folder)
