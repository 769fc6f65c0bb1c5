"""How artefacts reach the disk: temporary name, atomic rename, manifest, checksums, a lock.

Every stage that leaves a folder behind goes through `building`; every reader goes through
`read_manifest`. What the manifests say is the business of the stages. Where the bytes lie
(a disk or a bucket) is files.py's: a remote artefact is filled here and copied there, its
manifest last.
"""

import contextlib
import dataclasses
import errno
import getpass
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax import files
from retro_jax.errors import UserError

MANIFEST = 'manifest.json'
# What a verification renames the manifest of a damaged artefact to: the next build sees none.
DAMAGED = 'manifest.json.damaged'
LOCK = '.lock'
_BUILDING = '.building-'
# What a person can mend; any other error of the operating system is a defect of ours.
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
                errno.EIO, errno.ENOTDIR, errno.ENAMETOOLONG}


def fingerprint(value: Any) -> str:
  """Sixteen hex digits that change when `value` (anything JSON can hold) changes."""
  text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
  return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]


def file_checksum(path: str | os.PathLike) -> str:
  """sha256 of a file's bytes, in hex."""
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


@contextlib.contextmanager
def _explained(path: str | os.PathLike) -> Iterator[None]:
  """Turns an error of the disk (full, read-only, no permission) into its one line."""
  try:
    yield
  except OSError as error:
    if error.errno not in _OF_THE_DISK:
      raise
    raise files.explain(error, error.filename or path) from error


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = 'w') -> Iterator[Any]:
  """An open file that takes its name only when the block ends without an error.

  Raises:
    UserError: it cannot be written; nothing is left behind.
  """
  path = Path(path)
  with _explained(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f'.{path.name}{_BUILDING}', dir=path.parent)
    try:
      with os.fdopen(handle, mode, encoding=None if 'b' in mode else 'utf-8') as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
      # mkstemp makes files private; an artefact is as readable as its folder.
      os.chmod(temporary, 0o644)
      os.replace(temporary, path)
    except BaseException:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
      raise


@contextlib.contextmanager
def building(folder: str | os.PathLike, manifest: Mapping[str, Any]) -> Iterator[Path]:
  """A fresh folder to fill; renamed to `folder`, with its manifest, when the block ends.

  `manifest` may be filled in while the block runs; it is written at its end together
  with `files`, the size and sha256 of everything in the folder. A remote `folder` is
  filled on the local disk and copied when complete, the manifest last.

  Raises:
    UserError: it cannot be written; nothing is left behind.
  """
  remote = files.is_remote(folder)
  name = Path(str(folder)).name
  with _explained(folder):
    if not remote:
      folder = Path(folder)
      folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(
        prefix=f'.{name}{_BUILDING}', dir=None if remote else folder.parent))
    try:
      yield temporary
      facts = {
          str(p.relative_to(temporary)): {'bytes': p.stat().st_size, 'sha256': file_checksum(p)}
          for p in sorted(temporary.rglob('*')) if p.is_file()
      }
      write_manifest(temporary, {**manifest, 'files': facts})
      # mkdtemp and some writers make things private; an artefact is as readable as its folder.
      for path in (temporary, *temporary.rglob('*')):
        path.chmod(0o755 if path.is_dir() else 0o644)
      if remote:
        files.copy_tree(temporary, str(folder), last=MANIFEST)
        shutil.rmtree(temporary)
      else:
        if folder.exists():
          shutil.rmtree(folder)
        os.replace(temporary, folder)
    except BaseException:
      shutil.rmtree(temporary, ignore_errors=True)
      raise


def write_manifest(folder: str | os.PathLike, manifest: Mapping[str, Any]) -> None:
  """Writes manifest.json with a checksum of its own, so that a damaged one is noticed."""
  content = as_json({k: v for k, v in manifest.items() if k != 'checksum'})
  text = json.dumps({**content, 'checksum': fingerprint(content)}, indent=2, ensure_ascii=False)
  path = files.join(folder, MANIFEST)
  if files.is_remote(path):
    files.write_bytes(path, text.encode() + b'\n')
    return
  with atomic_file(path) as f:
    f.write(text + '\n')
  (Path(folder) / DAMAGED).unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes `value` as indented JSON under its name at once, here or in a bucket."""
  write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + '\n')


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a small text under its name at once, here or in a bucket."""
  if files.is_remote(path):
    files.write_bytes(path, text.encode())
    return
  with atomic_file(path) as f:
    f.write(text)


