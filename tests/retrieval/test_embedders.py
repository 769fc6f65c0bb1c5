"""Embedders: batching must not show, places must not matter, and bad folders are named."""

import dataclasses
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from retro_jax.errors import UserError
from retro_jax.models import bert
from retro_jax.retrieval import hashing_embedders as hashing
from retro_jax.retrieval.embedders import (
  BertEmbedder,
  LexicalEmbedder,
  RandomEmbedder,
  plan_batches,
)

ROOT = Path(__file__).parents[2]
WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'a', 'bird', 'sings', 'un', '##sung', '.', 'in']
CONFIG = {'model_type': 'bert', 'vocab_size': 16, 'hidden_size': 12, 'num_hidden_layers': 2,
          'num_attention_heads': 3, 'intermediate_size': 20, 'max_position_embeddings': 24}
TEXTS = ['', 'a', 'a bird sings .', 'A BIRD unsung', 'in a bird in a bird in a bird .',
         'xyz', 'sings ' * 30, 'sings ' * 40, 'a bird sings in .' * 2, '\ud800 a bird']


def write_checkpoint(folder):
  """A tiny BERT with random weights and a word-piece tokenizer of eleven pieces."""
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(CONFIG))
  rng = np.random.default_rng(1)
  d, f, layers = 12, 20, CONFIG['num_hidden_layers']
  shapes = {'embeddings.word_embeddings.weight': (16, d),
            'embeddings.position_embeddings.weight': (24, d),
            'embeddings.token_type_embeddings.weight': (2, d),
            'embeddings.LayerNorm.weight': (d,), 'embeddings.LayerNorm.bias': (d,)}
  for i in range(layers):
    for name, rows, columns in [
        ('attention.self.query', d, d), ('attention.self.key', d, d),
        ('attention.self.value', d, d), ('attention.output.dense', d, d),
        ('intermediate.dense', f, d), ('output.dense', d, f)]:
      shapes[f'encoder.layer.{i}.{name}.weight'] = (rows, columns)
      shapes[f'encoder.layer.{i}.{name}.bias'] = (rows,)
    for name in ('attention.output', 'output'):
      shapes[f'encoder.layer.{i}.{name}.LayerNorm.weight'] = (d,)
      shapes[f'encoder.layer.{i}.{name}.LayerNorm.bias'] = (d,)
  values = {name: 0.4 * rng.normal(size=shape) + name.endswith('LayerNorm.weight')
            for name, shape in shapes.items()}
  save_file({name: value.astype(np.float32) for name, value in values.items()},
            folder / 'model.safetensors')
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(
      {word: i for i, word in enumerate(WORDS)}, unk_token='[UNK]'))
  tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  tokenizer.post_processor = tokenizers.processors.BertProcessing(('[SEP]', 3), ('[CLS]', 2))
  # As published checkpoints do: settings of a training run that must not count.
  tokenizer.enable_truncation(5)
  tokenizer.enable_padding(length=7)
  tokenizer.save(str(folder / 'tokenizer.json'))
  return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return write_checkpoint(tmp_path_factory.mktemp('bert') / 'checkpoint')


@pytest.fixture(scope='module')
def reference(folder):
  """All texts in one batch, masks as test_bert.py checks them, mean by NumPy."""
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tokenizer.no_padding()
  tokenizer.no_truncation()
  rows = [tokenizer.encode(text.replace('\ud800', '?')).ids for text in TEXTS]
  rows = [row if len(row) <= 24 else [*row[:23], row[-1]] for row in rows]
  tokens = np.array([row + [9] * (24 - len(row)) for row in rows], np.int32)
  mask = np.array([[True] * len(row) + [False] * (24 - len(row)) for row in rows])
  x = np.asarray(nnx.jit(lambda model, *a: model(*a))(bert.load_bert(folder), tokens, mask))
  return np.array([row[own].mean(axis=0) for row, own in zip(x, mask)])


def test_batching_padding_and_buckets_do_not_show(folder, reference):
  for settings_ in [{}, {'bucket_lengths': (5, 9), 'batch_tokens': 50}]:
    embedder = BertEmbedder(str(folder), **settings_)
    vectors = embedder.embed(TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), embedder.dimension)
    np.testing.assert_allclose(vectors, reference, atol=1e-5)
  order = np.random.default_rng(0).permutation(len(TEXTS))
  np.testing.assert_allclose(
      embedder.embed([TEXTS[i] for i in order]), reference[order], atol=1e-5)
  np.testing.assert_allclose(embedder.embed(TEXTS[4:5]), reference[4:5], atol=1e-5)
  assert embedder.embed([]).shape == (0, 12)
  # The reference itself tells texts apart, and texts differing past the cut alike.
  assert np.abs(reference[2] - reference[3]).max() > 0.1
  np.testing.assert_array_equal(reference[6], reference[7])


