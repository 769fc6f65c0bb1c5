"""Table, picture and page: their numbers, what counts as copied, and that text stays text."""

import html.parser
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retro_jax.data import records
from retro_jax.evaluation import report, report_page
from retro_jax.evaluation.report_page import PageChunk, PageNeighbor
from tests import worlds

RESULTS = {
    'bits_per_byte': {'retro_on': 1.9, 'retro_off': 2.0, 'baseline': 2.1, 'retro_random': 2.02,
                      'retro_on_k8': 1.8},
    'bits_per_byte_pretrained': {'retro_off': 1.5, 'retro_on': 1.2, 'retro_random': 1.53},
    'gains': {'over_retro_off': {'gain': 0.05, 'low': 0.041, 'high': 0.062}},
    'rows': [{'setting': 'retro_on', 'bits_per_byte': 1.9, 'low': 1.85, 'high': 1.95},
             {'setting': 'retro_on', 'bits_per_byte': 1.2, 'low': 1.1, 'high': 1.3},
             {'setting': 'baseline', 'bits_per_byte': 2.1}],
}


def metrics(with_retrieval: bool) -> list[dict]:
  rows = []
  for step in range(10, 300, 10):
    rows.append({'step': step, 'loss': 5 * math.exp(-step / 100) + 2, 'tokens': 1000.0})
    if step % 50 == 0:
      rows.append({'step': step, 'valid_off': 2.0} | (
          {'valid_on': 2.0 - step / 1000, 'valid_random': 2.1} if with_retrieval else {}))
  return rows


def test_table_holds_every_number_its_interval_and_the_difference_to_off():
  lines = report.results_table(RESULTS).splitlines()
  find = lambda start, after=0: next(l for l in lines[after:] if l.startswith(start)).split()
  pretrained = lines.index('pretrained:')
  assert find('RETRO[ON]') == 'RETRO[ON] 1.9000 1.8500 to 1.9500 -5.00 %'.split()
  assert find('RETRO[OFF]') == ['RETRO[OFF]', '2.0000']
  assert find('baseline') == 'baseline 2.1000 +5.00 %'.split()
  assert find('RETRO, random') == 'RETRO, random 2.0200 +1.00 %'.split()
  assert find('retro_on_k8') == 'retro_on_k8 1.8000 -10.00 %'.split()
  # The same setting of another model: its own interval and its own OFF.
  assert find('RETRO[ON]', pretrained) == 'RETRO[ON] 1.2000 1.1000 to 1.3000 -20.00 %'.split()
  assert ('RETRO[ON] needs 5.00 % fewer bits than RETRO[OFF] '
          '(95 % interval, paired: 4.10 to 6.20 %)') in lines
  assert pretrained > lines.index(next(l for l in lines if l.startswith('retro_on_k8')))


def test_table_of_nothing_is_a_header():
  assert report.results_table({}).splitlines()[0].startswith('setting')


@pytest.mark.parametrize('runs, results', [
    ({'baseline': metrics(False), 'retro': metrics(True)}, RESULTS),
    ({'retro': metrics(True)}, {}), ({'retro': [{'step': 1, 'loss': 3.0}]}, {}), ({}, RESULTS),
    ({}, {})])
def test_picture_is_a_png_whatever_there_is(tmp_path, runs, results):
  report.loss_picture(tmp_path / 'a' / 'picture.png', runs, results)
  with Image.open(tmp_path / 'a' / 'picture.png') as image:
    assert image.format == 'PNG' and np.asarray(image.convert('L')).std() > 5


def drawn(monkeypatch, tmp_path, runs, results):
  """The axes of the picture, caught as it is saved."""
  from matplotlib.figure import Figure
  caught, save = [], Figure.savefig
  monkeypatch.setattr(
      Figure, 'savefig', lambda self, *a, **k: (caught.append(self), save(self, *a, **k)))
  report.loss_picture(tmp_path / 'p.png', runs, results)
  return caught[0].axes


