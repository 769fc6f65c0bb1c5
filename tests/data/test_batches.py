"""The order of examples, resuming, slices of processes, and the place on a mesh."""

import itertools
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retro_jax
from retro_jax.data import batches, tasks
from retro_jax.data.batches import ExampleOrder
from retro_jax.errors import UserError
from tests import worlds


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  result = {}
  for i, name in enumerate(('one', 'two')):
    folder = tmp_path_factory.mktemp(name)
    rows = worlds.documents(10 + i, 9 + 5 * i, longest=50, prefix=name)
    store, examples = worlds.examples(folder, rows)
    tasks.register_task(name, {'train': examples.folder, 'valid': examples.folder}, 2)
    result[name] = store, examples
  tasks.register_mixture('both', {'one': 1, 'two': 3})
  return result


def same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])
    assert a[name].dtype == b[name].dtype


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**31), epochs=st.integers(1, 3))
def test_each_epoch_has_every_example_once(size, seed, epochs):
  source, example = ExampleOrder([size], seed=seed)(np.arange(size * epochs))
  assert not source.any()
  for epoch in example.reshape(epochs, size):
    assert sorted(epoch.tolist()) == list(range(size))
  if size > 50 and epochs > 1:
    assert example[:size].tolist() != example[size:2 * size].tolist()
  plain = ExampleOrder([size], seed=seed, shuffle=False)
  assert plain(np.arange(2 * size))[1].tolist() == 2 * list(range(size))


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 500), min_size=2, max_size=4), seed=st.integers(0, 2**31),
       data=st.data())