def test_sharded_over_eight_devices_equals_one(folder, reference):
  if jax.device_count() < 8:
    pytest.skip('needs 8 devices; run with XLA_FLAGS=--xla_force_host_platform_device_count=8')
  axes = ('data', 'fsdp', 'tensor')
  mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(jax.sharding.AxisType.Explicit,) * 3)
  embedder = BertEmbedder(str(folder), mesh=mesh, bucket_lengths=(24,))
  parameters, sharding, forward = embedder._loaded
  tokens = jax.device_put(np.zeros((32, 24), np.int32), sharding)
  result = forward(parameters, tokens, jax.device_put(np.full(32, 8, np.int32), sharding))
  assert len({shard.device for shard in result.addressable_shards}) == 8
  assert result.addressable_shards[0].data.shape == (4, 12)
  np.testing.assert_allclose(embedder.embed(TEXTS), reference, atol=1e-5)
  with jax.set_mesh(mesh):  # As inside a training run.
    np.testing.assert_allclose(embedder.embed(TEXTS), reference, atol=1e-5)
    np.testing.assert_allclose(
        BertEmbedder(str(folder)).embed(TEXTS[2:3]), reference[2:3], atol=1e-5)


def test_normalize_and_length_come_from_the_folder_unless_given(tmp_path, reference):
  folder = write_checkpoint(tmp_path / 'b')
  plain = BertEmbedder(str(folder)).describe()
  assert not plain['normalize'] and plain['max_length'] == 24
  (folder / 'modules.json').write_text(json.dumps(
      [{'type': 'sentence_transformers.models.Transformer'},
       {'type': 'sentence_transformers.models.Normalize'}]))
  (folder / 'sentence_bert_config.json').write_text('{"max_seq_length": 6}')
  told = BertEmbedder(str(folder))
  short = 'a bird sings .'
  np.testing.assert_allclose(told.embed([short])[0], reference[2] / np.linalg.norm(reference[2]),
                             atol=1e-5)
  np.testing.assert_allclose(BertEmbedder(str(folder), normalize=False).embed([short])[0],
                             reference[2], atol=1e-5)
  np.testing.assert_allclose(told.embed([short + ' in']), told.embed([short]), atol=1e-6)
  longer = BertEmbedder(str(folder), max_length=24)
  assert np.abs(longer.embed([short + ' in']) - longer.embed([short])).max() > 1e-3
  plain = BertEmbedder(str(folder), normalize=False)
  assert len({embedder.fingerprint for embedder in (plain, told, longer)}) == 3


@pytest.mark.parametrize('at_once', [1, 3, 12])
def test_warmed_up_it_compiles_no_more(folder, caplog, at_once):
  def compiled(work):
    caplog.clear()
    with jax.log_compiles():
      work()
    return sum(record.getMessage().startswith('Compiling') for record in caplog.records)

  embedder = BertEmbedder(str(folder), bucket_lengths=(5, 9), batch_tokens=50)
  assert compiled(lambda: embedder.warm_up(at_once)) >= 3
  of_any_length = ['a ' * count for count in range(30)]
  for texts in (1, at_once):
    parts = [of_any_length[i:i + texts] for i in range(0, 30, texts)]
    assert compiled(lambda parts=parts: [embedder.embed(part) for part in parts]) == 0
  # The check can fail: a cold one compiles.
  assert compiled(lambda: BertEmbedder(str(folder)).embed(['a'])) > 0


def test_progress_counts_every_text(folder):
  for embedder in (BertEmbedder(str(folder), bucket_lengths=(24,), batch_tokens=96),
                   LexicalEmbedder(), RandomEmbedder()):
    done = []
    embedder.embed(TEXTS, done.append)
    assert sum(done) == len(TEXTS)


def test_fingerprint_follows_content_not_place(tmp_path, folder):
  first = BertEmbedder(str(folder)).fingerprint
  other = write_checkpoint(tmp_path / 'copy')
  assert BertEmbedder(str(other)).fingerprint == first
  text = (other / 'tokenizer.json').read_text()
  (other / 'tokenizer.json').write_text(text + '\n')
  changed = BertEmbedder(str(other)).fingerprint
  assert changed != first
  with open(other / 'model.safetensors', 'r+b') as file:
    file.seek(-1, os.SEEK_END)
    file.write(b'\x01')
  assert BertEmbedder(str(other)).fingerprint not in (first, changed)
  json.dumps(BertEmbedder(str(folder)).describe())


