"""Continue a prompt: python -m retro_jax.generate --gin_file=... [--gin.NAME=VALUE ...]."""

import dataclasses
from typing import Any

from retro_jax import configuration
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.errors import UserError
from retro_jax.generation.decode import Generation, generate
from retro_jax.generation.live_retrieval import LiveRetriever
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


def run(job: GenerateJob) -> Generation:
  """Loads everything, continues the prompt and prints what was written and read.

  Raises:
    UserError: a part is missing, or parts that do not belong together.
  """
  model, parameters, facts = load_model(job.run_dir)
  vocabulary = Vocabulary.load(job.vocabulary)
  if facts['fingerprint'] != vocabulary.fingerprint:
    raise UserError(f'{job.run_dir} was trained with vocabulary {facts["fingerprint"]}, but '
                    f'{job.vocabulary} is {vocabulary.fingerprint}; give the one of the training')
  retriever = None
  if job.retrieval and model.has_retrieval:
    for name in ('database', 'index'):
      if not getattr(job, name):
        raise UserError(f'GenerateJob.{name} is empty; name its folder or set '
                        'GenerateJob.retrieval = False')
    database = ChunkDatabase.open(job.database)
    retriever = LiveRetriever(database, Index.open(job.index, database),
                              job.embedder, vocabulary, job.num_neighbors or model.num_neighbors)
  elif job.retrieval:
    print(f'{job.run_dir}: a baseline, which has no layers that read neighbours')
  result = generate(model, parameters, vocabulary, retriever, job.prompt, job.max_new_tokens,
                    job.temperature, job.top_k, job.top_p, job.seed, job.sequence_length)
  print(describe(result))
  return result


def describe(result: Generation) -> str:
  """A generation as text for a terminal: prompt and continuation, then what was read where."""
  ending = 'the model ended the document' if result.ended else 'cut off'
  lines = ['prompt', _indented(result.prompt), '',
           f'continuation ({len(result.tokens)} tokens, {ending})', _indented(result.text)]
  if any(chunk.neighbors for chunk in result.chunks):
    lines += ['', 'neighbours']
  for number, chunk in enumerate(result.chunks, start=1):
    if not chunk.neighbors:
      continue
    lines.append(
        f'  chunk {number} {_first_line(chunk.text)!r} found, and chunk {number + 1} read:')
    for neighbor in chunk.neighbors:
      lines.append(f'    {neighbor.distance:8.3f}  {neighbor.title or neighbor.document_id}  '
                   f'{_first_line(neighbor.text)!r}')
  return '\n'.join(lines)


def _indented(text: str) -> str:
  return '\n'.join('  ' + line for line in text.split('\n'))


def _first_line(text: str, longest: int = 60) -> str:
  """The first line that says something, shortened."""
  line = next((line.strip() for line in text.splitlines() if line.strip()), '')
  return line if len(line) <= longest else line[:longest - 1] + '…'


def main() -> None:
  configuration.main(GenerateJob, run, CONFIGURABLES)


if __name__ == '__main__':
  main()