def test_mixture_keeps_rates_and_epochs(sizes, seed, data):
  rates = data.draw(st.lists(st.floats(0.01, 5), min_size=len(sizes), max_size=len(sizes)))
  order = ExampleOrder(sizes, rates, seed)
  total = 3 * 4096
  source, example = order(np.arange(total))
  for i, size in enumerate(sizes):
    share = rates[i] / sum(rates)
    count = (source == i).sum()
    assert abs(count - share * total) <= 3 * (1 + len(sizes))
    # Whole epochs show each example equally often, the last one at most once more.
    times = np.bincount(example[source == i], minlength=size)
    assert times.max() - times.min() <= 1 + (4096 // size > 0)
  later = np.random.default_rng(seed).integers(0, total, 50)
  np.testing.assert_array_equal(order(later)[0], source[later])
  np.testing.assert_array_equal(order(later)[1], example[later])


def test_batches_are_the_records_in_the_order_of_the_function(made):
  _, examples = made['one']
  order = ExampleOrder([len(examples)], seed=5)
  for step, batch in enumerate(batches.batches('one', 4, seed=5, num_steps=7)):
    _, numbers = order(np.arange(4 * step, 4 * step + 4))
    raw = examples.read(numbers)
    np.testing.assert_array_equal(batch['tokens'], raw['tokens'])
    np.testing.assert_array_equal(batch['neighbor_tokens'], raw['neighbor_tokens'][:, :, :2])
    np.testing.assert_array_equal(batch['chunk_ids'], raw['chunk_ids'])
  assert step == 6


@pytest.mark.parametrize('name', ['one', 'both'])
@pytest.mark.parametrize('start', [1, 6, 1000])
def test_resuming_equals_the_tail_of_a_run(made, name, start):
  del made
  if start < 100:
    whole = list(batches.batches(name, 5, seed=2, num_steps=9))[start:]
  else:
    whole = list(batches.batches(name, 5, seed=2, start_step=start - 2, num_steps=5))[2:]
  tail = list(batches.batches(name, 5, seed=2, start_step=start, num_steps=len(whole)))
  assert len(tail) == len(whole) == 3 or len(tail) == 9 - start
  for a, b in zip(tail, whole, strict=True):
    same(a, b)


@pytest.mark.parametrize('name', ['one', 'both'])
@pytest.mark.parametrize('processes', [2, 3])
def test_processes_together_see_one_batch(made, name, processes):
  del made
  whole = list(batches.batches(name, 6, seed=3, num_steps=4))
  size = 6 // processes
  parts = [batches.batches(name, 6, seed=3, num_steps=4, rows=slice(p * size, (p + 1) * size))
           for p in range(processes)]
  for expected, pieces in zip(whole, zip(*parts, strict=True), strict=True):
    same({k: np.concatenate([piece[k] for piece in pieces]) for k in expected}, expected)


def test_mixture_draws_from_both(made):
  total = [len(examples) for _, examples in made.values()]
  source, numbers = ExampleOrder(total, [1, 3], seed=4)(np.arange(40))
  rows = itertools.chain.from_iterable(
      b['tokens'] for b in batches.batches('both', 8, seed=4, num_steps=5))
  reads = [examples.read(range(len(examples)))['tokens'] for _, examples in made.values()]
  for row, s, i in zip(rows, source, numbers, strict=True):
    np.testing.assert_array_equal(row, reads[s][i])
  assert set(source.tolist()) == {0, 1}


def test_seeds_differ(made):
  del made
  a, b = (next(batches.batches('one', 8, seed=s))['chunk_ids'].tolist() for s in (0, 1))
  assert a != b


@pytest.mark.parametrize('batch_size', [3, 4, 64])
def test_evaluation_sees_every_example_once_in_order(made, batch_size):
  store, examples = made['two']
  seen = list(batches.evaluation_batches('two', batch_size, split='valid'))
  assert all(len(b['tokens']) == batch_size for b in seen)
  tokens = np.concatenate([b['tokens'] for b in seen])
  raw = examples.read(range(len(examples)))
  np.testing.assert_array_equal(tokens[:len(examples)], raw['tokens'])
  rest = {k: np.concatenate([b[k] for b in seen])[len(examples):] for k in seen[0]}
  assert not any(rest[name].any() for name in ('loss_weights', 'tokens', 'text_bytes'))
  assert not rest['neighbor_mask'].any() and (rest['chunk_ids'] == -1).all()
  counts = store.manifest['counts']
  assert sum(b['text_bytes'].sum() for b in seen) == counts['text_bytes']
  assert sum(b['loss_weights'].sum() for b in seen) == counts['tokens'] - counts['documents']


def test_evaluation_of_a_part(made):
  _, examples = made['two']
  [batch] = batches.evaluation_batches('two', 8, max_examples=5)
  np.testing.assert_array_equal(batch['tokens'][:5], examples.read(range(5))['tokens'])
  assert not batch['tokens'][5:].any()
  parts = [list(batches.evaluation_batches('two', 4, rows=slice(2 * p, 2 * p + 2)))
           for p in range(2)]
  whole = list(batches.evaluation_batches('two', 4))
  for a, b, c in zip(*parts, whole, strict=True):
    same({k: np.concatenate([a[k], b[k]]) for k in c}, c)


def test_damage_reaches_the_reader_as_one_line(tmp_path):
  _, examples = worlds.examples(tmp_path, worlds.documents(3, 6))
  path = examples.paths('neighbors')[0]
  data = bytearray(path.read_bytes())
  data[-10] ^= 1
  path.write_bytes(data)
  tasks.register_task('damaged', examples.folder, 2)
  with pytest.raises(UserError, match='shard-00000/neighbors.*checksum.*rebuild') as error:
    list(batches.evaluation_batches('damaged', 2))
  assert '\n' not in str(error.value)


def test_mistakes(made):
  del made
  with pytest.raises(UserError, match="'both' is a mixture"):
    next(batches.evaluation_batches('both', 2))
  with pytest.raises(UserError, match='at least 1 in each'):
    ExampleOrder([3, 0])


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 24), st.integers(1, 9),
       st.integers(0, 99))