def test_bad_folders_are_named(tmp_path):
  with pytest.raises(UserError, match=r'nowhere/config\.json: missing'):
    BertEmbedder(str(tmp_path / 'nowhere')).embed(['a'])
  folder = write_checkpoint(tmp_path / 'b')
  with pytest.raises(UserError, match='max_length is 25, expected 3 to 24'):
    BertEmbedder(str(folder), max_length=25).embed(['a'])
  tokenizer = (folder / 'tokenizer.json').read_text()
  (folder / 'tokenizer.json').write_text(tokenizer.replace('"in":10', '"in":16').replace(
      '"in": 10', '"in": 16'))
  with pytest.raises(UserError, match=r'tokenizer\.json: holds token id 16, but the model has 16'):
    BertEmbedder(str(folder)).embed(['a'])
  (folder / 'tokenizer.json').write_text('{}')
  with pytest.raises(UserError, match=r'tokenizer\.json: cannot be read'):
    BertEmbedder(str(folder)).embed(['a'])
  (folder / 'tokenizer.json').unlink()
  for use in (lambda e: e.embed(['a']), lambda e: e.fingerprint):
    with pytest.raises(UserError, match=r'tokenizer\.json: missing'):
      use(BertEmbedder(str(folder)))
  (folder / 'modules.json').write_text('{}')
  with pytest.raises(UserError, match=r'modules\.json: expected a JSON list'):
    BertEmbedder(str(folder))._normalize
  for bad in ({'batch_tokens': 0}, {'bucket_lengths': ()}, {'max_length': -1}):
    with pytest.raises(UserError, match='BertEmbedder'):
      BertEmbedder(**bad)


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 40), max_size=60), tokens=st.integers(1, 200),
       devices=st.sampled_from([1, 2, 8]),
       buckets=st.sets(st.integers(1, 39), max_size=5).map(lambda b: sorted(b | {40})))
def test_plan_covers_every_text_once_in_few_shapes(lengths, tokens, devices, buckets):
  plan = plan_batches(lengths, buckets, tokens, devices)
  assert sorted(i for members, _ in plan for i in members if i >= 0) == list(range(len(lengths)))
  for members, (rows, length) in plan:
    assert len(members) == rows and rows % devices == 0 and length in buckets
    members = members[members >= 0]
    assert max(lengths[i] for i in members) <= length
    # No shorter bucket would hold them all, and no text is padded far beyond its own bucket.
    assert all(b >= length for b in buckets if b >= max(lengths[i] for i in members))
    own = min(b for b in buckets if b >= min(lengths[i] for i in members))
    assert length <= max(own, 2 * min(lengths[i] for i in members))
    assert rows <= max(4, tokens // length, 1) * devices
  shapes = {shape for _, shape in plan}
  assert len(shapes) <= 3 * len(buckets)


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 40), max_size=60), tokens=st.integers(1, 200),
       devices=st.integers(2, 8))
