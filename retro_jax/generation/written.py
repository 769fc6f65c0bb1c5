"""What a generation is: text, tokens, and chunk by chunk the neighbours that were read.

Who makes it: engine.py. How it is shown: views.py. What it is measured by: faithfulness.py.
"""

import dataclasses

from retro_jax.data.vocabulary import PAD_ID, Vocabulary
from retro_jax.generation.live_retrieval import FoundNeighbors, LiveRetriever


@dataclasses.dataclass(frozen=True)
class Neighbor:
  """One neighbour as a person reads it.

  Attributes:
    chunk_id: in the database.
    document_id, title: of the document it lies in.
    distance: squared L2 between embeddings.
    text: of the neighbour N.
    continuation: text of F, which follows N in its document; '' at the document's end.
    tokens: ids of N, then those of F, without padding.
    length: how many of them are N's.
  """

  chunk_id: int
  document_id: str
  title: str
  distance: float
  text: str
  continuation: str
  tokens: tuple[int, ...]
  length: int


@dataclasses.dataclass(frozen=True)
class ChunkRecord:
  """A chunk of [bos] + prompt + continuation.

  Attributes:
    tokens: at most m ids; fewer in the last chunk, in the first one if the prompt was padded, and
      where neighbours were found more often than once a chunk.
    text: that they stand for.
    neighbors: RET of the m tokens that end here, which the model read while it wrote the chunk
      after it; () where nothing was retrieved (retrieval off, chunk incomplete or the end).
  """

  tokens: tuple[int, ...]
  text: str
  neighbors: tuple[Neighbor, ...]


@dataclasses.dataclass(frozen=True)
class Generation:
  """A prompt continued.

  Attributes:
    prompt: as given.
    text: the continuation, without the prompt; up to a stop string if one was written.
    tokens: ids of the continuation, without eos; with those of a stop string.
    ended: whether the model ended the document itself.
    chunks: prompt and continuation, chunk by chunk.
    reason: why it ended: 'eos', 'length', 'stop' or 'cancelled'.
  """

  prompt: str
  text: str
  tokens: tuple[int, ...]
  ended: bool
  chunks: tuple[ChunkRecord, ...]
  reason: str = 'length'


def describe_neighbors(found: FoundNeighbors, retriever: LiveRetriever, vocabulary: Vocabulary
                       ) -> tuple[Neighbor, ...]:
  """The neighbours that exist, as text."""
  database, m = retriever.database, retriever.chunk_length
  described = []
  for chunk, distance, tokens in zip(found.ids.tolist(), found.distances, found.tokens.tolist()):
    if chunk < 0:
      continue
    document = database.document_info(int(database.document(chunk)))
    described.append(Neighbor(
        chunk, document['id'], document['title'], float(distance), vocabulary.decode(tokens[:m]),
        vocabulary.decode(tokens[m:]), tuple(t for t in tokens if t != PAD_ID),
        sum(t != PAD_ID for t in tokens[:m])))
  return tuple(described)
