"""Which candidates a policy lets through, against a loop over candidates, ids and dates."""

import collections
import dataclasses
import datetime
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.overlap import brute_force
from retro_jax.data.corpus import JsonLines
from retro_jax.errors import UserError
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.database_build import DatabaseConfig, build_chunk_database
from retro_jax.retrieval.database_edit import remove_documents
from retro_jax.retrieval.document_dates import Moments, read_date
from retro_jax.retrieval.policies import Own, Policy, PolicyConfig, describe, in_fraction
from tests import worlds

M = 8
# A date of each form; its beginning and its end by hand, which sort as text.
SPANS = {'2015-03-01': ('2015-03-01T00', '2015-03-01T24'),
         '2015-02': ('2015-02-01', '2015-02-28T24'),
         '2015': ('2015-01-01', '2015-12-31T24'), 2014: ('2014-01-01', '2014-12-31T24'),
         '2015-02-28T12:00:00': ('2015-02-28T12', '2015-02-28T12'),
         '2015-04-01': ('2015-04-01T00', '2015-04-01T24')}
DATES = [*SPANS, 'no date', None]


def store_of(folder, rows, dates) -> ChunkDatabase:
  """A store of small shards whose documents have `dates` in their metadata."""
  path = folder.with_suffix('.jsonl')
  path.write_text(''.join(json.dumps({'id': d.id, 'text': d.text, 'date': date}) + '\n'
                          for d, date in zip(rows, dates)), encoding='utf-8')
  return build_chunk_database(
      folder, JsonLines(str(path), metadata_fields=('date',)), worlds.vocabulary(),
      DatabaseConfig(chunk_length=M, chunks_per_shard=30, shuffle_seed=None))


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
  """A database, and queries of which some documents are in it under other ordinals."""
  rows = worlds.documents(5, 14, longest=40)
  folder = tmp_path_factory.mktemp('policies')
  dates = [DATES[i % len(DATES)] for i in range(14)]
  queries = store_of(folder / 'queries', rows[8:] + worlds.documents(6, 4, prefix='new'),
                     dates[2:12])
  store_of(folder / 'database', rows, dates)
  remove_documents(folder / 'database', ['doc-2', 'doc-9'])
  return queries, ChunkDatabase.open(folder / 'database')


def facts(store, chunk):
  info = store.document_info(int(store.document(chunk)))
  return info['id'], SPANS.get(info['metadata'].get('date'))


def reason_against(config, stores, near_ids, names, query, candidate) -> str | None:
  """The first reason for which a candidate is turned away, from the facts alone."""
  name, dated = facts(stores[1], candidate)
  _, query_dated = facts(stores[0], query)
  if name in names and config.exclude_query_documents:
    return 'same_document'
  if config.near_duplicate_documents and any((n, name) in near_ids for n in names):
    return 'near_duplicate_document'
  if name in ('doc-2', 'doc-9'):
    return 'removed'
  if name in config.deny_documents:
    return 'deny_list'
  if not in_fraction(stores[1].document(candidate), config.database_fraction):
    return 'outside_fraction'
  if config.latest or config.earlier_than_query:
    if dated is None or (config.earlier_than_query and query_dated is None):
      return 'undated'
    if config.latest and dated[1] > config.latest + 'T24':
      return 'too_late'
    if config.earlier_than_query and not dated[1] < query_dated[0]:
      return 'too_late'
  if config.near_duplicate_chunks:
    shared = brute_force(stores[0].tokens(query).tolist(),
                         stores[1].with_continuation(candidate)[0].tolist())[0]
    if shared / M > config.near_duplicate_chunks:
      return 'near_duplicate'
  return None


CONFIGS = st.builds(
    PolicyConfig,
    deny_documents=st.lists(st.sampled_from([f'doc-{i}' for i in range(14)] + ['unheard-of'])).map(
        tuple),
    exclude_query_documents=st.booleans(),
    near_duplicate_chunks=st.sampled_from([0.0, 0.125, 0.25, 0.375, 0.9]),
    near_duplicate_documents=st.sampled_from([0.0, 0.8]),
    date_field=st.just('date'),
    latest=st.sampled_from(['', '2015-03-01']),
    earlier_than_query=st.booleans(),
    database_fraction=st.sampled_from([1.0, 0.6]))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), config=CONFIGS)