def save_array(path: str | os.PathLike, array: Any) -> None:
  """`numpy.save`, whose own errors do not say that the disk is full."""
  array = np.asarray(array)
  save_blocks(path, array.shape, array.dtype, [array])


def save_blocks(path: str | os.PathLike, shape: tuple[int, ...], dtype: Any,
                blocks: Iterable[np.ndarray]) -> None:
  """Writes an `.npy` file from consecutive blocks of its rows.

  Plainly, not through a memory map: on a full disk that would kill the process.
  """
  header = {'descr': np.lib.format.dtype_to_descr(np.dtype(dtype)), 'fortran_order': False,
            'shape': tuple(shape)}
  with open(path, 'wb') as f:
    np.lib.format.write_array_header_1_0(f, header)
    for block in blocks:
      f.write(np.ascontiguousarray(block, dtype).tobytes())


def as_json(value: Any) -> Any:
  """`value` as it would come back from a JSON file."""
  return json.loads(json.dumps(value, default=str))


def read_json(path: str | os.PathLike, default: Any) -> Any:
  """The content of a JSON file, or `default` when there is none."""
  try:
    return json.loads(Path(path).read_text(encoding='utf-8'))
  except FileNotFoundError:
    return default


def read_manifest(folder: str | os.PathLike, kind: str) -> dict[str, Any]:
  """The manifest of a finished artefact.

  Raises:
    UserError: no artefact there, one of another kind, a manifest that was changed, or a file
      missing or cut short.
  """
  path = files.join(folder, MANIFEST)
  try:
    manifest = json.loads(files.read_bytes(path) if files.exists(path) else b'null')
  except ValueError as error:
    raise UserError(f'{path}: not valid JSON ({error}); rebuild the {kind}') from None
  if manifest is None:
    raise UserError(f'{folder}: no {kind} there (no {MANIFEST}); build it first')
  if not isinstance(manifest, dict) or not manifest_is_whole(manifest):
    raise UserError(f'{path}: was changed after it was written (its checksum is wrong); '
                    f'rebuild the {kind}')
  if manifest.get('kind') != kind:
    raise UserError(f'{folder}: is a {manifest.get("kind")!r}, expected a {kind!r}')
  for name, facts in manifest.get('files', {}).items():
    file = files.join(folder, name)
    if not files.exists(file) or files.size(file) != facts['bytes']:
      raise UserError(f'{file}: missing or of another size than {MANIFEST} says; '
                      f'rebuild the {kind}')
  return manifest


def manifest_is_whole(manifest: Mapping[str, Any]) -> bool:
  """Whether the checksum in a manifest is that of the rest of it."""
  rest = {key: value for key, value in manifest.items() if key != 'checksum'}
  return manifest.get('checksum') == fingerprint(rest)


def content_fingerprint(manifest: Mapping[str, Any]) -> str:
  """Of the bytes of all files of an artefact, whatever made them."""
  return fingerprint(sorted((name, f['sha256']) for name, f in manifest['files'].items()))


def is_current(folder: str | os.PathLike, kind: str, inputs: Mapping[str, Any]) -> bool:
  """Whether `folder` holds a finished artefact made from exactly these `inputs`."""
  return why_not_current(folder, kind, inputs) is None


def is_whole(folder: str | os.PathLike, kind: str) -> bool:
  """Whether `folder` holds a finished artefact of this kind, whatever it was made from."""
  try:
    read_manifest(folder, kind)
    return True
  except UserError:
    return False


def why_not_current(
    folder: str | os.PathLike, kind: str, inputs: Mapping[str, Any]) -> str | None:
  """None for a finished artefact made from exactly `inputs`, else what it lacks.

  Returns:
    'missing', 'damaged: ...', or 'stale: KEY changed' with the inputs that differ.
  """
  if files.exists(files.join(folder, DAMAGED)):
    return 'damaged: set aside by verify'
  if not files.exists(files.join(folder, MANIFEST)):
    return 'missing'
  try:
    there = read_manifest(folder, kind).get('inputs')
  except UserError as error:
    return f'damaged: {error}'
  wanted = as_json(inputs)
  if there == wanted:
    return None
  there = there if isinstance(there, dict) else {}
  changed = sorted(k for k in there.keys() | wanted.keys() if there.get(k) != wanted.get(k))
  return f'stale: {", ".join(changed)} changed'


