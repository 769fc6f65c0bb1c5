"""Chunks beside their neighbours: python tools/inspect_neighbors.py --gin_file=... .

Prints stored chunks, or typed text retrieved for at once, with what was copied, and writes a
page if asked to. Which chunks, and what is said of them, is in retro_jax/evaluation/inspection.py.
"""

import dataclasses
from typing import Any

from retro_jax import configuration
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.errors import UserError
from retro_jax.evaluation import inspection, inspection_views
from retro_jax.evaluation.chunk_samples import StoredChunks
from retro_jax.evaluation.inspection import Selection
from retro_jax.evaluation.visible import colored
from retro_jax.generation.live_retrieval import LiveRetriever
from retro_jax.retrieval.database import VOCABULARY, ChunkDatabase
from retro_jax.retrieval.embedders import BertEmbedder, LexicalEmbedder, RandomEmbedder
from retro_jax.retrieval.sharded_index import Index

CONFIGURABLES = (Selection, BertEmbedder, LexicalEmbedder, RandomEmbedder)


@dataclasses.dataclass(frozen=True)
class InspectNeighborsJob:
  """What to look at.

  Attributes:
    examples: folder of the records whose chunks are shown.
    queries, database: their stores; '' for where these were when the records were made.
    text: typed text to retrieve for instead; needs `database`, `index` and `embedder`.
    index: folder of the index over `database`.
    embedder: what `database` was built with.
    selection: which chunks of the records.
    num_neighbors: how many neighbours to show of each.
    near_duplicate: from which share of m in one common run a neighbour is flagged.
    color: 'always', 'never', or 'auto': when a person looks at it.
    page: HTML file to write as well; '' for none.
  """
  examples: str = ''
  queries: str = ''
  database: str = ''
  text: str = ''
  index: str = ''
  embedder: Any = None
  selection: Selection = Selection()
  num_neighbors: int = 2
  near_duplicate: float = 0.5
  color: str = 'auto'
  page: str = ''

  def __post_init__(self):
    if self.color not in ('auto', 'always', 'never'):
      raise UserError(f"color is {self.color!r}; expected 'auto', 'always' or 'never'")
    if self.num_neighbors < 1:
      raise UserError(f'num_neighbors is {self.num_neighbors}, expected at least 1')
    if self.text and not (self.database and self.index):
      raise UserError('text is retrieved for in a database by its index; set database and index')
    if not self.text and not self.examples:
      raise UserError('nothing to look at; set examples to a folder of records, or text')


def run(job: InspectNeighborsJob) -> None:
  """Finds the chunks, prints them and writes the page."""
  if job.text:
    database = ChunkDatabase.open(job.database)
    vocabulary = Vocabulary.load(database.folder / VOCABULARY)
    retriever = LiveRetriever(database, Index.open(job.index, database), job.embedder, vocabulary,
                              job.num_neighbors)
    chunks = inspection.inspect_text(job.text, retriever, vocabulary, job.near_duplicate)
    facts = {'database': job.database, 'index': job.index}
  else:
    stored = StoredChunks(job.examples, job.queries, job.database)
    database = stored.database
    vocabulary = Vocabulary.load(database.folder / VOCABULARY)
    places = inspection.choose(stored, job.selection, job.num_neighbors)
    chunks = inspection.inspect_stored(stored, places, job.num_neighbors, job.near_duplicate)
    facts = {'examples': job.examples, 'queries': stored.queries.folder,
             'database': database.folder, 'chosen': _chosen(job.selection)}
  print(inspection_views.terminal(chunks, vocabulary, colored(job.color)), end='', flush=True)
  if job.page:
    inspection_views.page(job.page, chunks, vocabulary, facts)
    print(f'page: {job.page}')


def _chosen(selection: Selection) -> str:
  if selection.chunks:
    return 'by number'
  if selection.document:
    return f'the first chunks of document {selection.document}'
  if selection.choose == 'random':
    return f'at random, seed {selection.seed}'
  return (f'the {selection.choose} overlapping of a sample of {selection.sample:,}, '
          f'seed {selection.seed}')


if __name__ == '__main__':
  configuration.main(InspectNeighborsJob, run, CONFIGURABLES)
