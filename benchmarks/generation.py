"""Milliseconds a generated token: cached decoding, by context, against RETRO-pytorch's.

  python benchmarks/generation.py sizes --peer_python=peer/bin/python
  python benchmarks/generation.py live --run_dir=... --vocabulary=... --database=... --index=...

`sizes`: the SMALL model (d 256, 6 layers, CCA in 3 and 6, an encoder of 2, 32,000 tokens; random
values), one text, 10 % of the tokens kept in sampling, neighbours stubbed by 2 random chunks of 128
for both sides. CPU milliseconds of all threads a token, of the 64 tokens after the context (of 4
for the peer, which is slow), so that one chunk is completed and its neighbours are read. The
contenders take turns in rounds; medians are over the rounds. Each context has the smallest window
that holds it and 64 more tokens, or all have --window, as requests to one server. "alone" is the
time of reading all layers' caches and nothing else: what attention itself costs. RETRO-pytorch
drops its `heads` argument; its two stacks are built anew here. `pip install torch retro-pytorch`
into an environment of its own is the peer.

`live`: a trained model with its database, in turns with live retrieval, with the same neighbours
from memory, which tells what finding them adds, and without any (RETRO[OFF]), where encoder and
CCA do not run either; and which share of the time embedding, searching and the rest take.
"""

import argparse
import json
import statistics
import sys
from typing import Any

import numpy as np
from contenders import PEER_MODEL, ask, parsed, ratio, start

M, K, VOCABULARY = 64, 2, 32_000
SMALL = dict(d_model=256, num_layers=6, num_heads=4, cca_layers=(3, 6), encoder_layers=2,
             encoder_d_model=256)
CONTEXTS = (64, 256, 512, 1024)
TOKENS, PEER_TOKENS = 64, 4

PEER = PEER_MODEL + """
from retro_pytorch.training import TrainingWrapper
size, (m, k, vocabulary), threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
torch.manual_seed(0)
model = peer_model(size, m, vocabulary, 1152)
# The wrapper without its corpus, index and BERT: only `generate` is wanted.
wrapper = TrainingWrapper.__new__(TrainingWrapper)
torch.nn.Module.__init__(wrapper)
wrapper.retro, wrapper.chunk_size = model, m
class Off(torch.nn.Module):
  def forward(self, tokens, retrieved=None):
    return model(tokens)
def run(context, retrieval, tokens):
  wrapper.retro = model if retrieval else Off().eval()
  if not retrieval:
    wrapper.retro.register_parameter('p', torch.nn.Parameter(torch.zeros(1)))
    wrapper.retro.pad_id = 0
  wrapper.max_seq_len = context - 1 + tokens
  wrapper.fetch_knn_chunks_fn = lambda chunks: torch.randint(
      3, vocabulary, (len(chunks), k, 2 * m))
  start = torch.randint(3, vocabulary, (1, context))
  begin = time.process_time()
  out = wrapper.generate(start, filter_thres=0.9)
  seconds = time.process_time() - begin
  assert out.shape[1] == context + tokens, out.shape
  return seconds
"""

