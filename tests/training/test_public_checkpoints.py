"""Imports of public checkpoints: their logits, their refusals, and the way to a RETROfit."""

import functools
import json

import jax
import numpy as np
import pytest

from retro_jax.data.vocabulary import Vocabulary
from retro_jax.errors import UserError
from retro_jax.models import retro
from retro_jax.training import checkpoints
from retro_jax.training.public_checkpoints import import_model, read_config
from tests import public_models
from tests.public_models import GPT2, LLAMA, LLAMA_3, QWEN

KINDS = {'llama': LLAMA, 'llama3': LLAMA_3, 'qwen2': QWEN, 'gpt2': GPT2}
TEXT = 'def return self import class None'


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """Each kind: (source, folder, arrays); one comes in shards."""
  path = tmp_path_factory.mktemp('public')
  made = {}
  for name, config in KINDS.items():
    tensors = public_models.write_folder(path / name, config, shards=2 if name == 'llama' else 1)
    import_model(path / name, path / f'{name}_imported')
    made[name] = path / name, path / f'{name}_imported', tensors
  return made


def our_logits(folder, tokens):
  """Logits by the original's ids: ours without padding."""
  model, parameters, _ = checkpoints.load_model(folder)
  padded = np.zeros((1, -(-len(tokens) // 64) * 64), np.int32)
  padded[0, :len(tokens)] = tokens + 1
  if model.max_positions:  # as long as its positions go
    padded = padded[:, :model.max_positions]
    model = checkpoints.dataclasses.replace(model, chunk_length=8, retrieved_length=0)
  run = jax.jit(functools.partial(retro.apply, model))
  found = np.asarray(run(parameters, padded, (padded > 0).astype(np.int32), None))
  assert np.all(found[..., 0] == -np.inf)
  return found[0, :len(tokens), 1:]


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('name', KINDS)
def test_logits_are_those_of_the_papers(imported, name):
  _, folder, tensors = imported[name]
  tokens = np.random.default_rng(1).integers(0, public_models.VOCABULARY, 30)
  close(our_logits(folder, tokens), public_models.logits(KINDS[name], tensors, tokens))


@pytest.mark.parametrize('name', KINDS)
def test_logits_are_those_of_transformers(imported, name):
  """Where both are installed, which this project's own environment does not ask for."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  source, folder, _ = imported[name]
  theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
  tokens = np.random.default_rng(2).integers(0, public_models.VOCABULARY, 30)
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens[None])).logits[0].numpy()
  close(our_logits(folder, tokens), expected)


def test_bfloat16_is_read(tmp_path):
  tensors = public_models.write_folder(tmp_path / 'source', GPT2)
  rounded = {name: jax.numpy.asarray(value, 'bfloat16') for name, value in tensors.items()}
  import safetensors.flax
  safetensors.flax.save_file(rounded, tmp_path / 'source' / 'model.safetensors')
  import_model(tmp_path / 'source', tmp_path / 'out')
  _, parameters, _ = checkpoints.load_model(tmp_path / 'out')
  np.testing.assert_array_equal(parameters['embedding.table'], np.asarray(
      rounded['transformer.wte.weight'], np.float32))


@pytest.mark.parametrize('config, changes, message', [
    (LLAMA, {'model_type': 'bloom'}, "model_type is 'bloom', expected one of llama"),
    (LLAMA, {'hidden_act': 'relu'}, "hidden_act is 'relu'"),
    (LLAMA, {'rope_scaling': {'type': 'yarn', 'factor': 2}}, "rope_scaling has rope_type 'yarn'"),
    (LLAMA, {'rope_parameters': {'rope_type': 'linear'}}, "rope_parameters has rope_type 'linear'"),
    (LLAMA, {'sliding_window': 128}, 'sliding_window is 128, expected null'),
    (LLAMA, {'layer_types': ['sliding_attention']}, "layer_types has 'sliding_attention'"),
    (LLAMA, {'partial_rotary_factor': 0.5}, 'partial_rotary_factor is 0.5'),
    (LLAMA, {'quantization_config': {'bits': 4}}, 'quantization_config is set'),
    (GPT2, {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx is True'),
    (GPT2, {'activation_function': 'relu'}, "activation_function is 'relu'"),
    (GPT2, {'n_positions': None, 'n_embd': None}, None)])
def test_what_it_cannot_compute_is_refused_by_its_field(config, changes, message):
  changed = {name: value for name, value in (config | changes).items() if value is not None}
  with pytest.raises(UserError, match=message or "has no field 'n_embd'"):
    read_config(changed, 'config.json')


def test_folders_that_are_not_whole_are_refused(tmp_path):
  public_models.write_folder(tmp_path / 'm', LLAMA, shards=2)
  shard = tmp_path / 'm' / 'model-00002-of-00002.safetensors'
  whole = shard.read_bytes()
  shard.write_bytes(whole[:100])
  with pytest.raises(UserError, match='missing or damaged'):
    import_model(tmp_path / 'm', tmp_path / 'out')
  shard.unlink()
  with pytest.raises(UserError, match='missing or damaged'):
    import_model(tmp_path / 'm', tmp_path / 'out')
  shard.write_bytes(whole)
  (tmp_path / 'm' / 'config.json').write_text(json.dumps(LLAMA | {'num_hidden_layers': 4}))
  with pytest.raises(UserError, match='holds no array model.layers.3'):
    import_model(tmp_path / 'm', tmp_path / 'out')
  (tmp_path / 'm' / 'config.json').write_text(json.dumps(LLAMA | {'intermediate_size': 25}))
  with pytest.raises(UserError, match='feed_forward.* the two do not belong together'):
    import_model(tmp_path / 'm', tmp_path / 'out')
  (tmp_path / 'm' / 'config.json').write_text(json.dumps(LLAMA | {'vocab_size': 290}))
  with pytest.raises(UserError, match='tokenizer.json has 300 ids'):
    import_model(tmp_path / 'm', tmp_path / 'out')
  (tmp_path / 'm' / 'model.safetensors.index.json').unlink()
  (tmp_path / 'm' / 'config.json').write_text(json.dumps(LLAMA))
  with pytest.raises(UserError, match='no model.safetensors there'):
    import_model(tmp_path / 'm', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_the_vocabulary_comes_along(imported):
  _, folder, _ = imported['llama3']
  vocabulary = Vocabulary.load(folder / checkpoints.VOCABULARY)
  model, facts = checkpoints.read_model_description(folder)
  assert facts['fingerprint'] == vocabulary.fingerprint and vocabulary.size == model.vocab_size
  assert (vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id) == (0, 1, 2)
  import tokenizers
  theirs = tokenizers.Tokenizer.from_str(public_models.tokenizer())
  assert [i - 1 for i in vocabulary.encode(TEXT)] == theirs.encode(TEXT).ids
