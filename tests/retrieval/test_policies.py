"""Which candidates a policy lets through, against loops over document ids."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.errors import UserError
from retro_jax.retrieval.policies import Policy, PolicyConfig, describe
from tests import worlds


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
  """A database, and queries of which some documents are in it under other ordinals."""
  rows = worlds.documents(5, 14, longest=40)
  folder = tmp_path_factory.mktemp('policies')
  return (worlds.store(folder / 'queries', rows[8:] + worlds.documents(6, 4, prefix='new')),
          worlds.store(folder / 'database', rows))


def name_of(store, chunk):
  return store.document_info(int(store.document(chunk)))['id']


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), deny=st.sets(st.integers(0, 13), max_size=5))
def test_allowed_and_forbidden_equal_a_loop_over_ids(stores, seed, deny):
  queries, database = stores
  rng = np.random.default_rng(seed)
  denied = {f'doc-{i}' for i in deny}
  policy = Policy(PolicyConfig(tuple(sorted(denied)) + ('unheard-of',)), queries, database)
  chunks = rng.integers(0, queries.num_chunks, (3, 4))
  documents = queries.document(chunks)
  documents[0, -1] = -1
  candidates = rng.integers(-1, database.num_chunks, (3, 4, 6))
  own = policy.own_documents(documents)
  allowed = policy.allowed(candidates, own)
  forbidden = policy.forbidden_in(3, database.num_chunks - 5, own)
  same = deny_hits = 0
  for s in range(3):
    names = {queries.document_ids[d] for d in documents[s] if d >= 0}
    for index in np.ndindex(4, 6):
      chunk = candidates[(s, *index)]
      is_same = chunk >= 0 and name_of(database, chunk) in names
      is_denied = chunk >= 0 and name_of(database, chunk) in denied and not is_same
      same, deny_hits = same + is_same, deny_hits + is_denied
      assert allowed[(s, *index)] == (chunk >= 0 and not is_same and not is_denied)
    expected = [name_of(database, c) in names | denied for c in range(3, database.num_chunks - 2)]
    assert forbidden[s].tolist() == expected
  assert policy.drops['same_document'] == same and policy.drops['deny_list'] == deny_hits
  assert policy.num_denied == len(denied)


def test_own_documents_can_be_let_through_on_purpose(stores):
  queries, database = stores
  policy = Policy(PolicyConfig(exclude_query_documents=False), queries, database)
  assert (policy.own_documents(queries.document(np.zeros((1, 1), int))) == -1).all()


def test_deny_file(stores, tmp_path):
  path = tmp_path / 'deny.txt'
  path.write_text('doc-1\ndoc-2\n')
  config = PolicyConfig(deny_file=str(path))
  assert Policy(config, *stores).num_denied == 2
  before = describe(config)
  path.write_text('doc-1\n')
  assert describe(config) != before
  assert describe(PolicyConfig(('doc-1',))) == describe(config)
  with pytest.raises(UserError, match='cannot read the deny-list'):
    Policy(PolicyConfig(deny_file=str(tmp_path / 'none')), *stores)
