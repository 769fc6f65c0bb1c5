"""The inspector: which chunks, what is said of them, and that no text acts where it is shown."""

import html.parser
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.errors import UserError
from retro_jax.evaluation import html_page, inspection, inspection_views, visible
from retro_jax.evaluation.chunk_samples import Chunks, StoredChunks
from retro_jax.evaluation.inspection import Selection
from retro_jax.generation.live_retrieval import LiveRetriever
from retro_jax.retrieval import database_edit
from retro_jax.retrieval.sharded_index import Index
from tests import worlds
from tests.evaluation import browser, hostile
from tools import inspect_neighbors


@pytest.fixture(scope='module', name='world')
def _world(tmp_path_factory):
  folder = tmp_path_factory.mktemp('inspection')
  worlds.examples(folder, worlds.documents(3, 14))
  return folder, StoredChunks(folder / 'examples')


@pytest.fixture(scope='module', name='attacked')
def _attacked(tmp_path_factory):
  return hostile.stored(tmp_path_factory.mktemp('hostile'))


def all_places(stored: StoredChunks) -> np.ndarray:
  return np.arange(stored.num_places)


# Reading chunks.


def test_chunks_are_those_of_the_stores(world):
  _, stored = world
  chunks = stored.read(all_places(stored))
  db = stored.database
  assert chunks.ids.tolist() == list(range(db.num_chunks))  # padding is left out
  np.testing.assert_array_equal(chunks.tokens, db.tokens(chunks.ids))
  np.testing.assert_array_equal(chunks.documents, db.document(chunks.ids))
  np.testing.assert_array_equal(chunks.following, db.with_continuation(chunks.ids)[0][:, 8:])
  np.testing.assert_array_equal(
      chunks.neighbor_tokens, db.with_continuation(chunks.neighbor_ids)[0])


@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_places_come_back_in_the_order_asked_for(world, seed):
  _, stored = world
  chunks = stored.read(all_places(stored))
  order = np.random.default_rng(seed).permutation(len(chunks))[:12]
  again = stored.read(chunks.places[order])
  for name in ('places', 'ids', 'tokens', 'following', 'neighbor_ids', 'distances'):
    np.testing.assert_array_equal(getattr(again, name), getattr(chunks, name)[order])
  np.testing.assert_array_equal(stored.places_of_chunks(again.ids), again.places)


