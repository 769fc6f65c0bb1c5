"""Continue a prompt: python -m retro_jax.generate --gin_file=... [--gin.NAME=VALUE ...]."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from retro_jax import configuration
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.errors import UserError
from retro_jax.evaluation.visible import colored
from retro_jax.generation import views
from retro_jax.generation.decode import generate
from retro_jax.generation.live_retrieval import LiveRetriever
from retro_jax.generation.written import Generation
from retro_jax.models.config import RetroConfig
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.embedders import BertEmbedder, LexicalEmbedder, RandomEmbedder
from retro_jax.retrieval.sharded_index import Index
from retro_jax.training.checkpoints import load_model

CONFIGURABLES = (BertEmbedder, LexicalEmbedder, RandomEmbedder)


@dataclasses.dataclass(frozen=True)
class GenerateJob:
  """What to continue, and with which model, database and settings.

  Attributes:
    run_dir: folder of a training run or of an exported model.
    vocabulary: SentencePiece model that the model was trained with.
    prompt: to continue.
    retrieval: False reads no neighbours; the next three are then not needed.
    database: folder of the chunk database.
    index: folder of the index over it.
    embedder: the one the database was built with.
    num_neighbors: k; 0 for as many as in training.
    max_new_tokens: at most so many are written.
    temperature: 0 always takes the likeliest token.
    top_k: samples among so many likeliest tokens; 0 for all.
    top_p: samples among the likeliest tokens that hold this probability; 1 for all.
    seed: another one, another text.
    sequence_length: the most tokens the model looks at; that of training is best.
    stop: strings before the first of which the text ends.
    retrieval_step: neighbours are found anew after so many written tokens; 0 for each chunk.
    left_pad: a prompt is moved right so that it ends a chunk, and the first token that is written
      already reads its neighbours.
    output: file to write it all to as well: .json, .html or .txt; '' for none.
    color: 'always', 'never', or 'auto': when a person looks at it.
  """
  run_dir: str
  vocabulary: str
  prompt: str
  retrieval: bool = True
  database: str = ''
  index: str = ''
  embedder: Any = BertEmbedder()
  num_neighbors: int = 0
  max_new_tokens: int = 64
  temperature: float = 0.7
  top_k: int = 0
  top_p: float = 0.9
  seed: int = 0
  sequence_length: int = 0
  stop: Sequence[str] = ()
  retrieval_step: int = 0
  left_pad: bool = False
  output: str = ''
  color: str = 'auto'

  def __post_init__(self):
    if self.color not in ('auto', 'always', 'never'):
      raise UserError(f"color is {self.color!r}; expected 'auto', 'always' or 'never'")
    views.check_path(self.output)


def run(job: GenerateJob) -> Generation:
  """Loads everything, continues the prompt and prints what was written and read.

  Raises:
    UserError: a part is missing, or parts that do not belong together.
  """
  model, parameters, vocabulary, retriever = load_parts(job)
  result = generate(model, parameters, vocabulary, retriever, job.prompt, job.max_new_tokens,
                    job.temperature, job.top_k, job.top_p, job.seed, job.sequence_length,
                    job.stop, job.retrieval_step, job.left_pad)
  print(views.terminal(result, vocabulary, colored(job.color)))
  if job.output:
    views.write(job.output, result, vocabulary)
    print(f'written to {job.output}')
  return result


def load_parts(job: Any) -> tuple[RetroConfig, dict[str, Any], Vocabulary, LiveRetriever | None]:
  """The model's config and parameters, its vocabulary and, if it reads neighbours, who finds them.

  Args:
    job: with `run_dir`, `vocabulary`, `retrieval`, `database`, `index`, `embedder` and
      `num_neighbors` of `GenerateJob`.

  Raises:
    UserError: a part is missing, or parts that do not belong together.
  """
  model, parameters, vocabulary = load_text_model(job.run_dir, job.vocabulary)
  retriever = None
  if job.retrieval and model.has_retrieval:
    kind = type(job).__name__
    for name in ('database', 'index'):
      if not getattr(job, name):
        raise UserError(f'{kind}.{name} is empty; name its folder or set {kind}.retrieval = False')
    retriever = open_retriever(job.database, job.index, job.embedder, vocabulary,
                               job.num_neighbors or model.num_neighbors)
  elif job.retrieval:
    print(f'{job.run_dir}: a baseline, which has no layers that read neighbours')
  return model, parameters, vocabulary, retriever


def load_text_model(run_dir: str, vocabulary_path: str
                    ) -> tuple[RetroConfig, dict[str, Any], Vocabulary]:
  """A model's config and parameters, and its vocabulary.

  Raises:
    UserError: one of them is missing, or the vocabulary is another than that of the training.
  """
  model, parameters, facts = load_model(run_dir)
  vocabulary = Vocabulary.load(vocabulary_path)
  if facts['fingerprint'] != vocabulary.fingerprint:
    raise UserError(f'{run_dir} was trained with vocabulary {facts["fingerprint"]}, but '
                    f'{vocabulary_path} is {vocabulary.fingerprint}; give the one of the training')
  return model, parameters, vocabulary


def open_retriever(database: str, index: str, embedder: Any, vocabulary: Vocabulary,
                   num_neighbors: int) -> LiveRetriever:
  """Who finds neighbours in a database on the disk.

  Raises:
    UserError: a part is missing, or parts that do not belong together.
  """
  opened = ChunkDatabase.open(database)
  return LiveRetriever(opened, Index.open(index, opened), embedder, vocabulary, num_neighbors)


def main() -> None:
  configuration.main(GenerateJob, run, CONFIGURABLES)


if __name__ == '__main__':
  main()
