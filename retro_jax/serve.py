"""Serve a model over HTTP: python -m retro_jax.serve --gin_file=... [--gin.NAME=VALUE ...].

Completions in OpenAI's shape, a page, metrics; ends with exit code 0 on SIGTERM, after the answers
under way. See docs/serving.md.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from retro_jax import configuration
from retro_jax.errors import UserError
from retro_jax.generate import load_text_model, open_retriever
from retro_jax.generation.engine import Engine
from retro_jax.retrieval.embedders import BertEmbedder, LexicalEmbedder, RandomEmbedder
from retro_jax.serving import app, server
from retro_jax.serving.limits import LimitsConfig
from retro_jax.serving.protocol import Served
from retro_jax.serving.service import Service


@dataclasses.dataclass(frozen=True)
class ServeJob:
  """What to serve, where, and within which limits.

  Attributes:
    run_dir: folder of a training run or of an exported model.
    vocabulary: SentencePiece model that the model was trained with.
    databases: by name, each (folder of the chunk database, folder of its index) or, where the
      embedder is not the common one, (database, index, embedder); the first is the default.
      Empty: nothing is retrieved.
    embedder: the one the databases were built with.
    num_neighbors: k, the most a request may ask for; 0 for as many as in training.
    sequence_length: the most tokens the model looks at; that of training is best.
    slots: requests worked on at a time, for each database.
    host, port: to listen at; port 0 takes a free one.
    model_name: what requests call the model; '' for the name of its folder.
    limits: of requests.
  """
  run_dir: str
  vocabulary: str
  databases: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
  embedder: Any = BertEmbedder()
  num_neighbors: int = 0
  sequence_length: int = 0
  slots: int = 8
  host: str = '127.0.0.1'
  port: int = 8000
  model_name: str = ''
  limits: LimitsConfig = LimitsConfig()

  def __post_init__(self):
    if not isinstance(self.databases, Mapping):
      raise UserError(f"databases is {self.databases!r}, expected {{'NAME': (DATABASE, INDEX)}}")
    for name, parts in self.databases.items():
      if (not isinstance(name, str) or not name or isinstance(parts, str)
          or not isinstance(parts, Sequence) or len(parts) not in (2, 3)):
        raise UserError(f'databases: {name!r}: {parts!r}, expected a name and (DATABASE, INDEX) or '
                        '(DATABASE, INDEX, EMBEDDER)')


def load(job: ServeJob) -> tuple[Service, int]:
  """The service, not yet started, and the model's chunk length.

  Raises:
    UserError: a part is missing, or parts that do not belong together.
  """
  model, parameters, vocabulary = load_text_model(job.run_dir, job.vocabulary)
  retrievers = {name: open_retriever(folder, index, *(own or [job.embedder]), vocabulary,
                                     job.num_neighbors or model.num_neighbors)
                for name, (folder, index, *own) in job.databases.items()}
  # The engines share the parameters and the compiled programs; each has caches of its own.
  engines = {name: Engine(model, parameters, vocabulary, retriever, slots=job.slots,
                          window=job.sequence_length)
             for name, retriever in (retrievers or {'': None}).items()}
  name = job.model_name or os.path.basename(os.path.normpath(job.run_dir))
  k = max((retriever.num_neighbors for retriever in retrievers.values()), default=0)
  served = Served(name, tuple(retrievers), k, job.limits.max_tokens)
  return Service(served, vocabulary, engines, job.limits), model.chunk_length


def run(job: ServeJob) -> None:
  """Serves until a signal.

  Raises:
    UserError: a part is missing, parts that do not belong together, or an address in use.
  """
  with server.listen(job.host, job.port) as listener:
    service, chunk_length = load(job)
    service.start(chunk_length)
    host, port = listener.getsockname()[:2]
    shown = f'[{host}]' if ':' in host else host
    databases = ', '.join(service.served.databases) or 'no database'
    print(f'serving {service.served.model} at http://{shown}:{port}/ with {databases}; SIGTERM '
          'ends it', flush=True)
    loopback = host == '::1' or host.startswith('127.')
    server.run(app.make_app(service, loopback), listener, job.limits)
  print('ended', flush=True)


def main() -> None:
  configuration.main(ServeJob, run, (LimitsConfig, BertEmbedder, LexicalEmbedder, RandomEmbedder))


if __name__ == '__main__':
  main()