def test_picture_draws_the_numbers(monkeypatch, tmp_path):
  runs = {'baseline': metrics(False), 'retro': metrics(True)}
  losses, gains, bars = drawn(monkeypatch, tmp_path, runs, RESULTS)
  raw = losses.lines[2]  # baseline raw, baseline smooth, retro raw, retro smooth
  np.testing.assert_allclose(raw.get_xdata(), np.arange(10, 300, 10) * 1000 / 1e6)
  np.testing.assert_allclose(raw.get_ydata(), 5 * np.exp(-np.arange(10, 300, 10) / 100) + 2)
  over_off, over_random = gains.lines[:2]
  on = 2 - np.arange(50, 300, 50) / 1000
  np.testing.assert_allclose(over_off.get_ydata(), 100 * (1 - on / 2))
  np.testing.assert_allclose(over_random.get_ydata(), 100 * (1 - on / 2.1))
  np.testing.assert_allclose(over_off.get_xdata(), np.arange(50, 300, 50) / 1000)
  assert [p.get_width() for p in bars.patches] == [2.1, 2.0, 1.9, 2.02, 1.8, 1.5, 1.2, 1.53]
  assert bars.get_xlim()[0] == 0
  texts = {text.get_text() for text in bars.texts}
  assert {'1.900  (-5.0 %)', '1.200  (-20.0 %)', '2.000', 'pretrained'} <= texts


def test_without_validation_there_is_no_middle_panel(monkeypatch, tmp_path):
  axes = drawn(monkeypatch, tmp_path, {'baseline': metrics(False)}, RESULTS)
  assert [axis.get_title(loc='left') for axis in axes] == ['training loss', 'held-out text']


def test_smoothed_is_calm_and_unbiased():
  assert report.smoothed(np.full(100, 3.0)) == pytest.approx(3)
  values = np.arange(200.0)
  np.testing.assert_allclose(report.smoothed(values)[:-10], values[:-10])
  noise = np.random.default_rng(0).normal(size=1000)
  assert report.smoothed(noise).std() < 0.25


rows = st.lists(st.integers(0, 3), max_size=12)


@settings(max_examples=100)
@given(rows, rows)
def test_copied_marks_exactly_the_common_runs(tokens, source):
  expected = [set(), set()]
  for i in range(len(tokens) - 2):
    for j in range(len(source) - 2):
      if tokens[i:i + 3] == source[j:j + 3] and 0 not in tokens[i:i + 3]:
        expected[0] |= {i, i + 1, i + 2}
        expected[1] |= {j, j + 1, j + 2}
  found = report_page.copied(np.array(tokens, int), np.array(source, int))
  assert [set(np.flatnonzero(f).tolist()) for f in found] == expected


def test_bits_of_a_chunk_are_those_of_its_own_tokens():
  # Target of position p is token p+1: tokens 1-3 and 4-7 of two chunks of 4; the last goes beyond.
  np.testing.assert_array_equal(
      report_page.bits_of_chunks(np.arange(1.0, 9.0), 4), [1 + 2 + 3, 4 + 5 + 6 + 7])


class Reader(html.parser.HTMLParser):
  """Tags in order (must nest), marked texts, all text."""

  def __init__(self, page: str):
    super().__init__()
    self.tags, self.attributes, self.marked, self.text, self._open = [], [], [], '', []
    self.feed(page)
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in ('meta', 'br', '!doctype'):
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    if self._open and self._open[-1] == 'mark':
      self.marked.append(data)
    self.text += data


def chunk(text: str, document: int = 1, neighbors=(), **bits) -> PageChunk:
  return PageChunk(ids(text, 24), document, 'a.py', neighbors, len(text.encode()), **bits)


def ids(text: str, length: int) -> np.ndarray:
  row = worlds.vocabulary().encode(text)
  assert len(row) <= length
  return np.array(row + [0] * (length - len(row)))


def neighbor(n: str, f: str, title: str = 'b.py') -> PageNeighbor:
  return PageNeighbor(np.concatenate([ids(n, 24), ids(f, 24)]), 0.25, title)


