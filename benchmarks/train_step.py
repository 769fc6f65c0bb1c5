"""A training step on CPUs: this project's RETRO and baseline against RETRO-pytorch's.

  python benchmarks/train_step.py small --peer_python=peer/bin/python

Forward, backward and AdamW in float32 on random tokens, all contenders in turn in each round,
each in a process of its own and after a step that is not counted; prints tokens per CPU second
(all threads; waiting ones sleep) and ratios, medians over the rounds. The sizes are SMALL (d 256,
6 layers) and MED (d 896, 12 layers), sequences of 512 tokens, 2 neighbours of 128 a chunk of 64,
32,000 tokens. RETRO-pytorch drops its `heads` argument; its two stacks are built anew here with
the heads of the size. `pip install torch retro-pytorch` into an environment of its own is the
peer.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
from typing import Any

from contenders import PEER_MODEL, ask, parsed, ratio, start

N, M, K, VOCABULARY = 512, 64, 2, 32_000


@dataclasses.dataclass(frozen=True)
class Size:
  """Attributes: as in RetroConfig; `batch` in sequences."""
  d_model: int
  num_layers: int
  num_heads: int
  cca_layers: tuple[int, ...]
  encoder_layers: int
  encoder_d_model: int
  batch: int


SIZES = {'small': Size(256, 6, 4, (3, 6), 2, 256, 8),
         'med': Size(896, 12, 16, (6, 9, 12), 2, 896, 2)}

PEER = PEER_MODEL + """
size, (n, m, k, vocabulary), threads, retrieval = json.loads(sys.argv[1])
torch.set_num_threads(threads)
torch.manual_seed(0)
model = peer_model(size, m, vocabulary, n)
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
b = size['batch']
sequence = torch.randint(1, vocabulary, (b, n + 1))
retrieved = torch.randint(1, vocabulary, (b, n // m, k, 2 * m))
def step():
  if retrieval:
    loss = model(sequence, retrieved, return_loss=True)
  else:
    logits = model(sequence[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), sequence[:, 1:])
  loss.backward()
  optimizer.step()
  optimizer.zero_grad(set_to_none=True)
  return float(loss)
"""

OURS = """
import json, sys, time
import jax, numpy as np
from retro_jax.data import batches
from retro_jax.models.config import RetroConfig
from retro_jax.training import optimizer, partitioning, state, step as step_lib
size, (n, m, k, vocabulary), threads, retrieval, changes = json.loads(sys.argv[1])
b = size.pop('batch')
# As gin/machines/cpu.gin.
size |= {'loss_block': 512, 'scan_layers': False}
microbatch_tokens = 512
config = RetroConfig(vocab_size=vocabulary, head_dim=64, encoder_heads=size['num_heads'],
                     chunk_length=m, num_neighbors=k, **(size | changes))
config = config if retrieval else config.baseline()
mesh = partitioning.make_mesh(partitioning.MeshConfig())
settings = optimizer.OptimizerConfig(warmup_steps=1, peak_learning_rate=1e-4)
rule = optimizer.make_optimizer(settings, 1000)
abstract = state.abstract_state(config, rule, partitioning.ShardingRules(), mesh)
current = state.init_state(config, rule, 0, abstract)
run = step_lib.make_train_step(
    config, rule, optimizer.schedule(settings, 1000), mesh, abstract,
    microbatches=batches.microbatches(mesh, b, n, microbatch_tokens))
rng = np.random.default_rng(0)
tokens = rng.integers(1, vocabulary, (b, n + 1)).astype(np.int32)
found = rng.integers(1, vocabulary, (b, n // m, k, 2 * m)).astype(np.int32)
batch = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:],
         'loss_weights': np.ones((b, n), np.float32), 'documents': np.zeros((b, n // m), np.int32),
         'text_bytes': np.full((b, n // m), 4 * m, np.int32), 'neighbor_tokens': found,
         'neighbor_mask': found != 0}
batch = {name: batch[name] for name in step_lib.batch_inputs(config)}
def step():
  global current
  current, metrics = run(current, batch)
  return float(metrics['loss'])
"""

LOOP = """
for line in sys.stdin:
  step()  # not counted: during a pause the machine takes free memory back
  begin = time.process_time()
  for _ in range(int(line)):
    loss = step()
  print(json.dumps([time.process_time() - begin, loss]), flush=True)
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('size', choices=SIZES)
  parser.add_argument('--peer_python', default='', help="interpreter with the peer; '' for none")
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=1, help='of each contender in a round')
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--change', action='append', default=[], metavar='FIELD=VALUE',
                      help='of RetroConfig, for our contenders')
  parser.add_argument('--variant', action='append', default=[], metavar='FIELD=VALUE',
                      help='one more contender: our RETRO with this change')
  parser.add_argument('--only', nargs='+', default=[], metavar='NAME',
                      help='of these contenders: at MED all of them at once fill 20 GB, and steps '
                           'of those that hand memory back and ask for it again get slow')
  parser.add_argument('--output', default='', help='JSON file for the numbers')
  arguments = parser.parse_args()
  size = SIZES[arguments.size]
  changes = parsed(arguments.change)
  ours = lambda retrieval, changes: functools.partial(
      contender, sys.executable, OURS, size, arguments.threads, retrieval, changes)
  known = {'RETRO': ours(True, changes), 'baseline': ours(False, changes)}
  for variant in arguments.variant:
    known[f'RETRO, {variant}'] = ours(True, changes | parsed([variant]))
  if arguments.peer_python:
    for name, retrieval in (('peer RETRO', True), ('peer baseline', False)):
      known[name] = functools.partial(
          contender, arguments.peer_python, PEER, size, arguments.threads, retrieval)
  if unknown := set(arguments.only) - set(known):
    parser.error(f'no contender {sorted(unknown)[0]!r}, only {", ".join(known)}')
  contenders = {name: begin() for name, begin in known.items() if name in (arguments.only or known)}
  seconds = measure(contenders, arguments.rounds, arguments.steps)
  result = summary(arguments.size, size, seconds, arguments.steps, changes)
  print(json.dumps(result, indent=2))
  if arguments.output:
    from retro_jax import storage
    storage.write_json(arguments.output, result)


def contender(python: str, code: str, size: Size, threads: int, retrieval: bool,
              changes: dict[str, Any] | None = None) -> subprocess.Popen:
  """A process that takes steps whenever it is asked."""
  given = [dataclasses.asdict(size), (N, M, K, VOCABULARY), threads, retrieval]
  given += [] if changes is None else [changes]
  return start(python, code + LOOP, given, threads,
               '--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT')


def measure(contenders: dict[str, subprocess.Popen], rounds: int, steps: int
            ) -> dict[str, list[float]]:
  """CPU seconds of `steps` steps, a list over the rounds, after one step to warm up."""

  def take(name: str, count: int) -> float:
    return ask(name, contenders[name], count)[0]

  for name in contenders:
    take(name, 1)
  seconds: dict[str, list[float]] = {name: [] for name in contenders}
  for number in range(rounds):
    for name in contenders:
      seconds[name].append(take(name, steps))
    print(f'round {number + 1}: ' + ', '.join(
        f'{name} {values[-1]:.2f} CPU s' for name, values in seconds.items()), flush=True)
  for process in contenders.values():
    process.stdin.close()
    process.wait()
  return seconds


def summary(name: str, size: Size, seconds: dict[str, list[float]], steps: int,
            changes: dict[str, Any]) -> dict[str, Any]:
  """Speeds, ratios by round (medians), and the ratio of FLOPs beside that of time."""
  from retro_jax.models import flops
  from retro_jax.models.config import RetroConfig
  fields = {k: v for k, v in dataclasses.asdict(size).items() if k != 'batch'}
  config = RetroConfig(vocab_size=VOCABULARY, head_dim=64, encoder_heads=size.num_heads,
                       chunk_length=M, num_neighbors=K, **(fields | changes))
  count = lambda c: flops.forward_flops(c, size.batch, N, as_computed=True).total
  result = {
      'size': name, 'changes': changes,
      'tokens_per_cpu_second': {who: size.batch * N * steps / statistics.median(values)
                                for who, values in seconds.items()},
      'cpu_seconds': seconds,
      'FLOPs of RETRO over baseline': count(config) / count(config.baseline())}
  pairs = {'time of RETRO over baseline': ('RETRO', 'baseline'),
           'speed over the peer, baseline': ('peer baseline', 'baseline'),
           'time of peer RETRO over its baseline': ('peer RETRO', 'peer baseline')}
  for who in seconds:
    if who.startswith('RETRO'):
      pairs[f'speed over the peer, {who}'] = 'peer RETRO', who
  return result | {what: ratio(seconds[a], seconds[b]) for what, (a, b) in pairs.items()
                   if a in seconds and b in seconds}


if __name__ == '__main__':
  main()