def test_each_device_computes_what_one_device_would(lengths, tokens, devices):
  def per_device(plan, count):
    parts = [(part.tolist(), (rows // count, length)) for members, (rows, length) in plan
             for part in members.reshape(count, -1)]
    return [part for part in parts if set(part[0]) != {-1}]
  buckets = [8, 16, 40]
  assert per_device(plan_batches(lengths, buckets, tokens, devices), devices) == per_device(
      plan_batches(lengths, buckets, tokens), 1)


def test_vectors_are_the_same_bits_with_other_threads_and_devices(tmp_path):
  """A store's bytes may not depend on the machine's load or on who embedded which shard."""
  code = ("import multiprocessing, os, sys\n"
          "from retro_jax.retrieval.embedders import BertEmbedder, on_local_devices\n"
          "def embed(path, threads):\n"
          "  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])\n"
          "  import jax, numpy as np\n"
          "  words = 'the sea turned and no fishermen reached its harbour before night'.split()\n"
          "  texts = [' '.join(words[(i * j) % 11] for j in range(i)) for i in range(1, 60)]\n"
          "  embedder = on_local_devices(BertEmbedder(batch_tokens=256, bucket_lengths=(16, 64)))\n"
          "  np.save(path, embedder.embed(texts))\n"
          "  print(jax.device_count())\n"
          "if __name__ == '__main__':\n"
          "  worker = multiprocessing.get_context('spawn').Process(\n"
          "      target=embed, args=(sys.argv[1], int(sys.argv[2])))\n"
          "  worker.start(); worker.join(); sys.exit(worker.exitcode)\n")
  (tmp_path / 'embed.py').write_text(code)
  results = []
  for threads, devices in [(1, 1), (2, 1), (2, 4)]:
    path = tmp_path / f'{threads}-{devices}.npy'
    done = subprocess.run(
        [sys.executable, tmp_path / 'embed.py', path, str(threads)], check=True, text=True,
        capture_output=True, cwd=ROOT, timeout=200, env={
            **os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'})
    assert done.stdout.split() == [str(devices)]
    results.append(np.load(path))
  assert np.abs(results[0]).max() > 0
  for other in results[1:]:
    np.testing.assert_array_equal(results[0], other)


def test_plan_wastes_little_on_many_texts():
  lengths = np.random.default_rng(0).integers(30, 100, 5000)
  buckets = (16, 32, 48, 64, 80, 96, 128)
  plan = plan_batches(lengths, buckets, 1024)
  assert sum(rows * length for _, (rows, length) in plan) < 1.2 * lengths.sum()


def slow_lexical(text, embedder):
  """The definition with dictionaries; the hashing is shared, the counting is not."""
  words = re.findall(r'\w+|[^\w\s]', text.lower())
  features = Counter((0, *words[i:i + n]) for n in range(1, embedder.word_ngrams + 1)
                     for i in range(len(words) - n + 1))
  if n := embedder.character_ngrams:
    features.update((1, *text.lower()[i:i + n]) for i in range(len(text.lower()) - n + 1))
  vector = np.zeros(embedder.dimension)
  for (kind, *parts), times in features.items():
    key = np.array([kind * 2**32 + len(parts)], np.uint64)
    for part in parts:
      key = hashing._mix(key + np.uint64(ord(part) if kind else hashing._hash(part)))
    plain = not kind and all(not (word[0].isalnum() or word[0] == '_') for word in parts)
    value = int(key[0])
    vector[value % 2**40 % embedder.dimension] += (1 if value >> 63 else -1) * math.log(
        1 + times) * (embedder.punctuation_weight if plain else 1)
  if not vector.any():
    signs = hashing._mix(np.arange(embedder.dimension, dtype=np.uint64)) >> np.uint64(63)
    vector = np.where(signs, 1.0, -1.0)
  return vector / np.linalg.norm(vector)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(st.sampled_from('aBb c.(_é\n😀'), max_size=20), max_size=6),
       st.integers(0, 3), st.integers(0, 3))
def test_lexical_equals_the_slow_definition(texts, word_ngrams, character_ngrams):
  embedder = LexicalEmbedder(32, word_ngrams, character_ngrams or (word_ngrams == 0))
  vectors = embedder.embed(texts)
  assert vectors.shape == (len(texts), 32) and vectors.dtype == np.float32
  for text, vector in zip(texts, vectors):
    np.testing.assert_allclose(vector, slow_lexical(text, embedder), atol=1e-6)


@pytest.mark.parametrize('embedder', [
    LexicalEmbedder(), LexicalEmbedder(word_ngrams=0, character_ngrams=3),
    LexicalEmbedder(dimension=100, character_ngrams=0), RandomEmbedder(seed=3)])
def test_vectors_do_not_depend_on_company_and_have_unit_length(embedder):
  texts = TEXTS + ['def f(x):\n  return x + 1  # 漢字 🎉']
  together = embedder.embed(texts)
  for i, text in enumerate(texts):
    np.testing.assert_array_equal(embedder.embed([text])[0], together[i])
  np.testing.assert_array_equal(embedder.embed(texts[::-1]), together[::-1])
  lengths = np.linalg.norm(together, axis=1)
  assert np.all((np.abs(lengths - 1) < 1e-5) | (lengths == 0))
  assert lengths[-1] > 0 and embedder.embed([]).shape == (0, embedder.dimension)


def test_lexical_finds_the_text_that_shares_words():
  texts = ['def read_lines(path): return open(path).read().splitlines()',
           'The tide turned before the fishermen reached the harbour.',
           'for key, value in table.items(): print(key, value)']
  query = ['with open(path) as file: lines = file.read().splitlines()',
           'Fishermen left the harbour at the turn of the tide.',
           'print(value) for value in table.values()']
  for embedder in (LexicalEmbedder(), LexicalEmbedder(character_ngrams=0)):
    similarity = embedder.embed(query) @ embedder.embed(texts).T
    np.testing.assert_array_equal(similarity.argmax(axis=1), [0, 1, 2])
  # A single occurrence more changes a direction little: log(1 + times).
  once, twice = LexicalEmbedder(character_ngrams=0).embed(['sea sky sky', 'sea sky sky sky'])
  assert 0.9 < once @ twice < 1


def test_random_vectors_are_normal_directions_of_text_and_seed():
  texts = [f'text {i}' for i in range(300)]
  vectors = RandomEmbedder(64, 0).embed(texts)
  products = vectors @ vectors.T
  np.fill_diagonal(products, 0)
  assert np.abs(products).max() < 0.65 and abs(products.std() * 8 - 1) < 0.05
  assert abs(vectors.mean()) < 0.01
  # Fourth moment of a normal variable, 3: directions favour no axis.
  assert abs((vectors**4).mean() * 64**2 - 3 * 64 / 66) < 0.15
  assert np.abs(RandomEmbedder(64, 1).embed(texts) - vectors).max() > 0.1


def test_equal_in_another_process_with_another_hash_seed():
  code = ('import numpy as np; from retro_jax.retrieval.embedders import *; import hashlib;'
          'print([(e.fingerprint, hashlib.sha256(e.embed(["a b", "c 漢"]).tobytes()).hexdigest())'
          ' for e in (LexicalEmbedder(character_ngrams=2), RandomEmbedder())])')
  outputs = [subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, text=True,
                            capture_output=True, env={**os.environ, 'PYTHONHASHSEED': seed}).stdout
             for seed in ('1', '2')]
  assert outputs[0] == outputs[1] and len(outputs[0]) > 100


def test_a_text_without_features_is_near_to_nothing_else():
  texts = ['the moon is full', 'tides rise and fall with it', 'def read(self): return 1', '', '\n']
  vectors = LexicalEmbedder().embed(texts)
  squares = np.sum((vectors[:, None] - vectors) ** 2, -1)
  assert squares[3, 4] == 0 and (squares[3:, :3] > 1.8).all()


def test_known_vectors_stay_what_they_were():
  # Stored databases hold such vectors: a change must come with a new `version`.
  lexical = LexicalEmbedder(dimension=4).embed(['the moon is full , the tide high'])[0]
  random = RandomEmbedder(dimension=4).embed(['moon'])[0]
  np.testing.assert_allclose(lexical, KNOWN_LEXICAL, atol=1e-6)
  np.testing.assert_allclose(random, KNOWN_RANDOM, atol=1e-6)


KNOWN_LEXICAL = [-0.3349246, 0.8373116, 0.3851633, 0.1959184]
KNOWN_RANDOM = [-0.7497022, -0.0058571, 0.0237828, 0.6613219]


def test_embedders_are_frozen_pickle_and_differ(folder):
  embedders = [BertEmbedder(str(folder), bucket_lengths=(24,)), LexicalEmbedder(),
               LexicalEmbedder(lowercase=False), LexicalEmbedder(punctuation_weight=1.0),
               RandomEmbedder(), RandomEmbedder(seed=1)]
  for embedder in embedders:
    vectors = embedder.embed(['A bird .', 'sings'])
    copy = pickle.loads(pickle.dumps(embedder))
    assert copy == embedder and copy.fingerprint == embedder.fingerprint
    assert len(pickle.dumps(embedder)) < 1000
    np.testing.assert_array_equal(copy.embed(['A bird .', 'sings']), vectors)
    with pytest.raises(dataclasses.FrozenInstanceError):
      embedder.dimension = 5
  assert len({embedder.fingerprint for embedder in embedders}) == len(embedders)


def test_hashing_embedders_need_no_jax():
  code = ('import sys; from retro_jax.retrieval.embedders import LexicalEmbedder;'
          'LexicalEmbedder().embed(["a"]); assert "jax" not in sys.modules')
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


@pytest.mark.parametrize('make', [
    lambda: LexicalEmbedder(dimension=0),
    lambda: LexicalEmbedder(word_ngrams=0, character_ngrams=0),
    lambda: LexicalEmbedder(word_ngrams=-1, character_ngrams=2),
    lambda: RandomEmbedder(dimension=-1)])
def test_impossible_settings_are_refused(make):
  with pytest.raises(UserError, match='must be positive'):
    make()


def test_spread_over_the_local_devices_it_is_the_same_embedder():
  import jax

  from retro_jax.retrieval.embedders import on_local_devices
  one = BertEmbedder()
  many = on_local_devices(one)
  assert many.mesh.devices.size == len(jax.local_devices()) > 1
  assert many.fingerprint == one.fingerprint
  texts = ['def f(x):', 'return x + 1', 'a longer line of text about retrieval']
  np.testing.assert_allclose(many.embed(texts), one.embed(texts), atol=1e-5)
  lexical = LexicalEmbedder()
  assert on_local_devices(lexical) is lexical
