"""Measures of texts against slow ones, and on texts made for them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.generation import faithfulness
from retro_jax.generation.written import ChunkRecord, Generation, Neighbor


def neighbor(tokens, text='', continuation='', length=4) -> Neighbor:
  return Neighbor(7, 'doc', 'A title', 0.5, text, continuation, tuple(tokens), length)


def generation(chunks, written: int, text='', prompt='') -> Generation:
  """Args: `chunks`, pairs (tokens, neighbours); `written`, how many of the last tokens are."""
  records = tuple(ChunkRecord(tuple(tokens), '', tuple(found)) for tokens, found in chunks)
  every = [t for record in records for t in record.tokens]
  return Generation(prompt, text, tuple(every[len(every) - written:]), False, records)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=12), st.lists(st.integers(1, 3), max_size=12),
       st.integers(1, 4))
def test_common_runs_are_those_of_a_slow_search(ours, theirs, shortest):
  in_ours, in_theirs, longest = np.zeros(len(ours), bool), np.zeros(len(theirs), bool), 0
  for i in range(len(ours)):
    for j in range(len(theirs)):
      for n in range(1, min(len(ours) - i, len(theirs) - j) + 1):
        if ours[i:i + n] == theirs[j:j + n]:
          longest = max(longest, n)
          if n >= shortest:
            in_ours[i:i + n] = in_theirs[j:j + n] = True
  found = faithfulness.common_runs(ours, theirs, shortest)
  np.testing.assert_array_equal(found[0], in_ours)
  np.testing.assert_array_equal(found[1], in_theirs)
  assert found[2] == longest


def test_repetition_is_the_share_of_four_grams_seen_before():
  assert faithfulness.repetition([1, 2, 3]) == 0
  assert faithfulness.repetition([1, 2, 3, 4, 5, 6]) == 0
  assert faithfulness.repetition([1] * 8) == 4 / 5
  assert faithfulness.repetition([1, 2, 3, 4, 9, 1, 2, 3, 4]) == 1 / 6


def test_only_text_written_after_a_neighbor_came_is_copied_from_it():
  # Two prompt tokens, six written; the neighbour was asked for by the first chunk.
  source = neighbor([3, 4, 21, 22, 23, 24, 5, 6])
  made = generation([([1, 2, 3, 4], [source]), ([21, 22, 23, 9], [])], written=6)
  measures = faithfulness.measure(made)
  # 3 and 4 stand in it, and the run with them would be longer, but they were written before.
  assert measures.longest_copied == 3 and measures.copied == 3 / 6 and measures.tokens == 6
  # Without retrieval, the same text has the same in common with what would have been read.
  off = generation([([1, 2, 3, 4], []), ([21, 22, 23, 9], [])], written=6)
  assert faithfulness.measure(off).longest_copied == 0
  assert faithfulness.measure(off, against=made) == measures
  first, second = faithfulness.passages(made)
  assert first.read == () and first.prompt == 2 and second.prompt == 0
  assert second.copied.tolist() == [True, True, True, False]
  assert second.read[0].copied.tolist() == [False, False, True, True, True] + [False] * 3
  assert second.read[0].longest == 3


def test_names_and_numbers_rest_on_prompt_and_neighbors():
  source = neighbor([1], text='the sculptor Anna Maria', continuation='born in 1984, say')
  made = generation([([1, 2], [source]), ([3, 4], [])], written=2, prompt='About Beavers',
                    text='The work of Anna, from 1984 or 1985, shows Beavers. Some')
  measures = faithfulness.measure(made)
  assert measures.names == 4  # Anna, 1984, 1985, Beavers
  assert measures.grounded == 3 / 4
  assert faithfulness.measure(generation([([1], [])], 1, text='no such thing')).grounded == 1
