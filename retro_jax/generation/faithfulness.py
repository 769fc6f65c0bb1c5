"""How a text was written, in numbers: what it repeats, what it copies, what its facts rest on.

Nothing here knows a model: a `Generation` says what was written and which neighbours were read
at each place. Shown by views.py, compared between retrieval on and off by
tools/measure_generation.py.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from retro_jax.generation.written import Generation, Neighbor

# Tokens whose repetition counts (Welleck et al. 2020 count repeated 4-grams, too).
REPETITION_TOKENS = 4
# Shorter runs of tokens in common with a neighbour are chance.
SHORTEST_RUN = 3
# Names and numbers: what can be wrong about a fact. The first word of a sentence is
# capitalised anyway, so a name needs a word or a comma before it.
_NAME = re.compile(r'(?<=[\w,;:] )[A-Z][\w-]+|\d[\d.,]*\d|\d')


@dataclasses.dataclass(frozen=True)
class Measures:
  """Numbers of one continuation.

  Attributes:
    tokens: written.
    repetition: share of its 4-grams of tokens that it had written before, 0 to 1.
    copied: share of its tokens in runs of 3 or more in common with a neighbour that was read
      while they were written.
    longest_copied: the longest run in common with a neighbour, among tokens written since that
      was read.
    names: names and numbers that it holds, each once.
    grounded: share of those that stand in the prompt or in a neighbour read before the end; 1
      where there are none. A check of words, not of what is said with them.
  """
  tokens: int
  repetition: float
  copied: float
  longest_copied: int
  names: int
  grounded: float


@dataclasses.dataclass(frozen=True)
class ReadNeighbor:
  """A neighbour beside the chunk that read it.

  Attributes:
    neighbor: that was read.
    copied: bool, which of its tokens lie in a run in common with that chunk.
    longest: the longest such run.
  """
  neighbor: Neighbor
  copied: np.ndarray
  longest: int


@dataclasses.dataclass(frozen=True)
class Passage:
  """A chunk with what it read.

  Attributes:
    tokens: of the chunk.
    prompt: how many of them belong to [bos] and prompt.
    copied: bool, which lie in a run in common with a neighbour.
    read: the neighbours, nearest first.
  """
  tokens: tuple[int, ...]
  prompt: int
  copied: np.ndarray
  read: tuple[ReadNeighbor, ...]


def passages(generation: Generation) -> list[Passage]:
  """The chunks of a generation, each beside the neighbours of the one before it."""
  left = sum(len(chunk.tokens) for chunk in generation.chunks) - len(generation.tokens)
  result, neighbors = [], ()
  for chunk in generation.chunks:
    copied, read = np.zeros(len(chunk.tokens), bool), []
    for neighbor in neighbors:
      ours, theirs, longest = common_runs(chunk.tokens, neighbor.tokens)
      copied |= ours
      read.append(ReadNeighbor(neighbor, theirs, longest))
    prompt = min(left, len(chunk.tokens))
    left -= prompt
    result.append(Passage(chunk.tokens, prompt, copied, tuple(read)))
    neighbors = chunk.neighbors
  return result


def measure(generation: Generation, against: Generation | None = None) -> Measures:
  """The numbers of one generation.

  Args:
    generation: what was written.
    against: take the neighbours of this one, as if they had been read: what a text without
      retrieval has in common with neighbours by chance.
  """
  source = against or generation
  tokens = np.array(generation.tokens, np.int64)
  start = sum(len(chunk.tokens) for chunk in generation.chunks) - len(tokens)
  copied, longest, end = np.zeros(len(tokens), bool), 0, 0
  texts = [generation.prompt]
  for place, chunk in enumerate(source.chunks):
    end += len(chunk.tokens)
    following = source.chunks[place + 1:place + 2]
    last = end + len(following[0].tokens) if following else end
    since, until = max(end - start, 0), max(last - start, 0)
    for neighbor in chunk.neighbors:
      texts += [neighbor.text, neighbor.continuation]
      copied[since:until] |= common_runs(tokens[since:until], neighbor.tokens)[0]
      longest = max(longest, common_runs(tokens[since:], neighbor.tokens)[2])
  names = set(_NAME.findall(generation.text))
  known = set(re.findall(r'[\w-]+|\d[\d.,]*\d', ' '.join(texts)))
  return Measures(
      len(tokens), repetition(generation.tokens), float(copied.mean()) if len(tokens) else 0.0,
      longest, len(names), len(names & known) / len(names) if names else 1.0)


def repetition(tokens: Sequence[int], n: int = REPETITION_TOKENS) -> float:
  """Share of the n-grams of `tokens` that stood there before; 0 where there are none."""
  grams = [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]
  return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def common_runs(ours: Sequence[int], theirs: Sequence[int], shortest: int = SHORTEST_RUN
                ) -> tuple[np.ndarray, np.ndarray, int]:
  """Tokens in runs that two sequences have in common.

  Args:
    ours, theirs: token ids.
    shortest: shorter runs do not count.

  Returns:
    bool [ours] and bool [theirs], what lies in a run; and the longest run, however short.
  """
  ours, theirs = np.asarray(ours, np.int64), np.asarray(theirs, np.int64)
  in_ours, in_theirs, longest = np.zeros(len(ours), bool), np.zeros(len(theirs), bool), 0
  run = np.zeros(len(theirs) + 1, np.int64)  # length of the run that ends at each token of theirs
  for i, token in enumerate(ours):
    run[1:] = np.where(theirs == token, run[:-1] + 1, 0)
    here = int(run.max())
    longest = max(longest, here)
    if here >= shortest:
      in_ours[i - here + 1:i + 1] = True
      for end in np.flatnonzero(run >= shortest):
        in_theirs[end - run[end]:end] = True
  return in_ours, in_theirs, longest