def test_equals_a_loop_over_candidates(stores, seed, config):
  queries, database = stores
  rng = np.random.default_rng(seed)
  near = np.stack([rng.integers(0, queries.num_documents, 6),
                   rng.integers(0, database.num_documents, 6)], 1)
  near_ids = {(queries.document_ids[i], database.document_ids[j]) for i, j in near}
  policy = Policy(config, queries, database, near)
  sequences = rng.integers(0, queries.num_chunks, (3, 4))
  documents = queries.document(sequences)
  documents[0, -1] = -1
  rows = rng.integers(0, 3, 7)
  query_chunks = sequences[rows, rng.integers(0, 3, 7)]
  own = policy.own_documents(documents)[rows]
  ids = rng.integers(-1, database.num_chunks, (7, 9))
  names = [{queries.document_ids[d] for d in documents[s] if d >= 0} for s in range(3)]

  def reason(row, chunk):
    return reason_against(config, stores, near_ids, names[rows[row]], query_chunks[row], chunk)

  allowed = policy.allowed(query_chunks, own, ids)
  assert allowed.shape == ids.shape and len(own) == 7
  expected = collections.Counter()
  for index in np.ndindex(*ids.shape):
    why = reason(index[0], ids[index]) if ids[index] >= 0 else 'no candidate'
    expected[why] += 1
    assert allowed[index] == (why is None)
  del expected[None], expected['no candidate']
  assert +policy.drops == +expected
  policy.allowed(query_chunks, own, ids, count=False)
  assert +policy.drops == +expected
  first, size = 3, database.num_chunks - 5
  forbidden = policy.forbidden_in(first, size, query_chunks, own)
  for row in range(2):
    assert forbidden[row].tolist() == [
        reason(row, c) not in (None, 'near_duplicate') for c in range(first, first + size)]
  assert policy.num_denied == len(set(config.deny_documents) - {'unheard-of'})


def test_every_date_of_a_query_against_every_date_of_a_candidate(stores):
  queries, database = stores
  config = PolicyConfig(exclude_query_documents=False, date_field='date', earlier_than_query=True)
  policy = Policy(config, *stores)
  query_chunks = queries.document_starts[:-1]
  ids = np.broadcast_to(database.document_starts[:-1], (len(query_chunks), 14))
  allowed = policy.allowed(
      query_chunks, policy.own_documents(queries.document(query_chunks)[:, None]), ids)
  expected = [[reason_against(config, stores, set(), set(), q, c) is None for c in ids[0]]
              for q in query_chunks]
  assert allowed.tolist() == expected
  assert 0 < allowed.sum() < allowed.size / 2


def test_one_store_and_two_equal_ones_allow_the_same(tmp_path):
  rows, dates = worlds.documents(7, 9, longest=30), ['2015'] * 9
  store = store_of(tmp_path / 'a', rows, dates)
  other = store_of(tmp_path / 'b', rows[::-1], dates)
  chunks = np.arange(store.num_chunks)[:24].reshape(4, 6)
  ids = np.broadcast_to(np.arange(store.num_chunks), (4, store.num_chunks))
  one, two = (Policy(PolicyConfig(), queries, store) for queries in (store, other))
  by_id = [[other.ordinal_of(store.document_ids[d]) for d in row] for row in store.document(chunks)]
  np.testing.assert_array_equal(
      one.allowed(chunks[:, 0], one.own_documents(store.document(chunks)), ids),
      two.allowed(np.zeros(4, int), two.own_documents(np.array(by_id)), ids))


def test_only_documents_that_are_asked_for_are_looked_up(stores, monkeypatch):
  queries, database = stores
  asked = []
  read = ChunkDatabase.document_info

  def document_info(store, ordinal):
    asked.append((store.folder.name, ordinal))
    return read(store, ordinal)

  monkeypatch.setattr(ChunkDatabase, 'document_info', document_info)
  policy = Policy(PolicyConfig(), queries, database)
  assert not asked
  own = policy.own_documents(np.array([[1, 1, 4], [4, -1, -1]]))
  assert {o for name, o in asked if name == 'queries'} == {1, 4}
  assert len(asked) <= 4
  policy.own_documents(np.array([[4, 1, -1]]))
  assert len(asked) <= 4
  assert own.same.shape == (2, 3) and own.near.shape == (2, 0)


def test_own_rows_can_be_picked_in_every_way():
  own = Own(np.arange(6).reshape(3, 2), np.arange(3)[:, None])
  for rows in (slice(1, 3), np.array([2, 0, 2]), np.array([True, False, True])):
    np.testing.assert_array_equal(own[rows].same, own.same[rows])
    np.testing.assert_array_equal(own[rows].near, own.near[rows])


def test_near_documents_are_needed_when_the_config_says_so(stores):
  with pytest.raises(UserError, match='near_document_pairs'):
    Policy(PolicyConfig(near_duplicate_documents=0.8), *stores)
  policy = Policy(PolicyConfig(near_duplicate_documents=0.8), *stores, np.zeros((0, 2), np.int64))
  assert policy.own_documents(np.array([[0, 1]])).near.shape == (1, 0)


def test_deny_file(stores, tmp_path):
  path = tmp_path / 'deny.txt'
  path.write_text('doc-1\ndoc-2\n')
  config = PolicyConfig(deny_file=str(path))
  assert Policy(config, *stores).num_denied == 2
  before = describe(config)
  path.write_bytes(b'\xef\xbb\xbfdoc-1\r\n\r\n')
  assert describe(config) != before
  assert describe(PolicyConfig(('doc-1',))) == describe(config)
  path.write_bytes(b'doc-\xff\n')
  for bad, why in ((path, 'not UTF-8'), (tmp_path / 'none', 'deny_file')):
    with pytest.raises(UserError, match=why) as error:
      Policy(PolicyConfig(deny_file=str(bad)), *stores)
    assert str(bad) in str(error.value)


