"""Adding and removing documents, compaction, damage: what nobody may see is seen by nobody."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retro_jax
from retro_jax.data.corpus import JsonLines
from retro_jax.errors import UserError
from retro_jax.generation.live_retrieval import LiveRetriever
from retro_jax.retrieval import database_edit, pipeline
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.database_build import DatabaseConfig, build_chunk_database
from retro_jax.retrieval.index import IndexConfig
from retro_jax.retrieval.sharded_index import rebuild_index
from tests import worlds

CONFIG = DatabaseConfig(8, 40, None)
SMALL = pipeline.ExamplesConfig(32, 3, margin=2, examples_per_shard=4)


def build(folder, pattern, add=False):
  return build_chunk_database(folder, JsonLines(str(pattern)), worlds.vocabulary(), CONFIG,
                              worlds.embedder(), add=add)


@pytest.fixture
def world(tmp_path):
  """Three inputs of seven documents, an index of several parts."""
  (tmp_path / 'in').mkdir()
  for i in range(3):
    worlds.write_source(tmp_path / 'in' / f'{i}.jsonl',
                        worlds.documents(i, 7, longest=40, prefix=f'{i}'))
  database = build(tmp_path / 'db', tmp_path / 'in' / '*.jsonl')
  pipeline.build_index(tmp_path / 'index', database, IndexConfig(vectors_per_part=60))
  return tmp_path


def returned(folder, database):
  """Ids of all documents that search returns for every chunk, live and offline."""
  index = rebuild_index(folder / 'index', database)
  examples = pipeline.build_examples(folder / 'x', database, database, folder / 'index', SMALL)
  ids = examples.read(range(len(examples)))['neighbor_ids']
  found = set(database.document(ids[ids >= 0]).tolist())
  random = pipeline.build_examples(
      folder / 'random', database, database, None, pipeline.ExamplesConfig(
          **{**vars(SMALL), 'kind': 'random'}))
  ids = random.read(range(len(random)))['neighbor_ids']
  found |= set(database.document(ids[ids >= 0]).tolist())
  live = LiveRetriever(database, index, worlds.embedder(), worlds.vocabulary(), 3)
  for chunk in range(0, database.num_chunks, 5):
    ids = live.neighbors(database.tokens(chunk)).ids
    found |= set(database.document(ids[ids >= 0]).tolist())
  return {database.document_info(ordinal)['id'] for ordinal in found}


def test_forget_this_document(world):
  folder = world / 'db'
  before = returned(world, ChunkDatabase.open(folder))
  gone = {'1-0', '1-3', '2-6'}
  assert gone <= before
  text = {d.id: d.text for i in range(3) for d in worlds.documents(i, 7, 40, f'{i}')}
  assert database_edit.remove_documents(folder, sorted(gone)) == 3
  assert database_edit.remove_documents(folder, ['1-0']) == 0
  removed = ChunkDatabase.open(folder)
  assert {removed.document_info(i)['id'] for i in removed.removed} == gone
  # Search honours the list at once, and finds as many of the others.
  assert returned(world, removed) <= before - gone
  assert database_edit.compact(folder) == 3
  database = ChunkDatabase.open(folder)
  assert not len(database.removed) and database.num_documents == 18
  assert returned(world, database) <= before - gone
  # Nothing of it is left on the disk, but hashes of the ids.
  everything = b'\n'.join(worlds.content(folder).values())
  assert not any(f'"{name}"'.encode() in everything for name in gone)
  vectors = {v.tobytes() for v in database.embedding(np.arange(database.num_chunks))}
  vocabulary = worlds.vocabulary()
  whole = lambda ids: vocabulary.decode(
      [t for row in database.tokens(ids) for t in row.tolist() if t > 2])
  assert {whole(np.arange(database.document_starts[i], database.document_starts[i + 1]))
          for i in range(18)} == {t for name, t in text.items() if name not in gone}
  assert len(vectors) > 10
  # A build from the source that still has them leaves them out, and has nothing to do.
  content = worlds.content(folder)
  assert build(folder, world / 'in' / '*.jsonl').num_documents == 18
  assert worlds.content(folder) == content


def test_compacted_store_equals_one_that_never_had_the_documents(world):
  database_edit.remove_documents(world / 'db', ['0-1', '0-2', '2-0'])
  database_edit.compact(world / 'db')
  there = ChunkDatabase.open(world / 'db')
  (world / 'less').mkdir()
  for i in range(3):
    rows = [d for d in worlds.documents(i, 7, 40, f'{i}') if d.id not in ('0-1', '0-2', '2-0')]
    worlds.write_source(world / 'less' / f'{i}.jsonl', rows)
  fresh = build(world / 'fresh', world / 'less' / '*.jsonl')
  ids = np.arange(fresh.num_chunks)
  assert there.manifest['counts'] == fresh.manifest['counts']
  for column in ('tokens', 'valid_length', 'text_bytes', 'document', 'embedding'):
    np.testing.assert_array_equal(getattr(there, column)(ids), getattr(fresh, column)(ids))
  assert there.document_ids == fresh.document_ids
  assert [there.ordinal_of(i) for i in fresh.document_ids] == list(range(18))


def test_compaction_killed_anywhere_goes_on(world):
  """SIGKILL at each of its steps in turn: `os.replace` is what makes them."""
  program = (
      'import os, signal, sys; from retro_jax.retrieval import database_edit\n'
      'left, replace = [int(sys.argv[2])], os.replace\n'
      'def counted(*args):\n'
      '  left[0] -= 1\n'
      '  if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n'
      '  return replace(*args)\n'
      'os.replace = counted\n'
      'database_edit.compact(sys.argv[1])\n')
  database_edit.remove_documents(world / 'db', ['0-1', '2-0'])
  subprocess.run(['cp', '-r', world / 'db', world / 'copy'], check=True)
  database_edit.compact(world / 'copy')
  for steps in range(1, 40, 3):
    result = subprocess.run(
        [sys.executable, '-c', program, world / 'db', str(steps)], check=False,
        cwd=Path(retro_jax.__file__).parents[1], env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    assert result.returncode in (0, -signal.SIGKILL)
    if not result.returncode:
      break
  assert not result.returncode
  assert worlds.content(world / 'db') == worlds.content(world / 'copy')


def test_an_unknown_document_removes_none(world):
  with pytest.raises(UserError, match="no document 'nobody'; nothing was removed"):
    database_edit.remove_documents(world / 'db', ['0-1', 'nobody'])
  assert not len(ChunkDatabase.open(world / 'db').removed)


def test_added_documents_come_behind_and_only_they_are_made(world):
  before = ChunkDatabase.open(world / 'db')
  stamps = {p: p.stat().st_mtime_ns for p in (world / 'db').rglob('*.npy')
            if 'ids' not in p.parts}
  parts = {p: p.stat().st_mtime_ns for p in (world / 'index').rglob('*') if p.is_dir()}
  worlds.write_source(world / 'new.jsonl', worlds.documents(9, 4, prefix='new'))
  after = build(world / 'db', world / 'new.jsonl', add=True)
  assert after.document_ids == [*before.document_ids, *(f'new-{i}' for i in range(4))]
  ids = np.arange(before.num_chunks)
  np.testing.assert_array_equal(after.tokens(ids), before.tokens(ids))
  assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
  index = pipeline.build_index(world / 'index', after, IndexConfig(vectors_per_part=60))
  kept = [p for p, time in parts.items() if p.exists() and p.stat().st_mtime_ns == time
          and p.name.startswith('part')]
  assert kept and index.size == after.num_chunks
  # A later build from the first source keeps them; so does one that changes an input.
  assert build(world / 'db', world / 'in' / '*.jsonl').document_ids == after.document_ids
  worlds.write_source(world / 'in' / '0.jsonl', worlds.documents(0, 5, prefix='0'))
  assert build(world / 'db', world / 'in' / '*.jsonl').document_ids[-4:] == after.document_ids[-4:]
  with pytest.raises(UserError, match='another chunk_length, and its source is not given'):
    build_chunk_database(world / 'db', JsonLines(str(world / 'in' / '*.jsonl')),
                         worlds.vocabulary(), DatabaseConfig(9, 40, None), worlds.embedder())


@settings(max_examples=25, deadline=None)
@given(which=st.floats(0, 1, exclude_max=True), place=st.floats(0, 1, exclude_max=True),
       bit=st.integers(0, 7))
def test_a_flipped_byte_anywhere_is_found_and_only_its_shard_made_anew(whole, which, place, bit):
  folder, expected = whole
  assert worlds.content(folder) == expected
  files = sorted(p for p in folder.rglob('*') if p.is_file())
  path = files[int(which * len(files))]
  content = bytearray(path.read_bytes())
  content[int(place * len(content))] ^= 1 << bit
  stamps = {p: p.stat().st_mtime_ns for p in files}
  path.write_bytes(content)
  found = [line for name in ('db', 'index', 'x') for line in database_edit.verify(folder / name)]
  assert len(found) == 1 and str(path.parent) in found[0]
  again(folder)
  assert worlds.content(folder) == expected
  assert not any(database_edit.verify(folder / name) for name in ('db', 'index', 'x'))
  remade = {p for p in files if p.stat().st_mtime_ns != stamps[p]}
  touched = {p.relative_to(folder).parts[:3] for p in remade if p.name != 'manifest.json'}
  assert len(touched) <= 3, touched


def again(folder):
  database = build(folder / 'db', folder.parent / 'in.jsonl')
  pipeline.build_index(folder / 'index', database, IndexConfig(vectors_per_part=60))
  return pipeline.build_examples(folder / 'x', database, database, folder / 'index', SMALL)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp('whole')
  worlds.write_source(folder / 'in.jsonl', worlds.documents(4, 12))
  again(folder / 'all')
  return folder / 'all', worlds.content(folder / 'all')


def test_a_flipped_byte_in_a_record_stops_the_reader(whole):
  folder, _ = whole
  for name in ('examples', 'neighbors'):
    path = folder / 'x' / 'shard-00000' / f'{name}.tfrecord'
    before = path.read_bytes()
    for place in np.linspace(0, len(before) - 1, 40).astype(int):
      content = bytearray(before)
      content[place] ^= 4
      path.write_bytes(content)
      examples = again_open(folder)
      with pytest.raises(UserError, match=f'{name}.tfrecord.* rebuild the examples'):
        examples.read(range(len(examples)))
    path.write_bytes(before)


def again_open(folder):
  from retro_jax.data.records import Examples
  return Examples(folder / 'x')


def test_a_missing_shard_and_an_empty_folder_are_said(world, tmp_path):
  part = next((world / 'db' / 'chunks').iterdir())
  subprocess.run(['rm', '-r', part], check=True)
  assert database_edit.verify(world / 'db') == [f'{part}: missing']
  with pytest.raises(UserError, match='no artefact there to verify'):
    database_edit.verify(tmp_path / 'in')
  assert build(world / 'db', world / 'in' / '*.jsonl').num_documents == 21


def test_a_damaged_list_of_removals_shows_nobody_the_documents(world):
  database_edit.remove_documents(world / 'db', ['1-0'])
  path = world / 'db' / 'removed.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), 'documents': []}))
  with pytest.raises(UserError, match='removed.json: was changed'):
    ChunkDatabase.open(world / 'db')
