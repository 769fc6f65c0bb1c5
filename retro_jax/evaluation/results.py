"""`results.json`: numbers together with what they were measured on, and by which command."""

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro_jax import storage
from retro_jax.data import records
from retro_jax.evaluation.bits_per_byte import Score, gain_interval
from retro_jax.retrieval.database import ChunkDatabase

RESULTS = 'results.json'


def rows(scores: Mapping[str, Score], source: str, num_neighbors: int) -> list[dict[str, Any]]:
  """One row a setting, with its 95 % bootstrap interval over documents."""
  result = []
  for setting, score in scores.items():
    low, high = score.interval()
    row = {'setting': setting, 'source': source, 'bits_per_byte': score.bits_per_byte, 'low': low,
           'high': high, 'bytes': int(score.text_bytes.sum()), 'tokens': int(score.tokens.sum()),
           'documents': len(score.bits)}
    if setting in ('retro_on', 'retro_random'):
      row['k'] = num_neighbors
    result.append(row)
  return result


def by_source(scores: Mapping[str, Score], store: ChunkDatabase) -> dict[str, dict[str, float]]:
  """bits-per-byte of each source of documents, by setting, and the source's `bytes`."""
  any_score = next(iter(scores.values()))
  ordinals: dict[str, list[int]] = {}
  for ordinal in any_score.ordinals.tolist():
    ordinals.setdefault(store.document_info(ordinal)['source'], []).append(ordinal)
  return {source: {'bytes': int(any_score.of(ids).text_bytes.sum()),
                   **{setting: score.of(ids).bits_per_byte for setting, score in scores.items()}}
          for source, ids in sorted(ordinals.items())}


def gains(scores: Mapping[str, Score]) -> dict[str, dict[str, float]]:
  """How far retro_on is below the other settings, as a fraction, with a paired 95 % interval."""
  result = {}
  on = scores.get('retro_on')
  for setting, score in scores.items():
    if on is not None and setting != 'retro_on':
      low, high = gain_interval(on, score)
      gain = 1 - on.bits.sum() / score.bits.sum()
      result[f'over_{setting}'] = {'gain': gain, 'low': low, 'high': high}
  return result


def examples_facts(folder: str | Path) -> dict[str, Any]:
  """Which text, which database and which policy a folder of examples stands for."""
  manifest = storage.read_manifest(folder, records.KIND)
  keys = ('neighbors', 'policy', 'queries', 'database', 'index', 'vocabulary', 'sequence_length',
          'chunk_length')
  return {key: manifest[key] for key in keys}


def write(folder: str | Path, config: Any, body: Mapping[str, Any]) -> Path:
  """Writes `results.json` with the job's config and the command beside the numbers."""
  path = Path(folder) / RESULTS
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.write_json(path, {'command': command(), 'config': dataclasses.asdict(config), **body})
  return path


def command() -> str:
  """The command line of this process as a person would type it."""
  spec = sys.modules['__main__'].__spec__
  program = ['-m', spec.name] if spec else [sys.argv[0]]
  return shlex.join(['python', *program, *sys.argv[1:]])