def test_description_follows_every_setting(stores):
  changed = {'deny_documents': ('doc-1',), 'exclude_query_documents': False,
             'near_duplicate_chunks': 0.5, 'near_duplicate_documents': 0.8, 'date_field': 'day',
             'latest': '2015', 'earlier_than_query': True, 'database_fraction': 0.5}
  assert changed.keys() | {'deny_file'} == {f.name for f in dataclasses.fields(PolicyConfig)}
  base = PolicyConfig(date_field='date')
  descriptions = [describe(base)] + [
      describe(dataclasses.replace(base, **{key: value})) for key, value in changed.items()]
  assert len({json.dumps(d, sort_keys=True) for d in descriptions}) == len(descriptions)
  assert Policy(base, *stores).description == describe(base)


@pytest.mark.parametrize('settings_, why', [
    ({'deny_documents': 'doc-1'}, 'list of document ids'),
    ({'near_duplicate_chunks': 1.0}, 'near_duplicate_chunks is 1.0'),
    ({'near_duplicate_chunks': -0.1}, 'near_duplicate_chunks'),
    ({'near_duplicate_chunks': float('nan')}, 'near_duplicate_chunks'),
    ({'near_duplicate_documents': 1.1}, 'near_duplicate_documents is 1.1'),
    ({'database_fraction': 0.0}, 'database_fraction is 0.0'),
    ({'database_fraction': 1.5}, 'database_fraction is 1.5'),
    ({'latest': '2015'}, 'date_field'), ({'earlier_than_query': True}, 'date_field'),
    ({'latest': 'yesterday', 'date_field': 'date'}, "latest is 'yesterday'")])
def test_settings_that_make_no_sense(settings_, why):
  with pytest.raises(UserError, match=why):
    PolicyConfig(**settings_)


def moment(text: str) -> int:
  """Microseconds since the year 1, from 1."""
  return (datetime.datetime.fromisoformat(text) - datetime.datetime(1, 1, 1)
          ) // datetime.timedelta(microseconds=1) + 1


@pytest.mark.parametrize('value, first, last', [
    ('2015-03-01', '2015-03-01T00:00:00', '2015-03-01T23:59:59.999999'),
    (' 20150301 ', '2015-03-01T00:00:00', '2015-03-01T23:59:59.999999'),
    ('2016-02', '2016-02-01T00:00:00', '2016-02-29T23:59:59.999999'),
    ('2015-12', '2015-12-01T00:00:00', '2015-12-31T23:59:59.999999'),
    ('2015', '2015-01-01T00:00:00', '2015-12-31T23:59:59.999999'),
    (2016, '2016-01-01T00:00:00', '2016-12-31T23:59:59.999999'),
    (9999.0, '9999-01-01T00:00:00', '9999-12-31T23:59:59.999999'),
    ('2015-03-01T10:30:00', '2015-03-01T10:30:00', '2015-03-01T10:30:00'),
    ('2015-03-01 10:30', '2015-03-01T10:30:00', '2015-03-01T10:30:00'),
    ('2015-03-01T10:30:00Z', '2015-03-01T10:30:00', '2015-03-01T10:30:00'),
    ('2015-03-01T00:30:00+02:00', '2015-02-28T22:30:00', '2015-02-28T22:30:00'),
    (1425168000, '2015-03-01T00:00:00', '2015-03-01T00:00:00'),
    (0, '1970-01-01T00:00:00', '1970-01-01T00:00:00'),
    (-1.5, '1969-12-31T23:59:58.5', '1969-12-31T23:59:58.5')])
def test_dates(value, first, last):
  assert read_date(value) == Moments(moment(first), moment(last))


@pytest.mark.parametrize('value', [
    None, '', 'x', True, [], {}, '2015-13', '2015-02-30', '0000', float('nan'), float('inf'), 1e300,
    10**400, '0001-01-01T00:00:00+05:00', '9999-12-31T23:00:00-05:00', '1425168000.5'])
def test_what_is_no_date(value):
  assert read_date(value) is None


def test_a_smaller_fraction_lies_inside_a_larger_one():
  documents = np.arange(200_000)
  before = np.zeros(len(documents), bool)
  for fraction in (0.01, 0.03, 0.1, 0.3, 1.0):
    inside = in_fraction(documents, fraction)
    assert inside.mean() == pytest.approx(fraction, rel=0.05)
    assert inside[before].all()
    before = inside
  assert before.all()


def test_without_a_fraction_the_description_is_as_it_was():
  assert 'database_fraction' not in describe(PolicyConfig())