OURS = """
import json, sys, time
import jax, numpy as np
from retro_jax.generation.engine import Engine
from retro_jax.generation.live_retrieval import FoundNeighbors
from retro_jax.generation.requests import Request
from retro_jax.models import attention_kernels as kernels, retro
from retro_jax.models.config import RetroConfig
size, (m, k, vocabulary), threads, changes, window = json.loads(sys.argv[1])
config = RetroConfig(vocab_size=vocabulary, head_dim=64, encoder_heads=size['num_heads'],
                     chunk_length=m, num_neighbors=k, **(size | changes))
rng = np.random.default_rng(0)
shapes = jax.eval_shape(lambda: retro.init_parameters(config, jax.random.key(0)))
parameters = {name: rng.normal(0, 0.05, leaf.shape).astype(np.float32)
              for name, leaf in shapes.items()}
class Numbers:
  'Random ids for text: a number is how many.'
  size, bos_id, eos_id, path, fingerprint = vocabulary, 1, 2, 'numbers', 'numbers'
  token_bytes = np.where(np.arange(vocabulary) > 2, 1, 0)
  def encode(self, text): return rng.integers(3, vocabulary, int(text)).tolist()
  def decode(self, ids): return ''
  def decode_bytes(self, ids): return b''
class Stub:
  'Random neighbours, as the peer has.'
  num_neighbors, chunk_length, vocabulary_fingerprint = k, m, 'numbers'
  class database:
    document = staticmethod(lambda chunk: 0)
    document_info = staticmethod(lambda ordinal: {'id': '', 'title': ''})
  def check_fit(self, config): pass
  def neighbors_of(self, chunks, watch):
    tokens = rng.integers(3, vocabulary, (len(chunks), k, 2 * m)).astype(np.int32)
    return [FoundNeighbors(np.arange(k), np.zeros(k, np.float32), row,
                           np.full(k, 2 * m, np.int32)) for row in tokens]
engines, attentions = {}, {}
def holds(context): return window or context + m
def attention_alone(context, tokens):
  'What a token reads of the caches of all layers, and nothing else.'
  if context not in attentions:
    n, heads, c = holds(context), config.num_heads, config.head_dim
    place = lambda *shape: jax.numpy.asarray(rng.normal(0, 1, shape).astype(np.float32))
    q, mask = place(1, 1, heads, c), np.arange(n)[None, None] <= context
    index = np.clip(n - 1 - context + np.arange(n), 0, n - 1)[None, None]
    caches = [(place(1, heads, n, c), place(1, heads, n, c), place(heads, n, c))
              for _ in range(config.num_layers)]
    def read(q, caches):
      for keys, values, table in caches:
        by_key = None
        if config.positions == 'relative':
          by_key = kernels.logits_by_key(q, table, index)
        q = kernels.cached(q, keys, values, mask, by_key)
      return q
    attentions[context] = jax.jit(read), q, caches
  read, q, caches = attentions[context]
  begin = time.process_time()
  for _ in range(tokens):
    np.asarray(read(q, caches))
  return time.process_time() - begin
def run(context, retrieval, tokens):
  if retrieval == 'attention':
    return attention_alone(context, tokens)
  key = holds(context), retrieval
  if key not in engines:
    engines[key] = Engine(config, parameters, Numbers(), Stub() if retrieval else None,
                          window=holds(context))
  engine = engines[key]
  before = engine.tokens_written
  # bos is one of the context's tokens; the first token is written by the last part of the prompt.
  stream = engine.submit(Request(str(context - 1), tokens + 1, top_k=vocabulary // 10, seed=3))
  while engine.tokens_written == before:
    engine.step()
  begin = time.process_time()
  for _ in range(tokens):
    engine.step()
  seconds = time.process_time() - begin
  engine.run()
  return seconds
"""

