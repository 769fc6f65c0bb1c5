"""Repetition, copying and faithfulness of a model's texts: python tools/measure_generation.py.

Continues each of many prompts with retrieval on and off, and writes results.json: the measures
of every text (retro_jax/generation/faithfulness.py) and their means.
"""

import dataclasses
import itertools
import statistics
from pathlib import Path
from typing import Any

from retro_jax import configuration
from retro_jax.data.corpus import JsonLines
from retro_jax.errors import UserError
from retro_jax.evaluation import results
from retro_jax.generate import load_parts
from retro_jax.generation import faithfulness
from retro_jax.generation.engine import Engine
from retro_jax.generation.requests import Request
from retro_jax.retrieval.embedders import BertEmbedder, LexicalEmbedder, RandomEmbedder

CONFIGURABLES = (JsonLines, BertEmbedder, LexicalEmbedder, RandomEmbedder)


@dataclasses.dataclass(frozen=True)
class MeasureGenerationJob:
  """What to continue with what.

  Attributes:
    run_dir, vocabulary, database, index, embedder, num_neighbors: as in `GenerateJob`.
    prompts: a corpus; the first tokens of each document are a prompt.
    output: folder of results.json.
    prompt_tokens: how many tokens; 0 for all of a document.
    count: how many prompts; 0 for all.
    max_new_tokens, temperature, top_k, top_p, seed: of each text, as in `GenerateJob`.
    sequence_length: the most tokens the model looks at; 0 for 32 chunks.
    slots: texts that are written at a time.
  """
  run_dir: str
  vocabulary: str
  database: str
  index: str
  prompts: Any
  output: str
  embedder: Any = BertEmbedder()
  num_neighbors: int = 0
  prompt_tokens: int = 64
  count: int = 32
  max_new_tokens: int = 128
  temperature: float = 0.7
  top_k: int = 0
  top_p: float = 0.9
  seed: int = 0
  sequence_length: int = 0
  slots: int = 8

  @property
  def retrieval(self) -> bool:
    """Both are measured."""
    return True


def run(job: MeasureGenerationJob) -> None:
  """Writes the texts, measures them and prints the means."""
  config, parameters, vocabulary, retriever = load_parts(job)
  if retriever is None:
    raise UserError(f'{job.run_dir}: a baseline reads no neighbours; name a RETRO model')
  engine = Engine(config, parameters, vocabulary, retriever, slots=job.slots,
                  window=job.sequence_length)
  streams = []
  for document in itertools.islice(job.prompts.documents(), job.count or None):
    tokens = vocabulary.encode(document.text)[:job.prompt_tokens or None]
    request = Request(vocabulary.decode(tokens), job.max_new_tokens, job.temperature, job.top_k,
                      job.top_p, job.seed)
    off = dataclasses.replace(request, retrieval=False)
    streams.append((document.id, engine.submit(request), engine.submit(off)))
  engine.run()
  rows: list[dict[str, Any]] = []
  for name, *pair in streams:
    on, off = (stream.result() for stream in pair)
    rows += [{'prompt': name, 'retrieval': 'on', **dataclasses.asdict(faithfulness.measure(on))},
             {'prompt': name, 'retrieval': 'off',
              **dataclasses.asdict(faithfulness.measure(off, against=on))}]
  means = {setting: {
      field.name: statistics.fmean(row[field.name] for row in rows if row['retrieval'] == setting)
      for field in dataclasses.fields(faithfulness.Measures)} for setting in ('on', 'off')}
  path = results.write(job.output, job, {'means': means, 'rows': rows})
  print(f'means over {len(streams)} prompts; neighbours are those that retrieval found')
  print(f'{"":16}' + ''.join(f'{setting:>10}' for setting in means))
  for name in means['on']:
    print(f'{name:16}' + ''.join(f'{mean[name]:10.3f}' for mean in means.values()))
  print(f'numbers in {Path(path)}')


if __name__ == '__main__':
  configuration.main(MeasureGenerationJob, run, CONFIGURABLES)
