"""Generations in a terminal, as a page and as JSON; texts of strangers do nothing in any."""

import json

import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.generation import views
from retro_jax.generation.written import ChunkRecord, Generation, Neighbor
from tests import worlds

VOCABULARY = worlds.vocabulary()
EVIL = '<script>alert(1)</script>\x1b[2J\u202e'


def make(text=' retro model layer', title='Title', reason='length') -> Generation:
  prompt = VOCABULARY.encode('def return ' + EVIL)
  written = VOCABULARY.encode(text)
  first = VOCABULARY.encode('token chunk ' + EVIL)
  tokens = first + VOCABULARY.encode(' retro model layer')
  neighbor = Neighbor(3, 'doc-1' + EVIL, title + EVIL, 0.25, VOCABULARY.decode(first),
                      ' retro model layer', tuple(tokens), len(first))
  return Generation(
      VOCABULARY.decode(prompt), text, tuple(written), False,
      (ChunkRecord(tuple([1] + prompt), VOCABULARY.decode(prompt), (neighbor,)),
       ChunkRecord(tuple(written), text, ())), reason)


def harmless(shown: str) -> bool:
  plain = shown.replace('\x1b[30;43m', '').replace('\x1b[0m', '')
  return '\x1b' not in plain and '\u202e' not in plain


def test_a_terminal_shows_what_was_written_read_and_copied():
  shown = views.terminal(make(), VOCABULARY, color=False)
  count = len(VOCABULARY.encode(' retro model layer'))
  assert harmless(shown) and '\x1b' not in shown
  assert f'continuation ({count} tokens, cut off)\n   retro model layer' in shown
  assert 'found, and chunk 2 read:' in shown and f'{count} tokens in a row copied' in shown
  assert f'100 % of tokens copied from neighbours, at most {count} in a row' in shown
  colored = views.terminal(make(), VOCABULARY, color=True)
  assert harmless(colored) and '\x1b[30;43m retro model layer\x1b[0m' in colored
  assert 'a stop string' in views.terminal(make(reason='stop'), VOCABULARY, color=True)


def test_colored_text_ends_before_the_stop_string():
  whole = make()
  cut = Generation(whole.prompt, whole.text[:6], whole.tokens, False, whole.chunks, 'stop')
  assert ' retro\x1b[0m' in views.terminal(cut, VOCABULARY, color=True).split('neighbours')[0]


def test_a_page_escapes_every_text(tmp_path):
  views.write(str(tmp_path / 'made.html'), make(), VOCABULARY)
  page = (tmp_path / 'made.html').read_text()
  assert '<script>' not in page and harmless(page)
  assert '&lt;script&gt;' in page
  assert '<mark class="next"> retro model layer</mark>' in page
  assert 'class="prompt"' in page and 'It read no neighbours' in page


def test_json_holds_everything(tmp_path):
  views.write(str(tmp_path / 'made.json'), make(), VOCABULARY)
  facts = json.loads((tmp_path / 'made.json').read_text())
  neighbor = facts['chunks'][0]['neighbors'][0]
  assert facts['text'] == ' retro model layer' and facts['reason'] == 'length'
  assert neighbor['document_id'] == 'doc-1' + EVIL and neighbor['distance'] == 0.25
  assert neighbor['longest_copied'] == len(facts['tokens']) == facts['measures']['longest_copied']
  assert np.isclose(facts['measures']['copied'], 1)


def test_other_files_are_refused(tmp_path):
  views.write(str(tmp_path / 'made.txt'), make(), VOCABULARY)
  assert 'continuation' in (tmp_path / 'made.txt').read_text()
  with pytest.raises(UserError, match='endings'):
    views.write(str(tmp_path / 'made.pdf'), make(), VOCABULARY)