def test_microbatches_are_the_fewest_equal_parts_that_are_small_enough(
    data, fsdp, share, sequence_length, limit):
  mesh = jax.sharding.AbstractMesh((data, fsdp, 3), ('data', 'fsdp', 'tensor'))
  parts = batches.microbatches(mesh, data * fsdp * share, sequence_length, limit)
  at_once, rest = divmod(share, parts)
  small_enough = lambda sequences: (
      not limit or sequences == 1 or sequences * sequence_length <= limit)
  assert rest == 0 and small_enough(at_once)
  assert not any(share % fewer == 0 and small_enough(share // fewer) for fewer in range(1, parts))
  if data * fsdp > 1:
    with pytest.raises(UserError, match='does not divide'):
      batches.microbatches(mesh, data * fsdp * share + 1, sequence_length, limit)
  with pytest.raises(UserError, match='microbatch_tokens = -1'):
    batches.microbatches(mesh, data * fsdp * share, sequence_length, -1)


MESH = '''
import jax, numpy as np
from jax.sharding import AxisType
from retro_jax.data import batches
for shape in ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4)):
  mesh = jax.make_mesh(shape, ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
  assert batches.rows_of_process(mesh, 16) == slice(0, 16)
  local = {'x': np.arange(48, dtype=np.int32).reshape(16, 3), 'y': np.arange(16.).astype('f4')}
  out = batches.to_global(local, mesh)
  ways = shape[0] * shape[1]
  for name, value in out.items():
    np.testing.assert_array_equal(np.asarray(value), local[name])
    assert value.dtype == local[name].dtype and value.sharding.spec[0] == ('data', 'fsdp')
    assert {s.data.shape[0] for s in value.addressable_shards} == {16 // ways}
try:
  batches.rows_of_process(mesh, 3)
  raise SystemExit('a batch that does not divide was accepted')
except batches.UserError as error:
  assert 'batch size 3' in str(error) and '\\n' not in str(error)
print('done')
'''


def test_global_arrays_on_eight_devices():
  result = subprocess.run(
      [sys.executable, '-c', MESH], cwd=Path(retro_jax.__file__).parents[1], text=True,
      capture_output=True, check=False, env={
          'XLA_FLAGS': '--xla_force_host_platform_device_count=8', 'JAX_PLATFORMS': 'cpu',
          'PATH': '/usr/bin:/bin'})
  assert result.stdout == 'done\n', result.stderr[-2000:]


PROCESS = '''
import sys
import jax, numpy as np
jax.config.update('jax_num_cpu_devices', 4)
port, process, folder = sys.argv[1:]
jax.distributed.initialize(f'localhost:{port}', 2, int(process))
from jax.sharding import AxisType
from retro_jax.data import batches, tasks
tasks.register_task('t', folder, 2)
whole = next(batches.batches('t', 8, seed=1))
for shape, mine in (((8, 1, 1), 4), ((2, 2, 2), 4), ((1, 2, 4), 4), ((1, 1, 8), 8)):
  mesh = jax.make_mesh(shape, ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
  rows = batches.rows_of_process(mesh, 8)
  assert rows.stop - rows.start == mine, rows
  out = batches.to_global(next(batches.batches('t', 8, seed=1, rows=rows)), mesh)
  for name, value in out.items():
    assert value.shape == whole[name].shape
    for shard in value.addressable_shards:
      np.testing.assert_array_equal(np.asarray(shard.data), whole[name][shard.index])
print('done')
'''


def test_global_arrays_of_two_processes(made):
  """Each process reads only its rows; together they hold the batch of one process."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  environment = {'JAX_PLATFORMS': 'cpu', 'PATH': '/usr/bin:/bin'}
  processes = [subprocess.Popen(
      [sys.executable, '-c', PROCESS, str(port), str(i), str(made['one'][1].folder)], text=True,
      cwd=Path(retro_jax.__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env=environment) for i in range(2)]
  for process in processes:
    out, errors = process.communicate(timeout=180)
    assert out == 'done\n', errors[-2000:]


def test_a_run_that_stops_reading_leaves_the_process_in_peace(made):
  """Threads of tf.data that call Python must not outlive the interpreter."""
  code = (f'from retro_jax.data import batches, tasks; '
          f'tasks.register_task("t", {str(made["one"][1].folder)!r}, 2); '
          f'iterators = [batches.batches("t", 4, seed=s) for s in range(3)]; '
          f'[next(i) for i in iterators]')
  subprocess.run([sys.executable, '-c', code], cwd=Path(retro_jax.__file__).parents[1],
                 check=True, capture_output=True)


def test_importing_does_not_register_or_load_tensorflow():
  code = ('import sys; from retro_jax.data import batches, records; '
          'from retro_jax.retrieval import pipeline; '
          "assert 'tensorflow' not in sys.modules and 'gin' not in sys.modules")
  subprocess.run([sys.executable, '-c', code], cwd=Path(retro_jax.__file__).parents[1], check=True)
