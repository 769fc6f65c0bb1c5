"""What benchmarks with a peer share: processes that measure when asked, and RETRO-pytorch's model.

A contender is a script that ends in a loop over the lines of its stdin: a question in JSON comes
in, an answer in JSON goes out.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# For a script of the peer: `peer_model` with fields of RetroConfig in `size`. RETRO-pytorch drops
# its `heads` argument, so its two stacks are built anew with the heads of the size.
PEER_MODEL = """
import json, sys, time
import torch
from retro_pytorch.retro_pytorch import RETRO, Encoder, Decoder
def peer_model(size, m, vocabulary, longest):
  model = RETRO(num_tokens=vocabulary, max_seq_len=longest, enc_dim=size['encoder_d_model'],
                enc_depth=size['encoder_layers'], dec_depth=size['num_layers'],
                dec_cross_attn_layers=tuple(size['cca_layers']), heads=size['num_heads'],
                dec_dim=size['d_model'], dim_head=64, chunk_size=m)
  model.encoder = Encoder(dim=size['encoder_d_model'], context_dim=size['d_model'], dim_head=64,
                          heads=size['num_heads'], depth=size['encoder_layers'],
                          output_dim=size['d_model'])
  model.decoder = Decoder(dim=size['d_model'], depth=size['num_layers'], dim_head=64,
                          heads=size['num_heads'], cross_attn_layers=tuple(size['cca_layers']),
                          chunk_size=m)
  return model
"""


def start(python: str, code: str, given: Sequence[Any], threads: int, xla_flags: str | None = None
          ) -> subprocess.Popen:
  """A contender on CPUs whose waiting threads sleep.

  Args:
    python: interpreter.
    code: of the script.
    given: its argument, as JSON.
    threads: of its matrix products; it gets as many of this process's CPUs, from which XLA
      takes its number of threads.
    xla_flags: for XLA; None leaves those of this process.
  """
  environment = {**os.environ, 'OMP_WAIT_POLICY': 'passive', 'OMP_NUM_THREADS': str(threads),
                 'JAX_PLATFORMS': 'cpu'}
  if xla_flags is not None:
    environment['XLA_FLAGS'] = xla_flags
  cpus = sorted(os.sched_getaffinity(0))[:threads]
  return subprocess.Popen([python, '-c', code, json.dumps(given)], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
                          preexec_fn=lambda: os.sched_setaffinity(0, cpus))


def ask(name: str, process: subprocess.Popen, question: Any) -> Any:
  """The answer of a contender, which is `name` to a person."""
  process.stdin.write(json.dumps(question) + '\n')
  process.stdin.flush()
  answer = process.stdout.readline()
  if not answer:
    sys.exit(f'{name} ended; see above')
  return json.loads(answer)


def ratio(these: Sequence[float], those: Sequence[float]) -> float:
  """Of two contenders that took turns: the median of the rounds' ratios."""
  return statistics.median(a / b for a, b in zip(these, those))


def parsed(changes: Sequence[str]) -> dict[str, Any]:
  """FIELD=VALUE by field, whole numbers as such."""
  pairs = (change.split('=', 1) for change in changes)
  return {name: int(value) if value.isdigit() else value for name, value in pairs}
