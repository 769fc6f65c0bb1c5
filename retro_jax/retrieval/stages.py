"""How stages run: a task is one artefact folder and the pure function that fills it.

Here: what is current and what is not, and who runs the rest: this process, a pool of
processes, Apache Beam, or every process of a `jax.distributed` job. All of them give the
same bytes. Which tasks there are is the business of database.py, sharded_index.py and
pipeline.py.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from retro_jax import storage
from retro_jax.errors import UserError
from retro_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class Task:
  """One artefact of a stage.

  Attributes:
    folder: where it is to lie.
    kind: of the artefact, in its manifest.
    inputs: JSON; all that the content depends on. Equal inputs, equal bytes.
    make: fills a fresh folder and may add facts to the manifest; picklable, and a function of
      its arguments alone.
    weight: how much work it is, in the unit its stage shows progress in.
  """

  folder: str
  kind: str
  inputs: Mapping[str, Any]
  make: Callable[[Path, dict[str, Any]], None]
  weight: int = 1

  def why_not_current(self) -> str | None:
    """None when there is nothing to do, else 'missing', 'stale: ...' or 'damaged: ...'."""
    return storage.why_not_current(self.folder, self.kind, self.inputs)

  def run(self) -> None:
    """Makes the artefact, or leaves none."""
    manifest = {'kind': self.kind, 'inputs': dict(self.inputs)}
    with storage.building(self.folder, manifest) as temporary:
      self.make(temporary, manifest)

  def manifest(self) -> dict[str, Any]:
    """Of the finished artefact."""
    return storage.read_manifest(self.folder, self.kind)


class Runner(Protocol):
  """What runs tasks; several may lead to the same files."""

  @property
  def leads(self) -> bool:
    """Whether this process takes locks and writes what belongs to the whole."""

  def run(self, label: str, tasks: Sequence[Task], unit: str = 'tasks') -> int:
    """Runs what is not current; returns how many that were.

    Raises:
      UserError: of the first task that failed, or a worker died. What was finished stays.
    """


_RESIDENTS: list[Any] = []


def resident(maxsize: int) -> Callable[[Callable[..., Any]], Any]:
  """A cache of what tasks of one process share: opened stores, loaded parts, vocabularies."""
  def keep(function: Callable[..., Any]) -> Any:
    cached = functools.lru_cache(maxsize)(function)
    _RESIDENTS.append(cached)
    return cached
  return keep


def forget_residents() -> None:
  """Empties every such cache: a folder that was built anew must be opened anew."""
  for cached in _RESIDENTS:
    cached.cache_clear()


def pending(tasks: Sequence[Task]) -> list[Task]:
  """The tasks that have something to do."""
  return [task for task in tasks if task.why_not_current() is not None]


@dataclasses.dataclass(frozen=True)
class LocalRunner:
  """Tasks in this process, or in processes of their own.

  Attributes:
    workers: processes, each with one CPU device; -1 for one a core; 0 runs in this process, on
      all of its devices, which is what an accelerator wants.
  """

  workers: int = -1

  def __post_init__(self):
    if self.workers < -1:
      raise UserError(f'LocalRunner.workers is {self.workers}, expected -1 or more')

  @property
  def _processes(self) -> int:
    return (os.cpu_count() or 1) if self.workers < 0 else self.workers

  @property
  def leads(self) -> bool:
    return True

  def run(self, label: str, tasks: Sequence[Task], unit: str = 'tasks') -> int:
    """See `Runner.run`; shows progress, rate and time left."""
    todo = pending(tasks)
    if not todo:
      return 0
    forget_residents()
    progress = Progress(label, sum(task.weight for task in todo), unit)
    run = self._in_pool if self._processes else _in_turn
    for task in run(label, todo):
      progress.update(task.weight)
    progress.close()
    return len(todo)

  def _in_pool(self, label: str, todo: Sequence[Task]) -> Iterator[Task]:
    waiting = collections.deque(todo)
    running: dict[concurrent.futures.Future, Task] = {}
    with concurrent.futures.ProcessPoolExecutor(
        min(self._processes, len(todo)), multiprocessing.get_context('spawn'), _start_worker
    ) as pool:
      try:
        while waiting or running:
          while waiting and len(running) < 2 * self._processes:
            task = waiting.popleft()
            running[pool.submit(run_task, task)] = task
          done, _ = concurrent.futures.wait(
              running, return_when=concurrent.futures.FIRST_COMPLETED)
          for future in done:
            task = running.pop(future)
            future.result()
            yield task
      except concurrent.futures.process.BrokenProcessPool:
        raise UserError(f'{label}: a worker process died (out of memory?); run the command again '
                        'with fewer workers, finished shards are kept') from None
      finally:
        pool.shutdown(wait=True, cancel_futures=True)


HERE = LocalRunner(0)


@dataclasses.dataclass(frozen=True)
class BeamRunner:
  """Tasks as an Apache Beam pipeline, on any runner.

  Attributes:
    options: of the pipeline, e.g. ('--runner=DataflowRunner', '--project=...'). The default is
      Beam's own local runner with processes of its own.
  """

  options: tuple[str, ...] = (
      '--runner=DirectRunner', '--direct_running_mode=multi_processing',
      '--direct_num_workers=2')

  @property
  def leads(self) -> bool:
    return True

  def run(self, label: str, tasks: Sequence[Task], unit: str = 'tasks') -> int:
    """See `Runner.run`; progress is shown where the Beam runner shows it."""
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    todo = pending(tasks)
    if not todo:
      return 0
    total = sum(task.weight for task in todo)
    print(f'{label}: {total:,} {unit} in {len(todo):,} tasks by Beam', flush=True)
    try:
      with beam.Pipeline(options=PipelineOptions(list(self.options))) as pipeline:
        _ = (pipeline | f'{label}' >> beam.Create(todo) | beam.Reshuffle()
             | 'run' >> beam.Map(_run_in_beam))
    except Exception as error:  # Beam wraps what a worker raised in types of its own.
      raise _user_error_in(error) or error
    left = pending(todo)
    if left:
      raise UserError(f'{label}: {len(left):,} of {len(todo):,} tasks are not done though Beam '
                      f'ended, the first is {left[0].folder}; can its workers reach that path?')
    return len(todo)


@dataclasses.dataclass(frozen=True)
class DistributedRunner:
  """Every process of a `jax.distributed` job takes its share, on its own devices.

  All processes run the same command and see the same files. Empty settings are found out by
  JAX, which it can on TPU pods.

  Attributes:
    coordinator: 'host:port' of process 0.
    num_processes, process_id: of the job, and which this is; -1 to find out.
  """

  coordinator: str = ''
  num_processes: int = -1
  process_id: int = -1

  @property
  def leads(self) -> bool:
    return self._joined[0] == 0

  @functools.cached_property
  def _joined(self) -> tuple[int, int]:
    """(this process, how many there are), after joining the job."""
    import jax
    if not jax.distributed.is_initialized():
      jax.distributed.initialize(
          self.coordinator or None,
          None if self.num_processes < 0 else self.num_processes,
          None if self.process_id < 0 else self.process_id)
    return jax.process_index(), jax.process_count()

  def run(self, label: str, tasks: Sequence[Task], unit: str = 'tasks') -> int:
    """See `Runner.run`; ends when all processes have."""
    index, count = self._joined
    # Every process must see the same list before one of them changes it.
    todo = pending(tasks)
    self.wait(f'{label}: start')
    mine = todo[index::count]
    failure: UserError | None = None
    try:
      HERE.run(f'{label} [{index} of {count}]', mine, unit)
    except UserError as error:
      failure = error  # the others wait for us, and shall not for ever
    self.wait(f'{label}: end')
    if failure:
      raise failure
    if left := pending(todo):
      raise UserError(f'{label}: another process failed, or wrote elsewhere: {left[0].folder} '
                      f'is not there; all processes need the same files')
    return len(todo)

  def wait(self, name: str) -> None:
    """Until every process has come here."""
    from jax.experimental import multihost_utils
    assert self._joined
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def building_in(folder: str | os.PathLike, runner: Runner) -> Iterator[None]:
  """Holds the lock of `folder` while tasks run there; only the leading process takes it."""
  if not runner.leads:
    yield
    return
  with storage.locked(folder):
    yield


def describe(label: str, tasks: Sequence[Task], unit: str) -> str:
  """What a run of these tasks would do, for a person: counts, and why of what is not done."""
  reasons = collections.Counter(task.why_not_current() or 'done' for task in tasks)
  done = reasons.pop('done', 0)
  left = sum(task.weight for task in tasks if task.why_not_current() is not None)
  lines = [f'{label}: {done:,} of {len(tasks):,} shards done'
           + (f', {left:,} {unit} to do' if left else '')]
  lines += [f'  {count:,} {reason}' for reason, count in reasons.most_common()]
  return '\n'.join(lines)


def run_task(task: Task) -> None:
  """What a worker process calls."""
  task.run()


def _in_turn(label: str, todo: Sequence[Task]) -> Iterator[Task]:
  del label
  for task in todo:
    task.run()
    yield task


def _run_in_beam(task: Task) -> None:
  one_cpu_device()
  task.run()


def one_cpu_device() -> None:
  """Makes JAX, when it is imported later, use one CPU device in this process.

  And its own matrix products: with the library that the training scripts choose
  (--xla_cpu_experimental_ynn_fusion_type) embedding was seen to hang in two workers at once.
  """
  os.environ['JAX_PLATFORMS'] = 'cpu'
  flags = [flag for flag in os.environ.get('XLA_FLAGS', '').split() if 'ynn' not in flag]
  os.environ['XLA_FLAGS'] = ' '.join([*flags, '--xla_force_host_platform_device_count=1'])
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')


def _start_worker() -> None:
  """Readies a process of the pool: one device, and it does not outlive its parent."""
  one_cpu_device()
  parent = multiprocessing.parent_process()

  def follow() -> None:
    parent.join()
    os._exit(1)  # pylint: disable=protected-access

  threading.Thread(target=follow, daemon=True).start()


def _user_error_in(error: BaseException) -> UserError | None:
  """The `UserError` that another process carried here as text."""
  for line in str(error).splitlines():
    if 'UserError: ' in line:
      return UserError(line.split('UserError: ', 1)[1].split(' [while running')[0])
  return error if isinstance(error, UserError) else None