LOOP = """
for line in sys.stdin:
  print(json.dumps(run(*json.loads(line))), flush=True)
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('what', choices=('sizes', 'live'))
  parser.add_argument('--peer_python', default='', help="interpreter with the peer; '' for none")
  parser.add_argument('--contexts', type=int, nargs='+', default=CONTEXTS)
  parser.add_argument('--retrieval', nargs='+', default=('off', 'on'), choices=('off', 'on'))
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--window', type=int, default=0, help="of our side's engine; 0 for the "
                      'smallest of each context')
  parser.add_argument('--change', action='append', default=[], metavar='FIELD=VALUE',
                      help='of RetroConfig, for our side')
  for name in ('run_dir', 'vocabulary', 'database', 'index'):
    parser.add_argument(f'--{name}', default='', help='of `live`, as in gin/runs/generate.gin')
  parser.add_argument('--embedder', default='bert', choices=('bert', 'lexical'))
  parser.add_argument('--dimension', type=int, default=384, help='of the lexical embedder')
  parser.add_argument('--tokens', type=int, default=320, help='of `live`, written in a round')
  parser.add_argument('--output', default='', help='JSON file for the numbers')
  arguments = parser.parse_args()
  result = sizes(arguments) if arguments.what == 'sizes' else live(arguments)
  print(json.dumps(result, indent=2))
  if arguments.output:
    from retro_jax import storage
    storage.write_json(arguments.output, result)


def sizes(arguments: argparse.Namespace) -> dict[str, Any]:
  """CPU milliseconds a token by context, and ratios."""
  changes = parsed(arguments.change)
  given = [SMALL, (M, K, VOCABULARY), arguments.threads]
  ours = start(sys.executable, OURS + LOOP, [*given, changes, arguments.window],
               arguments.threads)
  peer = arguments.peer_python and start(arguments.peer_python, PEER + LOOP, given,
                                         arguments.threads)
  settings = [word == 'on' for word in arguments.retrieval]
  cases = [('ours', ours, context, on, TOKENS) for on in [*settings, 'attention']
           for context in arguments.contexts]
  if peer:
    cases += [('peer', peer, 512, on, PEER_TOKENS) for on in settings]
  word = lambda on: 'alone' if on == 'attention' else 'on' if on else 'off'
  name = lambda who, context, on: f'{who} {context} {word(on)}'
  milliseconds: dict[str, list[float]] = {}
  for number in range(-1, arguments.rounds):
    for who, process, context, on, tokens in cases:
      took = 1000 * ask(who, process, [context, on, tokens]) / tokens
      if number >= 0:  # the first round compiles
        milliseconds.setdefault(name(who, context, on), []).append(took)
    print(f'round {number + 1}: ' + ', '.join(
        f'{key} {values[-1]:.1f}' for key, values in milliseconds.items()), flush=True)
  over = lambda a, b: ratio(milliseconds[a], milliseconds[b])
  result = {'size': SMALL | changes, 'window': arguments.window, 'threads': arguments.threads,
            'milliseconds': milliseconds,
            'median': {key: statistics.median(values) for key, values in milliseconds.items()}}
  first, last = arguments.contexts[0], arguments.contexts[-1]
  take = lambda context, what: np.array(milliseconds[name('ours', context, what)])
  for on in settings:
    if last != first:
      result[f'{last} over {first}, {word(on)}'] = over(
          name('ours', last, on), name('ours', first, on))
      rest = [take(context, on) - take(context, 'attention') for context in (last, first)]
      result[f'{last} over {first}, {word(on)}, without reading the caches'] = float(
          np.median(rest[0] / rest[1]))
    if peer and 512 in arguments.contexts:
      result[f'peer over ours at 512, {word(on)}'] = over(
          name('peer', 512, on), name('ours', 512, on))
  return result


def live(arguments: argparse.Namespace) -> dict[str, Any]:
  """What live retrieval adds to the time of a text, and where that goes."""
  import time

  from retro_jax.data.vocabulary import Vocabulary
  from retro_jax.generation.engine import Engine
  from retro_jax.generation.live_retrieval import LiveRetriever
  from retro_jax.generation.requests import Request
  from retro_jax.retrieval.database import ChunkDatabase
  from retro_jax.retrieval.embedders import BertEmbedder, LexicalEmbedder
  from retro_jax.retrieval.sharded_index import Index
  from retro_jax.training.checkpoints import load_model
  config, parameters, _ = load_model(arguments.run_dir)
  vocabulary, database = Vocabulary.load(arguments.vocabulary), ChunkDatabase.open(
      arguments.database)
  embedder = (BertEmbedder() if arguments.embedder == 'bert'
              else LexicalEmbedder(arguments.dimension))

  class Remembering(LiveRetriever):
    """Finds what it found before without looking for it, if asked to."""
    from_memory, found = False, {}

    def neighbors_of(self, chunks, watch):
      if not self.from_memory:
        self.found.update(
            (chunk.tobytes(), neighbors)
            for chunk, neighbors in zip(chunks, super().neighbors_of(chunks, watch)))
      return [self.found[chunk.tobytes()] for chunk in chunks]

  retriever = Remembering(database, Index.open(arguments.index, database), embedder, vocabulary, K)
  retriever.warm_up(1)
  m = config.chunk_length
  # The whole text fits, so that nothing is read twice.
  window = (2 + -(-arguments.tokens // m)) * m
  engine = Engine(config, parameters, vocabulary, retriever, window=window)
  prompt = vocabulary.decode(database.tokens(0).tolist()[:m - 1])
  seconds: dict[str, list[float]] = {'live': [], 'from memory': [], 'off': []}
  parts: dict[str, list[float]] = {}
  for number in range(-1, arguments.rounds):
    for how, values in seconds.items():
      engine.seconds.clear()
      retriever.from_memory = how == 'from memory'
      begin = time.perf_counter()
      made = engine.generate(
          Request(prompt, arguments.tokens, seed=number + 1, retrieval=how != 'off'))
      took = (time.perf_counter() - begin) / max(1, len(made.tokens))
      if number >= 0:  # the first round compiles
        values.append(took)
        if how == 'live':
          for part, calls in engine.seconds.items():
            parts.setdefault(part, []).extend(calls)
  total = sum(parts['step'])
  retrieving = ('embed', 'search', 'neighbour tokens', 'describe')
  return {
      'database': {'chunks': database.num_chunks, 'embedder': arguments.embedder},
      'milliseconds a token': {how: 1000 * statistics.median(values)
                               for how, values in seconds.items()},
      **{f'live over {how}': ratio(seconds['live'], seconds[how])
         for how in ('from memory', 'off')},
      'share of retrieval': sum(sum(parts.get(part, ())) for part in retrieving) / total,
      'shares': {part: sum(values) / total for part, values in parts.items() if part != 'step'},
      'milliseconds at 50, 90, 99 %': {
          part: np.percentile(1000 * np.array(values), (50, 90, 99)).round(3).tolist()
          for part, values in parts.items()}}


if __name__ == '__main__':
  main()
