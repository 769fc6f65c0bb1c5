"""Passages for questions from a chunk database: a neighbour of the question and what follows it.

The question's text is searched for as a chunk's would be. What is found comes out as text with
its document's title, so that a database in another vocabulary or of another chunk length than
the model's serves as well. How passages stand in an example is question_examples.py's business.
"""

from collections.abc import Sequence
from typing import Any

from retro_jax.data.questions import Passage, Question
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.errors import UserError
from retro_jax.retrieval.database import VOCABULARY, ChunkDatabase
from retro_jax.retrieval.search import check_of_database, nearest_visible, queries_of
from retro_jax.retrieval.sharded_index import Index


class DatabasePassages:
  """The nearest chunks of a database with their continuations."""

  def __init__(self, database: ChunkDatabase, index: Index, embedder: Any | None, count: int):
    """Puts the parts together.

    Args:
      database: that is searched.
      index: over it.
      embedder: the one that it was built with; a BM25 index needs none.
      count: passages a question.

    Raises:
      UserError: the index is of another database, or the embedder is not that of the database.
    """
    check_of_database(index, database)
    if index.method != 'bm25' and (
        embedder is None or embedder.fingerprint != database.embedder_fingerprint):
      raise UserError(f'{database.folder} was built with another embedder than the one given '
                      '(or there is none); choose the embedder of the database, or a BM25 index')
    self._database, self._index, self._embedder, self._count = database, index, embedder, count
    self._vocabulary = Vocabulary.load(database.folder / VOCABULARY)

  def find(self, questions: Sequence[Question]) -> list[Sequence[Passage]]:
    """The passages of each question, nearest first; of removed documents none."""
    queries = queries_of([question.text for question in questions], self._index, self._embedder)
    found, _ = nearest_visible(self._index, queries, self._count)
    tokens, _ = self._database.with_continuation(found)
    return [[Passage(self._title(chunk), self._vocabulary.decode(row))
             for chunk, row in zip(ids, rows) if chunk >= 0]
            for ids, rows in zip(found.tolist(), tokens.tolist())]

  def describe(self) -> dict[str, Any]:
    """Of the contents of database and index, and how many passages are taken."""
    return {'kind': 'database', 'database': self._database.fingerprint,
            'index': self._index.fingerprint, 'count': self._count}

  def _title(self, chunk: int) -> str:
    document = self._database.document_info(int(self._database.document(chunk)))
    return document['title'] or document['id']
