"""The corpus report against plain counts over all chunks, and its page against its numbers."""

import collections
import json
import sys

import numpy as np
import pytest
from PIL import Image

from retro_jax import configuration
from retro_jax.errors import UserError
from retro_jax.evaluation import corpus_report, corpus_report_page
from retro_jax.evaluation.chunk_samples import StoredChunks
from retro_jax.evaluation.corpus_report import Copies, ReportConfig
from retro_jax.retrieval import database_edit, pipeline
from retro_jax.retrieval.bm25 import Bm25Config
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.sharded_index import Index
from tests import worlds
from tests.evaluation import browser, hostile
from tests.evaluation.test_inspection import Page
from tools import corpus_report as tool

CONFIG = ReportConfig(sample=10**6, numbers_of_neighbors=(1, 2, 5))


@pytest.fixture(scope='module', name='world')
def _world(tmp_path_factory):
  folder = tmp_path_factory.mktemp('report')
  worlds.examples(folder, worlds.documents(5, 20))
  return folder


@pytest.fixture(scope='module', name='body')
def _body(world):
  stored = StoredChunks(world / 'examples')
  return corpus_report.measure(
      stored.database, {'train': stored}, Index.open(world / 'index', stored.database), CONFIG)


def plain_corpus(database: ChunkDatabase, gone: set[int] = frozenset()) -> dict:
  """The same by one loop over all chunks."""
  chunks = [i for i in range(database.num_chunks) if int(database.document(i)) not in gone]
  tokens = [tuple(t for t in database.tokens(i).tolist() if t) for i in chunks]
  by_document = collections.Counter()
  for i, row in zip(chunks, tokens):
    by_document[int(database.document(i))] += len(row)
  copies = collections.Counter(tokens)
  return {
      'documents': database.num_documents - len(gone), 'chunks': len(chunks),
      'tokens': sum(map(len, tokens)),
      'text_bytes': sum(int(database.text_bytes(i)) for i in chunks),
      'chunk_lengths': [sum(len(row) == n for row in tokens) for n in range(9)],
      'extra': sum(n - 1 for n in copies.values()) / len(tokens),
      'with_copies': sum(n for n in copies.values() if n > 1) / len(tokens),
      'document_tokens': by_document}


def check_corpus(found: dict, expected: dict) -> None:
  for name in ('documents', 'chunks', 'tokens', 'text_bytes', 'chunk_lengths'):
    assert found[name] == expected[name], name
  for name in ('extra', 'with_copies'):
    assert found['copies'][name] == pytest.approx(expected[name])
  lengths = list(expected['document_tokens'].values())
  assert found['document_lengths']['mean'] == pytest.approx(np.mean(lengths))
  assert found['document_lengths']['percentiles']['50'] == pytest.approx(np.median(lengths))
  edges = found['document_lengths']['edges']
  assert found['document_lengths']['counts'] == [
      sum(low <= n < high for n in lengths) for low, high in zip(edges, edges[1:])]
  (source,) = found['sources']['by_source'].values()
  assert source == {'documents': found['documents'], 'tokens': found['tokens'],
                    'text_bytes': found['text_bytes']}


def test_corpus_is_what_a_loop_counts(world, body, monkeypatch):
  database = ChunkDatabase.open(world / 'db')
  expected = plain_corpus(database)
  check_corpus(body['corpus'], expected)
  assert body['corpus']['short_chunks'] == sum(expected['chunk_lengths'][1:8])
  monkeypatch.setattr(corpus_report, '_CHUNKS_AT_ONCE', 7)  # blocks change nothing
  assert corpus_report.corpus_facts(database, CONFIG) == body['corpus']


def test_removed_documents_are_left_out(tmp_path):
  worlds.store(tmp_path / 'db', worlds.documents(5, 9))
  database_edit.remove_documents(tmp_path / 'db', ['doc-1', 'doc-4'])
  database = ChunkDatabase.open(tmp_path / 'db')
  found = corpus_report.corpus_facts(database, CONFIG)
  gone = {database.ordinal_of('doc-1'), database.ordinal_of('doc-4')}
  assert found['removed_documents'] == 2
  check_corpus(found, plain_corpus(database, gone))


