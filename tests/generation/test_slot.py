"""What a slot reads and asks for, without a model: any prompt, window and setting."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.data.vocabulary import PAD_ID
from retro_jax.generation.requests import Finished, Request, Stream
from retro_jax.generation.slot import Slot
from tests import worlds

M = 8
VOCABULARY = worlds.vocabulary()
TEXT = worlds.text(np.random.default_rng(2), 60)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 90), st.integers(1, 4), st.integers(1, 4), st.integers(0, M), st.booleans())
def test_every_token_is_read_in_order_with_the_neighbors_it_asks_for(
    characters, chunks, dropped, step, left_pad):
  window, dropped = chunks * M, min(dropped, chunks)
  stream = Stream(Request(TEXT[:characters], 30, retrieval_step=step, left_pad=left_pad))
  slot = Slot(0, stream, M, window, VOCABULARY, True)
  prompt_end, padding = slot.end, slot.start
  assert padding == (-(slot.end - slot.start) % M if left_pad else 0)
  # As the window is left by what was written, more than the chunks dropped at once never goes.
  for written in range(30):
    slot.make_room(dropped)
    assert slot.base % M == 0 and 0 < slot.end - slot.base <= window
    if slot.base:
      assert slot.end - slot.base > window - M * dropped - 1 or slot.end - slot.base == window
    while not slot.read_all:
      part, first = slot.next_part(), slot.base + slot.place
      assert 1 <= part.count <= M and slot.place + part.count <= window
      end = first + part.count
      for wanted in slot.asking():
        query = slot.query(wanted)
        everything = [PAD_ID] * padding + slot.tokens
        assert query == ([PAD_ID] * M + everything[:wanted])[-M:]
        slot.retrieved[wanted], slot.described[wanted] = None, ()
      between = step > 0 and end > prompt_end and end == slot.end and end % M % step == 0
      assert part.completes == (end % M == 0 or between)
      assert not part.completes or end in slot.retrieved
      slot.took(part)
      assert 0 < slot.since and (slot.since == 1) >= part.completes
    slot.append(4 + written)
  slot.finish('length')
  *_, last = stream
  assert isinstance(last, Finished)
  made = last.generation
  assert [t for chunk in made.chunks for t in chunk.tokens] == slot.tokens
  assert made.tokens == tuple(range(4, 34)) and made.text == VOCABULARY.decode(made.tokens)
