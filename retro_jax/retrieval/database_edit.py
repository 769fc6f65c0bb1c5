"""Taking documents out of a finished store, and finding what was damaged in any artefact.

Removing writes a list that every search honours at once; compacting rewrites the shards that
still hold the text, without embedding anything anew. Building is database_build.py's.
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax import files, storage
from retro_jax.errors import UserError
from retro_jax.retrieval import database as database_lib
from retro_jax.retrieval import database_build, stages
from retro_jax.retrieval.database import CHUNKS_KIND, EMBEDDINGS_KIND, REMOVED, ChunkDatabase, Shard

_COMPACTED, _COMPACTED_KIND = 'compacted', 'compacted-input'


def remove_documents(folder: str | os.PathLike, document_ids: Iterable[str]) -> int:
  """Makes documents unfindable at once; their text stays on the disk until `compact`.

  Args:
    folder: of the store.
    document_ids: ids; those already removed count as done.

  Returns:
    how many documents of the store are newly removed.

  Raises:
    UserError: the store has no document of an id; then none is removed.
  """
  _refuse_remote(folder)
  with storage.locked(folder):
    database = ChunkDatabase.open(folder)
    removed = set(database_lib.read_removed(folder))
    wanted = set(document_ids) - removed
    for document in sorted(wanted):
      if database.ordinal_of(document) is None:
        raise UserError(f'{folder}: no document {document!r}; nothing was removed')
    content = {'documents': sorted(removed | wanted)}
    storage.write_json(Path(folder) / REMOVED,
                       {**content, 'checksum': storage.fingerprint(content)})
  return len(wanted)


def compact(
    folder: str | os.PathLike, runner: stages.Runner = stages.HERE) -> int:
  """Rewrites every shard that holds a removed document, and empties the list of removals.

  Only sha256 sums of the removed ids are kept, so that a later build from a source that still
  has those documents leaves them out. When killed, a second call goes on.

  Returns:
    how many documents were taken out.

  Raises:
    UserError: no store there, or nothing would be left of it.
  """
  _refuse_remote(folder)
  with stages.building_in(folder, runner):
    removed = database_lib.read_removed(folder)
    before = database_build.existing_manifest(folder)
    if not removed or not before:
      return 0
    if len(removed) >= before['counts']['documents']:
      raise UserError(f'{folder}: all {len(removed):,} documents are removed; delete the folder')
    for started in sorted((Path(folder) / _COMPACTED).glob('*/')):
      _swap(folder, started)
    affected = _inputs_with(folder, before, set(removed))
    if affected:
      database_build.withdraw(folder)
    tasks = [stages.Task(
        folder=str(Path(folder) / _COMPACTED / name), kind=_COMPACTED_KIND,
        inputs={'removed': storage.fingerprint(removed)},
        make=functools.partial(_make_compacted, str(folder), name, frozenset(removed)))
             for name in affected]
    runner.run('compaction', tasks, 'inputs')
    if runner.leads:
      for task in tasks:
        _swap(folder, Path(task.folder))
      _publish(folder, before, runner)
  return len(removed)


def _refuse_remote(folder: str | os.PathLike) -> None:
  if files.is_remote(folder):
    raise UserError(f'{folder}: documents are removed from stores on a disk; copy the store, '
                    'remove there, and copy it back')


def _inputs_with(
    folder: str | os.PathLike, before: Mapping[str, Any], removed: set[str]) -> list[str]:
  """Names of the inputs that still hold a removed document."""
  names = []
  for name in dict.fromkeys(shard['input'] for shard in before['shards']):
    tables = (Path(folder) / 'chunks' / name).glob('*/documents.jsonl')
    if any(json.loads(line)['id'] in removed for table in tables for line in open(table, 'rb')):
      names.append(name)
  return names


def _make_compacted(
    database: str, name: str, removed: frozenset[str], folder: Path, manifest: dict[str, Any]
) -> None:
  """Copies one input, chunks and embeddings, without the removed documents."""
  source = Path(database) / 'chunks' / name
  old = storage.read_manifest(source, CHUNKS_KIND)
  gone: set[str] = set(old['inputs'].get('without', ()))
  kept_rows: list[np.ndarray] = []
  new = {'kind': CHUNKS_KIND, 'report': old['report']}
  with storage.building(folder / 'chunks', new) as target:
    new['parts'] = []
    for part in range(len(old['parts'])):
      rows, lost, counts = _copy_part(source / f'{part:05d}', target / f'{part:05d}', removed)
      kept_rows.append(rows)
      gone |= lost
      new['parts'].append(counts)
    new['inputs'] = {**old['inputs'], 'without': sorted(gone)}
  sums = storage.read_manifest(folder / 'chunks', CHUNKS_KIND)['files']
  for part, rows in enumerate(kept_rows):
    there = Path(database) / 'embeddings' / f'{name}-{part:05d}'
    if not there.exists():
      continue
    inputs = storage.read_manifest(there, EMBEDDINGS_KIND)['inputs']
    tokens = sums[f'{part:05d}/tokens.npy']['sha256']
    made = {'kind': EMBEDDINGS_KIND, 'inputs': {**inputs, 'tokens': tokens}}
    with storage.building(folder / 'embeddings' / there.name, made) as target:
      storage.save_array(target / 'embedding.npy',
              database_lib.open_column(there / 'embedding.npy')[rows])
  manifest['without'] = sorted(gone)


def _copy_part(
    source: Path, target: Path, removed: frozenset[str]
) -> tuple[np.ndarray, set[str], dict[str, int]]:
  """One shard without the removed documents: rows kept, sha256 of ids lost, new counts."""
  lines = (source / 'documents.jsonl').read_bytes().splitlines(keepends=True)
  ids = [json.loads(line)['id'] for line in lines]
  stays = np.array([i not in removed for i in ids], bool)
  document = database_lib.open_column(source / 'document.npy')
  rows = np.flatnonzero(stays[document]) if len(ids) else np.zeros(0, int)
  target.mkdir()
  counts = {'documents': int(stays.sum()), 'chunks': len(rows)}
  for name, total in (('tokens', ''), ('valid_length', 'tokens'), ('text_bytes', 'text_bytes')):
    column = database_lib.open_column(source / f'{name}.npy')[rows]
    storage.save_array(target / f'{name}.npy', column)
    if total:
      counts[total] = int(column.sum())
  renumbered = (np.cumsum(stays) - 1)[document[rows]]
  storage.save_array(target / 'document.npy', renumbered.astype('<i4'))
  sizes = np.diff(database_lib.open_column(source / 'document_chunk.npy'))[stays]
  database_build.write_document_table(
      target, [line for line, stay in zip(lines, stays) if stay], np.cumsum([0, *sizes]))
  return rows, {database_build.sha_of_id(i) for i, stay in zip(ids, stays) if not stay}, counts


def _swap(folder: str | os.PathLike, compacted: Path) -> None:
  """Puts a compacted input in the place of the old one; goes on where a kill stopped it."""
  if not storage.is_whole(compacted, _COMPACTED_KIND) and not (compacted / '.swapping').exists():
    shutil.rmtree(compacted)
    return
  # From here on it is used up piece by piece; its name tells the next call to go on.
  (compacted / '.swapping').touch()
  moves = [(path, Path(folder) / 'embeddings' / path.name)
           for path in sorted((compacted / 'embeddings').glob('*/'))]
  if (compacted / 'chunks').exists():
    moves.append((compacted / 'chunks', Path(folder) / 'chunks' / compacted.name))
  for made, place in moves:
    if place.exists():
      shutil.rmtree(place)
    os.replace(made, place)
  shutil.rmtree(compacted)


def _publish(
    folder: str | os.PathLike, before: Mapping[str, Any], runner: stages.Runner) -> None:
  """Describes the store as it is now, and forgets the ids."""
  shards, counts = [], dict.fromkeys(before['counts'], 0)
  compacted = dict(before['compacted'])
  for name in dict.fromkeys(shard['input'] for shard in before['shards']):
    task = stages.Task(str(Path(folder) / 'chunks' / name), CHUNKS_KIND, {}, _nothing)
    manifest = task.manifest()
    if without := manifest['inputs'].get('without'):
      compacted[name] = without
    for part in manifest['parts']:
      for key in counts:
        counts[key] += part[key]
    for shard in database_build.shards_of(task):
      if before['embedder']:
        made = stages.Task(str(shard.embedding_folder(folder)), EMBEDDINGS_KIND, {}, _nothing)
        shard = database_build.with_embedding(shard, made)
      shards.append(shard)
  ids = database_build.ids_task(folder, shards)
  runner.run('document ids', [ids], 'tables')
  database_build.publish(folder, {
      **before, 'shards': [dataclasses.asdict(shard) for shard in shards], 'counts': counts,
      'compacted': compacted, 'id_bits': ids.manifest()['id_bits']})
  shutil.rmtree(Path(folder) / _COMPACTED, ignore_errors=True)
  (Path(folder) / REMOVED).unlink()


def _nothing(folder: Path, manifest: dict[str, Any]) -> None:
  raise AssertionError(f'{folder}: only read, never made; {manifest}')


def verify(root: str | os.PathLike) -> list[str]:
  """Checks every byte of every artefact under a folder; sets aside what is damaged.

  What is set aside, and what contains it, counts as not there: the next build makes exactly
  that anew.

  Args:
    root: folder of a database, an index, examples, or of several of them.

  Returns:
    one line for each thing that is wrong.

  Raises:
    UserError: there is no artefact under it.
  """
  root = Path(files.fetch_tree(root))
  names = {storage.MANIFEST, storage.DAMAGED}
  folders = sorted({path.parent for path in root.rglob('manifest.json*') if path.name in names})
  if not folders:
    raise UserError(f'{root}: no artefact there to verify (no {storage.MANIFEST})')
  found = []
  for folder in folders:
    wrong = [] if (folder / storage.MANIFEST).exists() else [f'{folder}: was set aside before']
    wrong += storage.damage(folder) if not wrong else []
    wrong += _missing_parts(folder) if not wrong else []
    if (folder / REMOVED).exists():
      try:
        database_lib.read_removed(folder)
      except UserError as error:
        wrong.append(str(error))
    if wrong:
      found += wrong
      for above in (folder, *folder.parents):
        if above == root.parent:
          break
        storage.set_aside(above)
  return found


def _missing_parts(folder: Path) -> list[str]:
  """Artefacts that a larger one lists and that are not there."""
  manifest = json.loads((folder / storage.MANIFEST).read_bytes())
  expected = []
  if manifest['kind'] == database_lib.KIND:
    for shard in (Shard(**shard) for shard in manifest['shards']):
      expected.append(shard.chunks_folder(folder).parent)
      expected += [shard.embedding_folder(folder)] if shard.embedding else []
    expected.append(folder / 'ids')
  elif manifest['kind'] == 'index':
    expected = [folder / f'part-{i:05d}' for i in range(len(manifest['parts']))]
  elif manifest['kind'] == 'retrieval-examples':
    count = -(-manifest['num_examples'] // manifest['examples_per_shard'])
    expected = [folder / f'shard-{i:05d}' for i in range(count)]
  return [f'{part}: missing' for part in dict.fromkeys(expected) if not part.is_dir()]