def write(tmp_path, sequences, **more) -> tuple[str, Reader]:
  path = tmp_path / 'page.html'
  report_page.neighbors_page(path, sequences, worlds.vocabulary(), **({'database': 'db'} | more))
  page = path.read_text(encoding='utf-8')
  return page, Reader(page)


def test_page_shows_pairs_neighbors_copies_and_bits(tmp_path):
  found = neighbor('class token', 'return self import model chunk')
  page, reader = write(tmp_path, [[
      chunk('def shape', neighbors=[found]),
      chunk('text return self import xyz', bits_off=40.0, bits_on=30.0),
      chunk('other', document=2)]], settings={'neighbours': 2}, results=RESULTS)
  marked = [text for text in reader.marked if 'return' in text]
  assert len(marked) == 2 and all('return self import' in text for text in marked)
  assert 'chunk' not in ''.join(marked)
  assert '▼ -25.0 %: 40 bits OFF, 30 ON' in reader.text and 'distance 0.250' in reader.text
  assert reader.tags.count('article') == 1  # the third chunk begins another document
  for expected in ('db', 'neighbours', '1.8500 to 1.9500', 'pretrained', '-20.00 %',
                   '5.00 % fewer bits'):
    assert expected in reader.text
  assert 'http' not in page.replace('http-equiv', '')


def test_hostile_text_stays_text(tmp_path):
  evil = '<script>alert(1)</script>'
  tokens = np.array(worlds.vocabulary().encode(evil + '"\'&</div></details>\0'))
  found = PageNeighbor(np.concatenate([tokens, tokens]), 0.0, evil)
  hostile = PageChunk(tokens, 1, f'"><img src=x onerror=alert(1)>{evil}', [found], 9)
  page, reader = write(tmp_path, [[hostile, hostile]], database=evil, title=evil,
                       settings={evil: evil}, results={'bits_per_byte': {evil: 1.0}})
  assert not {'script', 'img', 'iframe', 'link', 'a'} & set(reader.tags)
  assert not [name for name, _ in reader.attributes if name.startswith('on')]
  assert page.count('&lt;script&gt;') >= 8 and '\0' not in page and '␀' in page
  assert "default-src 'none'" in page


def test_page_of_a_stored_sequence(tmp_path):
  database, examples = worlds.examples(tmp_path, worlds.documents(3, 9))
  row = {name: values[0] for name, values in examples.read([0]).items()}
  chunks = report_page.page_chunks(row, database, database, 2, np.arange(4.0), np.arange(4.0))
  assert [c.tokens.tolist() for c in chunks] == database.tokens(row['chunk_ids']).tolist()
  for u, made in enumerate(chunks):
    assert made.text_bytes == database.text_bytes(row['chunk_ids'][u]) and made.bits_on == u
    assert made.title == database.document_info(int(row['documents'][u]))['title']
    assert len(made.neighbors) == 2
    for place, found in enumerate(made.neighbors):
      expected, _ = database.with_continuation(row['neighbor_ids'][u, place])
      assert found.tokens.tolist() == expected.tolist()
      assert found.title == database.document_info(
          int(database.document(row['neighbor_ids'][u, place])))['title']
  write(tmp_path, [chunks])


def test_padding_and_missing_neighbors_are_left_out(tmp_path):
  database, _ = worlds.examples(tmp_path, worlds.documents(3, 9))
  shape = records.ExampleShape(32, 8, 3, '<u2')
  row = {'tokens': np.zeros(32, int), 'chunk_ids': np.array([0, 1, -1, -1]),
         'documents': np.array([0, 0, -1, -1]), 'text_bytes': np.zeros(4, int),
         'neighbor_ids': np.full((4, 3), -1), 'neighbor_distances': np.full((4, 3), np.inf),
         'neighbor_tokens': np.zeros((4, 3, shape.retrieved_length), int)}
  chunks = report_page.page_chunks(row, database, database, 3)
  assert len(chunks) == 2 and not chunks[0].neighbors
  _, reader = write(tmp_path, [chunks])
  assert 'No neighbour was allowed' in reader.text