def test_copies_are_estimated_in_bounded_memory():
  rng = np.random.default_rng(0)
  rows = rng.integers(1, 1000, (20000, 8)).astype(np.int32)
  rows[10000:15000] = rows[:5000]  # a quarter are extra copies, a half have one
  exact, bounded = Copies(10**6), Copies(3000)
  for block in np.array_split(rng.permutation(rows), 7):
    exact.add(block)
    bounded.add(block)
  assert exact.facts() == {'seen': 20000, 'compared': 20000, 'extra': 0.25, 'with_copies': 0.5}
  found = bounded.facts()
  assert found['seen'] == 20000 and 1000 < found['compared'] <= 3000
  assert found['extra'] == pytest.approx(0.25, abs=0.04)
  assert found['with_copies'] == pytest.approx(0.5, abs=0.06)


def test_sources_of_many_documents_are_read_from_a_sample(world):
  database = ChunkDatabase.open(world / 'db')
  found = corpus_report.corpus_facts(database, ReportConfig(documents=4))['sources']
  assert found['documents_read'] == 4
  assert sum(row['documents'] for row in found['by_source'].values()) == 4


def longest(a: list[int], b: list[int]) -> int:
  return max((n for n in range(1, len(a) + 1) for i in range(len(a) - n + 1)
              for j in range(len(b) - n + 1) if a[i:i + n] == b[j:j + n] and 0 not in a[i:i + n]),
             default=0)


def test_neighbour_facts_are_what_a_loop_counts(world, body):
  stored = StoredChunks(world / 'examples')
  chunks = stored.read(np.arange(stored.num_places))
  facts = body['neighbors']['train']
  assert facts['sample']['chunks'] == len(chunks) == facts['chunks']
  near, same = [], []
  for row in range(len(chunks)):
    n = chunks.neighbor_tokens[row, 0]
    near.append(longest(chunks.tokens[row].tolist(), n.tolist()) / 8 > 0.5)
    same.append(n[:8].tolist() == chunks.tokens[row].tolist())
  assert facts['near_duplicates']['share'] == pytest.approx(np.mean(near))
  assert facts['near_duplicates']['identical'] == pytest.approx(np.mean(same))
  assert np.mean(near) > 0.1  # the corpus repeats documents, so there is something to count
  assert facts['fewer_neighbors'] == np.mean(chunks.neighbor_ids[:, -1] < 0)
  assert facts['chunks_with_fewer'] == (chunks.neighbor_ids[:, -1] < 0).sum()
  counts = stored.examples.manifest['policy']['counts']
  assert facts['dropped']['same_document'] == counts['same_document']
  for rank in range(3):
    found = facts['distances']['by_rank'][str(rank + 1)]
    assert found['percentiles']['50'] == pytest.approx(np.median(chunks.distances[:, rank]))
    assert sum(found['counts']) == len(chunks)
  assert facts['distances']['random']['percentiles']['50'] > found['percentiles']['50']
  ids, times = np.unique(chunks.neighbor_ids, return_counts=True)
  assert facts['hubs'][0]['share'] == pytest.approx(times.max() / len(chunks))
  assert times[ids == facts['hubs'][0]['chunk']] == times.max()


def test_random_neighbours_give_what_random_ones_give(world, tmp_path):
  database = ChunkDatabase.open(world / 'db')
  pipeline.build_examples(tmp_path / 'random', database, database, None,
                          pipeline.ExamplesConfig(32, 3, kind='random', seed=7))
  facts = corpus_report.neighbor_facts(StoredChunks(tmp_path / 'random'), CONFIG, 'random')
  assert facts['kind'] == 'random'
  rows = facts['potential']['rows']
  assert max(abs(row['gain']) for row in rows) < 0.06


def test_scores_are_not_drawn_beside_distances(world, tmp_path):
  database = ChunkDatabase.open(world / 'db')
  pipeline.build_index(tmp_path / 'bm25', database, Bm25Config())
  pipeline.build_examples(tmp_path / 'x', database, database, tmp_path / 'bm25',
                          pipeline.ExamplesConfig(32, 3, margin=2))
  stored = StoredChunks(tmp_path / 'x')
  body = corpus_report.measure(database, {'x': stored}, Index.open(tmp_path / 'bm25', database),
                               CONFIG)
  facts = body['neighbors']['x']
  assert facts['distance'] == 'negated BM25 score' and not facts['distances']['random'][
      'percentiles']
  assert facts['distances']['edges'][0] < 0
  page = corpus_report_page.write(tmp_path / 'report', body)
  assert 'bm25' in page.read_text()


