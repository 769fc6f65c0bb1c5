"""`results.json`: numbers together with what they were measured on, and by which command."""

import dataclasses
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from retro_jax import storage
from retro_jax.data import records
from retro_jax.data.windows import Documents
from retro_jax.errors import UserError
from retro_jax.evaluation.ablations import Setting
from retro_jax.evaluation.bits_per_byte import Score, gain_interval
from retro_jax.retrieval.database import ChunkDatabase

RESULTS = 'results.json'


def row(setting: Setting, score: Score, source: str) -> dict[str, Any]:
  """The row of one setting over some documents, with its 95 % bootstrap interval over them."""
  low, high = score.interval()
  result = {'setting': setting.name, 'source': source, 'bits_per_byte': score.bits_per_byte,
            'low': low, 'high': high, 'bytes': int(score.text_bytes.sum()),
            'tokens': int(score.tokens.sum()), 'documents': len(score.bits)}
  if setting.sweep:
    result['sweep'] = setting.sweep
  if setting.reading.num_neighbors or setting.sweep == 'neighbors':
    result['k'] = setting.reading.num_neighbors
    result['examples'] = setting.examples
    fraction = examples_facts(setting.examples)['policy'].get('database_fraction', 1.0)
    result['database_fraction'] = fraction
  return result


def sweep_rows(settings: Iterable[Setting], scores: Mapping[str, Score], source: str
               ) -> list[dict[str, Any]]:
  """A row a setting; with its `gain` over retro_off and the paired interval of that."""
  result = []
  off = scores.get('retro_off')
  for setting in settings:
    made = row(setting, scores[setting.name], source)
    if off is not None and setting.reading.num_neighbors:
      low, high = gain_interval(scores[setting.name], off)
      made |= {'gain': 1 - scores[setting.name].bits.sum() / off.bits.sum(), 'gain_low': low,
               'gain_high': high}
    result.append(made)
  return result


def rows_by_source(settings: Iterable[Setting], scores: Mapping[str, Score],
                   store: ChunkDatabase) -> list[dict[str, Any]]:
  """A row for each setting and source of documents, where there are several sources."""
  settings = list(settings)
  parts = ordinals_by_source(scores[settings[0].name], store)
  if len(parts) < 2:
    return []
  return [row(setting, scores[setting.name].of(ids), source)
          for source, ids in parts.items() for setting in settings]


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
  ordinals = ordinals_by_source(any_score, store)
  return {source: {'bytes': int(any_score.of(ids).text_bytes.sum()),
                   **{setting: score.of(ids).bits_per_byte for setting, score in scores.items()}}
          for source, ids in ordinals.items()}


def ordinals_by_source(score: Score, store: ChunkDatabase) -> dict[str, list[int]]:
  """Ordinals of the scored documents by their source, sources in order."""
  result: dict[str, list[int]] = {}
  for ordinal in score.ordinals.tolist():
    result.setdefault(store.document_info(ordinal)['source'], []).append(ordinal)
  return dict(sorted(result.items()))


def query_store(examples: str | Path, folder: str = '') -> tuple[ChunkDatabase | None, str]:
  """The store of the texts that examples were made of, and if it is not there, why.

  Args:
    examples: folder of examples.
    folder: of the store; '' looks where it was when they were made.

  Raises:
    UserError: `folder` is given and not that store.
  """
  return _store(examples_facts(examples)['queries'], folder)


def _store(handle: Mapping[str, str], folder: str = '') -> tuple[ChunkDatabase | None, str]:
  try:
    store = ChunkDatabase.open(folder or handle['folder'])
  except UserError as error:
    if folder:
      raise
    return None, str(error)
  if store.fingerprint != handle['fingerprint']:
    why = (f'{store.folder} holds {store.fingerprint}, the examples were made of '
           f'{handle["fingerprint"]}')
    if folder:
      raise UserError(f'{why}; name the store they were made of')
    return None, why
  return store, ''


def in_database(examples: str | Path, queries: ChunkDatabase, documents: Documents
                ) -> tuple[dict[str, Any], list[str]]:
  """Whether the scored text could be in the database, and sentences on what is not known.

  By the ids of documents; text that is there under another id is what leakage curves show.
  """
  facts = examples_facts(examples)
  policy = facts['policy']
  result = {'same_store': facts['queries']['fingerprint'] == facts['database']['fingerprint'],
            'exclude_query_documents': policy['exclude_query_documents'],
            'near_duplicate_chunks': policy['near_duplicate_chunks'],
            'near_duplicate_documents': policy['near_duplicate_documents']}
  database, why = _store(facts['database'])
  if database is None:
    return result, [f'evaluation documents in the database: {why}']
  counts = database.manifest['counts']
  result |= {'database_documents': counts['documents'], 'database_chunks': counts['chunks'],
             'database_tokens': counts['tokens']}
  ids = (queries.document_info(ordinal)['id'] for ordinal in documents.ordinals.tolist())
  result['evaluated_documents_in_it'] = sum(database.ordinal_of(i) is not None for i in ids)
  return result, []


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