def test_blocks_hold_few_examples_and_together_everything(world, monkeypatch):
  _, stored = world
  monkeypatch.setattr('retro_jax.evaluation.chunk_samples._EXAMPLES_AT_ONCE', 2)
  blocks = list(stored.blocks(all_places(stored)))
  assert max(len(np.unique(b.places // stored.chunks_per_example)) for b in blocks) == 2
  assert np.concatenate([b.ids for b in blocks]).tolist() == list(
      range(stored.database.num_chunks))
  assert len(stored.read(np.zeros(0, int))) == 0


def test_sample_is_of_its_size_and_different_for_each_seed(world):
  _, stored = world
  first, second = stored.sample(10, 0), stored.sample(10, 1)
  assert len(set(first.tolist())) == 10 and first.tolist() != second.tolist()
  assert first.tolist() == sorted(stored.sample(10, 0).tolist())
  assert len(stored.sample(10**6, 0)) == stored.num_places


def test_another_store_is_refused(world, tmp_path):
  folder, _ = world
  other = worlds.store(tmp_path / 'db', worlds.documents(4, 5))
  with pytest.raises(UserError, match='is not what .* was made from'):
    StoredChunks(folder / 'examples', database=str(other.folder))


def test_removed_documents_make_the_examples_stale(tmp_path):
  worlds.examples(tmp_path, worlds.documents(3, 8))
  database_edit.remove_documents(tmp_path / 'db', ['doc-2'])
  with pytest.raises(UserError, match='retrieve the neighbours again'):
    StoredChunks(tmp_path / 'examples')


# Choosing.


def slow_overlap(chunks: Chunks, row: int, k: int) -> int:
  best = 0
  ours = chunks.following[row].tolist()
  for neighbor in chunks.neighbor_tokens[row, :k].tolist():
    for i in range(len(ours)):
      for j in range(i + 1, len(ours) + 1):
        run = ours[i:j]
        if 0 not in run and any(neighbor[s:s + j - i] == run for s in range(len(neighbor))):
          best = max(best, j - i)
  return best


def test_most_and_least_overlapping_are(world):
  _, stored = world
  chunks = stored.read(all_places(stored))
  overlap = {int(chunks.places[row]): slow_overlap(chunks, row, 2) for row in range(len(chunks))
             if chunks.following[row, 0]}
  for name, sign in (('most', -1), ('least', 1)):
    found = inspection.choose(stored, Selection(choose=name, count=7), 2).tolist()
    assert found == sorted(overlap, key=lambda place, s=sign: (s * overlap[place], place))[:7]


def test_chunks_by_number_by_document_and_at_random(world):
  _, stored = world
  l, db = stored.chunks_per_example, stored.queries
  assert inspection.choose(stored, Selection(chunks=((2, 1), (0, 0))), 2).tolist() == [2 * l + 1, 0]
  document = db.ordinal_of('doc-5')
  found = stored.read(inspection.choose(stored, Selection(document='doc-5', count=2), 2))
  assert found.ids.tolist() == list(range(*db.document_starts[document:document + 2]))[:2]
  chosen = inspection.choose(stored, Selection(count=6, seed=4), 2)
  assert len(stored.read(chosen)) == 6
  assert chosen.tolist() == inspection.choose(stored, Selection(count=6, seed=4), 2).tolist()
  assert chosen.tolist() != inspection.choose(stored, Selection(count=6, seed=5), 2).tolist()


@pytest.mark.parametrize('selection, words', [
    (dict(chunks=((10**6, 0),)), r'no chunk \(1000000, 0\)'),
    (dict(chunks=((0, 4),)), 'chunks 0 to 3'),
    (dict(chunks=(3,)), 'expected pairs'), (dict(document='nobody'), "no document 'nobody'"),
    (dict(choose='mots'), "did you mean 'most'"), (dict(count=0), 'count is 0')])
def test_what_is_not_there_is_said(world, selection, words):
  _, stored = world
  with pytest.raises(UserError, match=words):
    inspection.choose(stored, Selection(**selection), 2)


# What is said of a chunk.


def inspected(tokens, following, n, f, title='A', other_id=1):
  """One chunk with one neighbour, against a store that only knows documents."""
  class Store:
    """Answers as a store would about one document."""

    def document(self, chunk):
      return chunk // 4

    def document_info(self, ordinal):
      return {'id': f'd{ordinal}', 'title': ['A', 'b'][ordinal], 'first_chunk': 4 * ordinal,
              'num_chunks': 4}

  row = lambda values: np.array([values], np.int32)
  chunks = Chunks(row(0)[0], row(0)[0], row(0)[0], row(tokens), row(following),
                  np.array([[other_id, -1]]), np.array([[0.5, np.inf]], np.float32),
                  np.array([[n + f, [0] * len(n + f)]], np.int32))
  return inspection._inspected(chunks, [('here', title, 'd9')], Store(), 2, 0.5)[0]


def test_common_runs_prefixes_and_flags_by_hand():
  chunk = inspected([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12],
                    [1, 2, 3, 4, 90, 7], [8, 9, 10, 91, 0, 0], other_id=5)
  (neighbor,) = chunk.neighbors
  assert (neighbor.asked.prefix, neighbor.asked.run, neighbor.asked.at, neighbor.asked.of) == (
      4, 4, 0, 0)
  assert (neighbor.next.prefix, neighbor.next.run, neighbor.next.at, neighbor.next.of) == (
      0, 4, 5, 0)
  assert neighbor.flags == ('near-duplicate',) and chunk.flags == ('only 1 of 2 neighbours',)
  assert (neighbor.document, neighbor.number, neighbor.of) == ('d1', 2, 4)
  kinds = inspection.kinds_of_neighbor(neighbor).tolist()
  assert kinds == ['asked begins'] * 4 + ['', 'next', 'next', 'next', 'next', '', '', '']
  asked, following = inspection.kinds_of_chunks(chunk)
  assert asked.tolist() == ['asked begins'] * 4 + ['', '']
  assert following.tolist() == ['next'] * 4 + ['', '']


def test_exact_duplicate_same_title_no_neighbour_and_chance():
  (neighbor,) = inspected([1, 2, 3], [4, 5, 6], [1, 2, 3], [4, 5, 6], title='a').neighbors
  assert neighbor.flags == ('exact duplicate', 'same title')
  (neighbor,) = inspected([1, 2, 9, 8], [4, 5, 6, 7], [2, 1, 2, 3], [4, 5, 0, 0], 'x').neighbors
  assert neighbor.flags == () and neighbor.asked.run == 2
  assert set(inspection.kinds_of_neighbor(neighbor)) == {''}  # two tokens may be chance
  nobody = inspected([1, 2, 3], [4, 5, 6], [0] * 3, [0] * 3, other_id=-1)
  assert nobody.flags == ('no neighbour',) and nobody.neighbors == ()


def test_terminal_says_who_where_and_how_much(world):
  _, stored = world
  places = inspection.choose(stored, Selection(count=3), 2)
  chunks = inspection.inspect_stored(stored, places, 2, 0.5)
  plain = inspection_views.terminal(chunks, worlds.vocabulary(), False)
  assert '\x1b' not in plain
  for place, chunk in zip(places, chunks):
    example, u = divmod(int(place), stored.chunks_per_example)
    assert f'{chunk.title} ({chunk.document}): example {example}, chunk {u}: chunk' in plain
    for neighbor in chunk.neighbors:
      assert f'distance {neighbor.distance:.4f}: {neighbor.title} ({neighbor.document})' in plain
  colored = inspection_views.terminal(chunks, worlds.vocabulary(), True)
  # Take the colours away: but for the lines that only one of the two has, the same is left.
  bare = re.sub('\x1b\\[[0-9;]*m', '', colored).split('\n', 2)[2]
  assert bare == re.sub('longest run common .*\n', '', plain)


# Typed text.


def test_typed_text_finds_the_chunk_it_was_copied_from(world):
  folder, stored = world
  db, vocabulary = stored.database, worlds.vocabulary()
  ids = np.arange(db.document_starts[4], db.document_starts[5])[:2]
  text = vocabulary.decode(db.tokens(ids).ravel().tolist())
  retriever = LiveRetriever(
      db, Index.open(folder / 'index', db), worlds.embedder(), vocabulary, 2)
  first, *_ = inspection.inspect_text(text, retriever, vocabulary, 0.5)
  assert first.title == 'typed text' and first.neighbors
  typed = vocabulary.encode(text)
  assert first.tokens.tolist() == (typed + [0] * 8)[:8]
  assert first.following.tolist() == (typed + [0] * 16)[8:16]
  found = retriever.neighbors(first.tokens)
  assert [n.distance for n in first.neighbors] == found.distances.tolist()
  with pytest.raises(UserError, match='the text is empty'):
    inspection.inspect_text('', retriever, vocabulary, 0.5)


# No text acts.


class Page(html.parser.HTMLParser):
  """Tags and attributes of a page, as a parser sees them."""

  def __init__(self, page: str):
    super().__init__()
    self.tags, self.attributes = [], []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs


def test_everything_hostile_is_text_on_the_page_and_signs_in_the_terminal(attacked, tmp_path):
  stored, vocabulary = attacked
  places = inspection.choose(stored, Selection(count=99), 2)
  chunks = inspection.inspect_stored(stored, places, 2, 0.5)
  assert {chunk.title for chunk in chunks} == set(hostile.ATTACKS)
  plain = inspection_views.terminal(chunks, vocabulary, False)
  assert not [sign for sign in hostile.ACTING if sign in plain]
  assert '␛]0;HACKED␇' in plain and '\\u202eabc' in plain
  # With colours, the only escapes are ours.
  colored = inspection_views.terminal(chunks, vocabulary, True)
  rest = re.sub('\x1b\\[(0|1|4|30;4[236](;4)?)m', '', colored)
  assert not [sign for sign in hostile.ACTING if sign in rest]
  facts = {attack: attack for attack in hostile.ATTACKS}
  inspection_views.page(tmp_path / 'page.html', chunks, vocabulary, facts)
  written = (tmp_path / 'page.html').read_text(encoding='utf-8')
  page = Page(written)
  assert not hostile.FORBIDDEN_TAGS & set(page.tags) and 'img' not in page.tags
  assert not [name for name, _ in page.attributes if name.startswith('on') or name == 'srcdoc']
  assert not [sign for sign in hostile.ACTING if sign in written]
  assert page.tags.count('meta') == 3
  policy = next(value for name, value in page.attributes if name == 'content')
  assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_nothing_runs_in_a_browser(attacked, tmp_path):
  path = browser.find()
  if path is None:
    print('skipped: no chromium or google-chrome is installed, so no page was opened in one')
    pytest.skip('no chromium or google-chrome is installed')
  # That the browser runs what it is given, or nothing would be shown by what follows.
  (tmp_path / 'open.html').write_text('<title>calm</title>' + hostile.ATTACKS[0])
  assert '<title>HACKED</title>' in browser.dump_dom(
      path, tmp_path / 'open.html', tmp_path / 'profile-1')
  stored, vocabulary = attacked
  places = inspection.choose(stored, Selection(count=99), 2)
  chunks = inspection.inspect_stored(stored, places, 2, 0.5)
  inspection_views.page(tmp_path / 'page.html', chunks, vocabulary,
                        {attack: attack for attack in hostile.ATTACKS})
  dom = browser.dump_dom(path, tmp_path / 'page.html', tmp_path / 'profile-2')
  assert '<title>Chunks and the neighbours they retrieved</title>' in dom
  assert not hostile.FORBIDDEN_TAGS & set(Page(dom).tags)


def test_the_policy_alone_stops_a_script_that_got_through(tmp_path):
  path = browser.find()
  if path is None:
    print('skipped: no chromium or google-chrome is installed, so no page was opened in one')
    pytest.skip('no chromium or google-chrome is installed')
  html_page.write(tmp_path / 'page.html', 'calm', ''.join(hostile.ATTACKS[:4]))
  dom = browser.dump_dom(path, tmp_path / 'page.html', tmp_path / 'profile')
  assert '<title>calm</title>' in dom and '<script>' in dom


@settings(max_examples=200)
@given(st.text(st.characters(codec=None)))
def test_visible_lets_nothing_act_and_other_text_alone(text):
  shown = visible.visible(text)
  assert not [sign for sign in hostile.ACTING if sign in shown]
  shown.encode('utf-8')  # lone surrogates would refuse
  if not set(text) & set(hostile.ACTING) and not re.search('[\ud800-\udfff\u2029]', text):
    assert shown == text


def test_a_character_cut_in_two_is_shown_once():
  vocabulary = worlds.vocabulary()
  tokens = vocabulary.encode('a ሴ b')  # not in the vocabulary: one token a byte
  for cut in range(1, len(tokens)):
    kinds = ['asked'] * cut + [''] * (len(tokens) - cut)
    parts = html_page.marked(np.array(tokens), np.array(kinds), vocabulary)
    assert ''.join(part for part, _ in parts) == 'a ሴ b'


# As a person calls it.


def call(arguments, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['inspect_neighbors.py', *arguments])
  from retro_jax import configuration
  configuration.main(inspect_neighbors.InspectNeighborsJob, inspect_neighbors.run,
                     inspect_neighbors.CONFIGURABLES)
  return capsys.readouterr()


def test_tool_prints_and_writes_a_page(world, tmp_path, monkeypatch, capsys):
  folder, _ = world
  out = call(['--gin_file=gin/data/inspect.gin', f'--gin.EXAMPLES={folder}/examples',
              '--gin.CHUNKS=((0, 1), (1, 0))', f'--gin.PAGE={tmp_path}/p.html'],
             monkeypatch, capsys).out
  assert out.count('== Title') == 2 and '\x1b' not in out and 'example 1, chunk 0' in out
  assert Page((tmp_path / 'p.html').read_text()).tags.count('article') == 2


def test_tool_retrieves_for_typed_text(world, monkeypatch, capsys):
  folder, _ = world
  arguments = ['--gin_file=gin/data/inspect.gin', '--gin.TEXT=def return self import class',
               f'--gin.DATABASE={folder}/db', f'--gin.INDEX={folder}/index',
               '--gin.EMBEDDER=@LexicalEmbedder()']
  out = call([*arguments, '--gin.LexicalEmbedder.dimension=16', '--gin.COLOR=always'],
             monkeypatch, capsys).out
  assert 'typed text: chunk 1 of' in out and '-- neighbour 2' in out and '\x1b[1m' in out
  with pytest.raises(SystemExit):
    call(arguments, monkeypatch, capsys)  # another dimension: not this database's embedder


@pytest.mark.parametrize('arguments, words', [
    ([], 'nothing to look at'), (['--gin.TEXT=x'], 'set database and index'),
    (['--gin.EXAMPLES=x', '--gin.COLOR=maybe'], "color is 'maybe'"),
    (['--gin.EXAMPLES=/nowhere'], 'no retrieval-examples there')])
def test_mistakes_are_one_line(arguments, words, monkeypatch, capsys):
  with pytest.raises(SystemExit) as stop:
    call(['--gin_file=gin/data/inspect.gin', *arguments], monkeypatch, capsys)
  assert stop.value.code == 2
  lines = capsys.readouterr().err.splitlines()
  errors = [line for line in lines if line.startswith('error: ')]
  assert len(errors) == 1 and words in errors[0]
