"""Which part of the model, and which pass over it, an op belongs to.

JAX writes the pass into an op's name (jvp, transpose, rematted_computation); the part is told
by the Python functions on its stack, or by a `jax.named_scope` that is called like the part.
The two tables below are all that knows names of this code base.
"""

import collections
import re
from collections.abc import Iterable

from retro_jax.topology.program import Computation, Op, Program

PASSES = ('forward', 'backward', 'recompute', 'update', 'unknown')
# Looked up in this order: the encoder has attention and feed-forward layers of its own.
_PARTS = (
    ('encoder', re.compile(r'NeighborEncoder|EncoderLayer|\bencoder\b')),
    ('cca', re.compile(r'ChunkedCrossAttention|\bcca\b')),
    ('attention', re.compile(r'SelfAttention|\battention\b|splash_m|flash_relative')),
    ('ffw', re.compile(r'FeedForward|\b(ffw|feed_forward)\b')),
    ('embedding', re.compile(r'Embedding\.__call__')),
    # Told by its innermost functions: 'mean_loss' is on the stack of the whole model.
    ('loss', re.compile(r'Embedding\.read|softmax_cross_entropy|(?<!\w)_losses|\bone_block\b'
                        r'|\bloss\b')),
    ('optimizer', re.compile(
        r'scale_by|clip_by|tree_norm|global_norm|chain\.|update_fn|apply_updates|\boptimizer\b')),
)
PARTS = tuple(name for name, _ in _PARTS) + ('other',)
_NO_PART = 'other'
_STEPS_TO_READERS = 6


class Sources:
  """Pass and part of the ops of one program."""

  def __init__(self, program: Program):
    self._program = program

  def of(self, computation: Computation, op: Op) -> tuple[str, str]:
    """(one of `PASSES`, one of `PARTS`).

    What has no name belongs where most of the named ops inside it do; what has none inside
    either, a copy for instance, to the first who reads it.
    """
    votes: collections.Counter[tuple[str, str]] = collections.Counter()
    reached = [op]
    for _ in range(_STEPS_TO_READERS):
      for each in reached:
        self._vote((each,), votes)
      if votes:
        return votes.most_common(1)[0][0]
      reached = [user for each in reached for user, _ in computation.users.get(each.name, [])]
    return 'unknown', _NO_PART

  def _vote(self, ops: Iterable[Op], votes: collections.Counter) -> None:
    for op in ops:
      if op.op_name:
        votes[self._by_name(op)] += 1
      else:
        for body in self._program.called(op):
          self._vote(body.ops, votes)

  def _by_name(self, op: Op) -> tuple[str, str]:
    functions = ' '.join(self._program.functions(op))
    part = next((name for name, pattern in _PARTS
                 if pattern.search(functions) or pattern.search(op.op_name)), _NO_PART)
    name = op.op_name
    if 'rematted_computation' in name:
      return 'recompute', part
    if 'transpose(' in name:
      return 'backward', part
    if 'jvp(' in name:
      return 'forward', part
    # What is not differentiated is the update, or masks and positions of the model.
    return ('update', 'optimizer') if part in (_NO_PART, 'optimizer') else ('forward', part)
