"""Questions as training and evaluation examples: python tools/build_qa_examples.py --gin_file=... .

Does nothing where they are there already. The work is in retro_jax/retrieval/question_examples.py.
"""

import dataclasses
from typing import Any

from retro_jax import configuration
from retro_jax.data.questions import QuestionFiles
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.errors import UserError
from retro_jax.retrieval import question_examples
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.embedders import BertEmbedder, LexicalEmbedder, RandomEmbedder
from retro_jax.retrieval.question_examples import OwnPassages, QuestionConfig
from retro_jax.retrieval.question_passages import DatabasePassages
from retro_jax.retrieval.sharded_index import Index

CONFIGURABLES = (QuestionFiles, QuestionConfig, BertEmbedder, LexicalEmbedder, RandomEmbedder)


@dataclasses.dataclass(frozen=True)
class BuildQaExamplesJob:
  """What to build, from what.

  Attributes:
    examples: folder of the records.
    questions: the files.
    vocabulary: SentencePiece model of the model that is to be trained.
    database: folder of the chunk database to find passages in; '' takes those that came with the
      questions.
    index: folder of the index over it.
    embedder: the one it was built with; a BM25 index needs none.
    config: lengths and numbers.
  """
  examples: str
  questions: QuestionFiles
  vocabulary: str
  database: str = ''
  index: str = ''
  embedder: Any = None
  config: QuestionConfig = QuestionConfig()

  def __post_init__(self):
    if bool(self.database) != bool(self.index):
      raise UserError('passages are found in a database by its index; set both or neither')


def run(job: BuildQaExamplesJob) -> None:
  """Opens everything and writes the records."""
  passages: Any = OwnPassages()
  if job.database:
    database = ChunkDatabase.open(job.database)
    passages = DatabasePassages(database, Index.open(job.index, database), job.embedder,
                                job.config.num_passages)
  question_examples.build(
      job.examples, job.questions, passages, Vocabulary.load(job.vocabulary), job.config)


if __name__ == '__main__':
  configuration.main(BuildQaExamplesJob, run, CONFIGURABLES)