def damage(folder: str | os.PathLike) -> list[str]:
  """What is wrong with one artefact, byte for byte; empty when it is whole.

  Returns:
    lines 'PATH: what'; files that no manifest knows are named too.
  """
  folder = Path(folder)
  try:
    manifest = json.loads((folder / MANIFEST).read_bytes())
  except (ValueError, OSError) as error:
    return [f'{folder / MANIFEST}: cannot be read ({error})']
  if not isinstance(manifest, dict) or not manifest_is_whole(manifest):
    return [f'{folder / MANIFEST}: its checksum is wrong']
  found = []
  for name, facts in manifest.get('files', {}).items():
    path = folder / name
    if not path.is_file():
      found.append(f'{path}: missing')
    elif path.stat().st_size != facts['bytes']:
      found.append(f'{path}: {path.stat().st_size:,} bytes, expected {facts["bytes"]:,}')
    elif file_checksum(path) != facts['sha256']:
      found.append(f'{path}: its bytes were changed (checksum differs)')
  return found


def set_aside(folder: str | os.PathLike) -> None:
  """Marks a damaged artefact, so that the next build makes it anew; idempotent."""
  with contextlib.suppress(FileNotFoundError):
    os.replace(Path(folder) / MANIFEST, Path(folder) / DAMAGED)


@dataclasses.dataclass(frozen=True)
class Holder:
  """Who builds in a folder: attributes as they stand in the lock file."""

  host: str
  pid: int
  user: str
  since: str
  command: str

  @classmethod
  def this_process(cls) -> 'Holder':
    try:
      user = getpass.getuser()
    except (KeyError, OSError):
      user = str(os.getuid())
    return cls(socket.gethostname(), os.getpid(), user, time.strftime('%Y-%m-%d %H:%M:%S %Z'),
               ' '.join(sys.argv)[:500])

  def __str__(self) -> str:
    return (f'{self.user} on {self.host}, process {self.pid}, since {self.since} '
            f'({self.command})')


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
  """One builder at a time in `folder`; what killed builders left half-written is removed.

  On a disk the operating system frees the lock when its holder dies. In a bucket it is an
  object that a killed builder leaves behind, to be removed by hand.

  Raises:
    UserError: somebody else builds there; says who.
  """
  path = files.join(folder, LOCK)
  holder = json.dumps(dataclasses.asdict(Holder.this_process()))
  if files.is_remote(path):
    with _remote_lock(path, holder):
      yield
    return
  import fcntl  # not on every system
  with _explained(folder):
    Path(folder).mkdir(parents=True, exist_ok=True)
    while True:
      lock = open(path, 'a+', encoding='utf-8')  # pylint: disable=consider-using-with
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        lock.seek(0)
        raise UserError(_held(folder, lock.read())) from None
      # Whoever had it may have removed the file between our open and our lock.
      with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_ino == os.fstat(lock.fileno()).st_ino:
          break
      lock.close()
    lock.truncate(0)
    lock.write(holder)
    lock.flush()
  try:
    for left in Path(folder).rglob(f'.*{_BUILDING}*'):
      if left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
      else:
        left.unlink(missing_ok=True)
    yield
  finally:
    os.unlink(path)
    lock.close()


@contextlib.contextmanager
def _remote_lock(path: str, holder: str) -> Iterator[None]:
  if files.exists(path):
    raise UserError(_held(path, files.read_bytes(path).decode()) +
                    f'; if that builder is gone, remove {path}')
  files.write_bytes(path, holder.encode())
  if files.read_bytes(path).decode() != holder:
    raise UserError(_held(path, files.read_bytes(path).decode()))
  try:
    yield
  finally:
    files.remove_tree(path)


def _held(folder: str | os.PathLike, content: str) -> str:
  try:
    who = str(Holder(**json.loads(content)))
  except (ValueError, TypeError):
    who = 'another process'
  return f'{folder}: {who} is building here; wait for it or choose another folder'