def test_same_seed_same_report(world, body):
  stored = StoredChunks(world / 'examples')
  config = ReportConfig(sample=50, seed=3)
  first, again = (corpus_report.neighbor_facts(stored, config, 'x') for _ in range(2))
  assert first == again and first['sample']['chunks'] <= 50
  assert first != corpus_report.neighbor_facts(stored, ReportConfig(sample=50, seed=4), 'x')
  assert json.loads(json.dumps(body)) == body  # plain numbers throughout


def test_settings_that_cannot_be_are_refused():
  with pytest.raises(UserError, match='at least 1'):
    ReportConfig(sample=0)


def test_page_and_pictures_show_the_numbers(body, tmp_path):
  path = corpus_report_page.write(tmp_path, body)
  page = path.read_text(encoding='utf-8')
  parsed = Page(page)
  assert parsed.tags.count('img') == 2 and 'script' not in parsed.tags
  for name in ('corpus.png', 'neighbors-train.png'):
    with Image.open(tmp_path / name) as image:
      assert image.format == 'PNG' and np.asarray(image.convert('L')).std() > 5
  corpus, facts = body['corpus'], body['neighbors']['train']
  row = next(r for r in facts['potential']['rows']
             if (r['measure'], r['part'], r['k']) == ('bigrams', 'NF', 2))
  for said in (f'{corpus["tokens"]:,}', f'{corpus["bytes_per_token"]:.3f}',
               f'{100 * row["nearest"]:.2f} %', f'{100 * row["random"]:.2f} %',
               f'{100 * row["gain_low"]:.2f} % to {100 * row["gain_high"]:.2f} %',
               f'{facts["sample"]["chunks"]:,} chunks, seed 0', 'recall@10 1.0000'):
    assert said in page, said


def test_report_without_neighbours_is_about_the_corpus(world, tmp_path):
  body = corpus_report.measure(ChunkDatabase.open(world / 'db'), {}, None, CONFIG)
  page = corpus_report_page.write(tmp_path, body).read_text()
  assert 'none given' in page and Page(page).tags.count('img') == 1


def test_hostile_corpus_stays_text(tmp_path):
  stored, _ = hostile.stored(tmp_path)
  evil = hostile.ATTACKS[0]
  body = corpus_report.measure(stored.database, {'x': stored}, None, CONFIG)
  body['corpus']['sources']['by_source'] = {evil: {'documents': 1, 'tokens': 1, 'text_bytes': 1}}
  body['database']['folder'] = hostile.ATTACKS[3]
  path = corpus_report_page.write(tmp_path / 'report', body)
  page = path.read_text(encoding='utf-8')
  parsed = Page(page)
  assert not hostile.FORBIDDEN_TAGS & set(parsed.tags) and '&lt;script&gt;' in page
  assert not [name for name, _ in parsed.attributes if name.startswith('on')]
  assert not [sign for sign in hostile.ACTING if sign in page]
  assert not [sign for sign in hostile.ACTING
              if sign in '\n'.join(corpus_report_page.headlines(body))]
  chromium = browser.find()
  if chromium is None:
    print('skipped: no chromium or google-chrome is installed, so no page was opened in one')
    pytest.skip('no chromium or google-chrome is installed')
  dom = browser.dump_dom(chromium, path, tmp_path / 'profile')
  assert '<title>What this database holds' in dom


def test_tool_writes_numbers_pictures_and_page(world, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', [
      'corpus_report.py', '--gin_file=gin/data/report.gin', f'--gin.REPORT={tmp_path}/r',
      f'--gin.DATABASE={world}/db', f'--gin.INDEX={world}/index',
      f"--gin.EXAMPLES=('{world}/examples',)", '--gin.SAMPLE=40'])
  configuration.main(tool.CorpusReportJob, tool.run, tool.CONFIGURABLES)
  assert 'bigrams of the next chunk' in capsys.readouterr().out
  written = json.loads((tmp_path / 'r' / 'results.json').read_text())
  assert '--gin_file=gin/data/report.gin' in written['command']
  assert written['config']['config']['sample'] == 40 and written['index']['recall']['recall'] == 1
  assert sorted(p.name for p in (tmp_path / 'r').iterdir()) == [
      'corpus.png', 'neighbors-examples.png', 'report.html', 'results.json']


def test_two_examples_of_one_name_are_refused(world, tmp_path):
  (tmp_path / 'examples').symlink_to(world / 'examples')
  with pytest.raises(UserError, match='has this name too'):
    tool.run(tool.CorpusReportJob(
        str(tmp_path / 'r'), str(world / 'db'),
        examples=(str(world / 'examples'), str(tmp_path / 'examples'))))
