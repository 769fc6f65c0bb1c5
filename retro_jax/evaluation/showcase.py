"""What a person looks at after a run: chunks beside their neighbours, and a sample.

Choosing the held-out sequences and running the model on them lives here; how a page looks
is in report_page.py, how text is generated in generation/.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from retro_jax.data import batches, records
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.evaluation import report_page
from retro_jax.generation.decode import generate
from retro_jax.generation.live_retrieval import LiveRetriever
from retro_jax.generation.written import Generation
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.sharded_index import Index
from retro_jax.training import step
from retro_jax.training.checkpoints import load_model

_TASK = 'shown'


def neighbors_page(path: str | os.PathLike, model_folder: str, examples_folder: str,
                   queries: ChunkDatabase, database: ChunkDatabase, vocabulary: Vocabulary,
                   results: Mapping[str, Any], sequences: int = 8) -> None:
  """Writes the page for `sequences` held-out sequences, evenly spread over the examples.

  Args:
    path: of the HTML file.
    model_folder: RETRO whose bits per chunk, with and without neighbours, are shown.
    examples_folder: retrieval examples of `queries` with neighbours from `database`.
    queries, database: the stores.
    vocabulary: of all tokens.
    results: as in `results.json`; its numbers head the page.
    sequences: how many to show.
  """
  from retro_jax.data import tasks  # brings TensorFlow
  model, parameters, _ = load_model(model_folder)
  tasks.register_task(_TASK, examples_folder, model.num_neighbors)
  examples = records.Examples(examples_folder)
  wanted = np.unique(np.linspace(0, len(examples) - 1, min(sequences, len(examples))).astype(int))
  score = {retrieval: jax.jit(lambda p, b, on=retrieval: step.token_losses(model, p, b, on))
           for retrieval in (False, True)}
  pages = []
  for number in wanted.tolist():
    batch = next(batches.batches(_TASK, 1, start_step=number, num_steps=1, shuffle=False))
    inputs = {name: batch[name] for name in step.batch_inputs(model)}
    bits = {on: report_page.bits_of_chunks(
        np.asarray(run(parameters, inputs))[0] / math.log(2), model.chunk_length)
            for on, run in score.items()}
    example = {name: value[0] for name, value in examples.read([number]).items()}
    pages.append(report_page.page_chunks(example, queries, database, model.num_neighbors,
                                         bits[False], bits[True]))
  report_page.neighbors_page(
      path, pages, vocabulary, database=f'{database.num_chunks:,} chunks of '
      f'{database.num_documents:,} documents',
      settings={'model': model_folder, 'chunk length m': model.chunk_length,
                'neighbours k': model.num_neighbors, 'held-out sequences shown': len(wanted)},
      results=results)


def sample(model_folder: str, queries: ChunkDatabase, database: ChunkDatabase,
           index_folder: str | os.PathLike, embedder: Any, vocabulary: Vocabulary,
           max_new_tokens: int, sequence_length: int, prompt_chunks: int = 2) -> Generation:
  """Continues the beginning of a held-out document with live retrieval, greedily.

  The document is the first with more than `prompt_chunks` + 1 chunks.
  """
  model, parameters, _ = load_model(model_folder)
  document = next((o for o in range(queries.num_documents)
                   if queries.document_info(o)['num_chunks'] > prompt_chunks + 1), 0)
  first = queries.document_info(document)['first_chunk']
  tokens = queries.tokens(np.arange(first, first + prompt_chunks))
  prompt = vocabulary.decode(tokens.ravel().tolist())
  retriever = LiveRetriever(database, Index.open(index_folder, database),
                            embedder, vocabulary, model.num_neighbors)
  return generate(model, parameters, vocabulary, retriever, prompt, max_new_tokens, temperature=0.0,
                  sequence_length=sequence_length)
