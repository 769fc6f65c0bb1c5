"""Passages of a chunk database: the neighbour of a question, what follows it, and its title."""

import pytest

from retro_jax.data.corpus import Document
from retro_jax.data.questions import Question
from retro_jax.errors import UserError
from retro_jax.retrieval import pipeline
from retro_jax.retrieval.bm25 import Bm25Config
from retro_jax.retrieval.question_passages import DatabasePassages
from retro_jax.retrieval.sharded_index import Index
from tests import worlds


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  folder = tmp_path_factory.mktemp('passages')
  texts = ['def model layer chunk token', 'import numpy shape value', 'read text file retro jax']
  database = worlds.store(folder / 'db', [
      Document(f'd{i}', text, title='' if i == 2 else f'Title {i}')
      for i, text in enumerate(texts)])
  pipeline.build_index(folder / 'vectors', database)
  pipeline.build_index(folder / 'words', database, Bm25Config())
  return database, {name: Index.open(folder / name, database) for name in ('vectors', 'words')}


@pytest.mark.parametrize('name', ['vectors', 'words'])
def test_a_passage_is_a_chunk_with_its_continuation_and_title(world, name):
  database, indices = world
  passages = DatabasePassages(database, indices[name], worlds.embedder(), 2)
  asked = [Question('', 'which model layer?', ('x',)), Question('', 'retro jax read?', ('x',))]
  found = passages.find(asked)
  assert [some[0].title for some in found] == ['Title 0', 'd2']  # the id where there is no title
  vocabulary = worlds.vocabulary()
  stored = {vocabulary.decode(database.with_continuation([chunk])[0][0].tolist())
            for chunk in range(database.num_chunks)}
  assert all(1 <= len(some) <= 2 and {p.text for p in some} <= stored for some in found)
  other = DatabasePassages(database, indices[name], worlds.embedder(), 1)
  assert [some[:1] for some in found] == other.find(asked)
  assert other.describe() != passages.describe()


def test_an_index_of_words_needs_no_embedder(world):
  database, indices = world
  asked = [Question('', 'nothing in common: zzz', ('x',)), Question('', 'shape value', ('x',))]
  nothing, found = DatabasePassages(database, indices['words'], None, 2).find(asked)
  assert not nothing and found[0].title == 'Title 1'
  for embedder in (None, worlds.embedder(8)):
    with pytest.raises(UserError, match='another embedder'):
      DatabasePassages(database, indices['vectors'], embedder, 2)
