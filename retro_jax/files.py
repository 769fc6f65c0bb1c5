"""Paths that may lie on a disk or in a bucket: the one layer through which both are reached.

A path with a scheme ('gs://bucket/folder', 'ram://folder') goes to `tf.io.gfile`, every other
one to the operating system; TensorFlow is imported for the former only. Any failure is a
`UserError` that names the path. How artefacts are made whole is storage.py's business.
"""

import contextlib
import errno
import fnmatch
import glob as local_glob
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retro_jax.errors import UserError

Location = str | os.PathLike
CACHE_VARIABLE = 'RETRO_JAX_CACHE'
_SCHEME = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*://')
_MANIFEST = 'manifest.json'
_BLOCK = 1 << 22
_ADVICE = {
    errno.ENOSPC: 'disk full: free space or choose another folder',
    errno.EDQUOT: 'disk quota used up: free space or choose another folder',
    errno.EFBIG: 'too large for this file system; choose another folder or smaller shards',
    errno.EROFS: 'cannot be {} (read-only file system); choose another folder',
    errno.EACCES: 'cannot be {} (permission denied); change its permissions or choose another path',
    errno.EPERM: 'cannot be {} (not permitted); change its permissions or choose another path',
    errno.ENOENT: 'no such file or folder; check the path',
    errno.ENOTDIR: 'a part of this path is a file, expected a folder; check the path',
    errno.EISDIR: 'is a folder, expected a file; check the path',
    errno.ENAMETOOLONG: 'name too long; choose a shorter one',
    errno.ELOOP: 'symbolic links lead in a circle; correct them',
    errno.EIO: 'cannot be {} (input/output error); check the disk',
    errno.EMFILE: 'too many open files; raise the limit (ulimit -n)',
}


def shown(path: Location) -> str:
  """`path` as one line of an error: whatever cannot be printed (a line end too) is escaped."""
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fspath(path))


def explain(error: BaseException, path: Location, doing: str = 'written') -> UserError:
  """The one line for a failure of the disk or of remote storage.

  Args:
    error: an `OSError`, or what TensorFlow's file systems raise.
    path: which file or folder.
    doing: 'written' or 'read'.
  """
  if isinstance(error, OSError) and error.errno in _ADVICE:
    return UserError(f'{shown(path)}: {_ADVICE[error.errno].format(doing)}')
  if isinstance(error, OSError):
    return UserError(f'{shown(path)}: cannot be {doing} ({error.strerror or error}); '
                     'check the path')
  kind = type(error).__name__.removesuffix('Error')
  if kind == 'NotFound':
    return UserError(f'{shown(path)}: {_ADVICE[errno.ENOENT]}')
  lines = str(error).strip().splitlines() or [kind]
  return UserError(f'{shown(path)}: cannot be {doing} ({kind}: {lines[0][:200]}); '
                   'check the address, the network and your credentials')


def is_remote(path: Location) -> bool:
  """Whether `path` has a scheme; a `pathlib.Path` never has (it would break the '//')."""
  return isinstance(path, str) and bool(_SCHEME.match(path))


def join(path: Location, *parts: str) -> str:
  """`path` with `parts` below it."""
  if is_remote(path):
    return '/'.join([str(path).rstrip('/'), *(part.strip('/') for part in parts)])
  return os.path.join(os.fspath(path), *parts)


def exists(path: Location) -> bool:
  """Whether there is a file or folder."""
  if not is_remote(path):
    return os.path.exists(path)
  with _explained(path, 'read') as gfile:
    return gfile.exists(path)


def is_folder(path: Location) -> bool:
  """Whether there is a folder."""
  if not is_remote(path):
    return os.path.isdir(path)
  with _explained(path, 'read') as gfile:
    return gfile.isdir(path)


def size(path: Location) -> int:
  """Bytes of a file."""
  return size_and_time(path)[0]


def size_and_time(path: Location) -> tuple[int, int]:
  """Bytes of a file and when it was last changed, in nanoseconds."""
  with _explained(path, 'read') as gfile:
    if is_remote(path):
      status = gfile.stat(path)
      return status.length, status.mtime_nsec
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def fixed_folder(pattern: str) -> str:
  """The part of `pattern` before its first wildcard, as a folder; '.' for none."""
  return _split_pattern(pattern)[0]


def _split_pattern(pattern: str) -> tuple[str, str]:
  """(folder without wildcards, the rest)."""
  before = re.split(r'[*?[]', pattern, maxsplit=1)[0] if has_wildcard(pattern) else pattern
  end = before.rfind('/')
  return pattern[:end] or '/' if end >= 0 else '.', pattern[end + 1:]


def has_wildcard(pattern: str) -> bool:
  """Whether `pattern` may name several files; the name of a file that is there may not."""
  if is_remote(pattern):
    return local_glob.has_magic(pattern)
  return local_glob.has_magic(pattern) and not os.path.lexists(pattern)


def glob(pattern: str) -> list[str]:
  """The files that `pattern` names, sorted.

  '*', '?' and '[...]' as in a shell, and '**' for any depth on a disk. The name of a file that
  is there names that file, whatever brackets are in it. Folders are passed over, and so is what
  begins with a dot; '**' does not enter folders that are symbolic links.

  Raises:
    UserError: something of that name is no regular file (a pipe, a dangling link), or a remote
      pattern with '**'.
  """
  if is_remote(pattern):
    return _remote_glob(pattern)
  if not has_wildcard(pattern):
    found = [pattern] if os.path.lexists(pattern) else []
  else:
    base, rest = _split_pattern(pattern)
    with _explained(base, 'read'):
      try:
        # Not glob.glob: it follows links that lead in a circle.
        paths = set(Path(base).glob(rest + ('/*' if rest.endswith('**') else '')))
      except (ValueError, NotImplementedError) as error:
        raise UserError(f'{shown(pattern)}: no pattern of files ({error}); correct it') from None
    relative = [os.path.relpath(path, base) for path in paths]
    found = sorted(os.path.join(base, name) if base != '.' else name for name in relative
                   if not any(part.startswith('.') for part in Path(name).parts))
  return [path for path in found if _is_regular(path)]


def _is_regular(path: str) -> bool:
  """False for a folder; refuses what is neither file nor folder."""
  with _explained(path, 'read'):
    try:
      mode = os.stat(path).st_mode
    except FileNotFoundError:
      raise UserError(f'{shown(path)}: is a symbolic link to nothing; correct or remove it'
                      ) from None
  if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
    raise UserError(f'{shown(path)}: is a pipe, socket or device, expected a file; '
                    'name another pattern')
  return stat.S_ISREG(mode)


def _remote_glob(pattern: str) -> list[str]:
  if '**' in pattern:
    raise UserError(f"{shown(pattern)}: '**' is for paths on a disk; name the levels, e.g. */*.txt")
  with _explained(pattern, 'read') as gfile:
    folder, _, name = pattern.rpartition('/')
    if local_glob.has_magic(folder):
      found = gfile.glob(pattern)
    elif not gfile.isdir(folder):
      found = []
    else:  # one listing, and brackets mean what they mean on a disk
      names = [n.rstrip('/') for n in gfile.listdir(folder)]
      found = [f'{folder}/{n}' for n in names if n == name or fnmatch.fnmatchcase(n, name)]
    return sorted(path for path in found if not gfile.isdir(path)
                  and not path.rpartition('/')[2].startswith('.'))


def open_read(path: Location, mode: str = 'rb') -> Any:
  """An open file; only bytes ('rb').

  Raises:
    UserError: it cannot be opened; for a remote file also later, when it cannot be read.
  """
  if mode != 'rb':
    raise ValueError(f"mode is {mode!r}, expected 'rb'")
  if is_remote(path):
    return io.BufferedReader(_RemoteReader(str(path)), _BLOCK)
  with _explained(path, 'read'):
    return open(path, 'rb')


class _RemoteReader(io.RawIOBase):
  """A remote file as Python's buffered readers want it."""

  def __init__(self, path: str):
    super().__init__()
    self._path = path
    with _explained(path, 'read') as gfile:
      self._file = gfile.GFile(path, 'rb')
      self._file.size()  # opens nothing, but fails when there is no such file

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    with _explained(self._path, 'read'):
      data = self._file.read(len(buffer))
    buffer[:len(data)] = data
    return len(data)

  def close(self) -> None:
    if not self.closed:
      self._file.close()
    super().close()


def read_bytes(path: Location) -> bytes:
  """All bytes of a file."""
  with open_read(path) as f, _explained(path, 'read'):
    return f.read()


def write_bytes(path: Location, data: bytes) -> None:
  """Writes a whole file; readers see the old one or the new one, never a part."""
  if not is_remote(path):
    # storage.py builds on this module.
    from retro_jax import storage
    with storage.atomic_file(path, 'wb') as f:
      f.write(data)
    return
  with _explained(path, 'written') as gfile:
    _make_way(gfile, path)
    with gfile.GFile(path, 'wb') as f:
      f.write(data)


def _make_way(gfile: Any, path: str) -> None:
  """Readies `path` to be written; a bucket replaces an object at once, `ram://` would append."""
  gfile.makedirs(path.rpartition('/')[0])
  if path.startswith('ram://') and gfile.exists(path):
    gfile.remove(path)


def list_folder(path: Location) -> list[str]:
  """Sorted names of what lies in a folder; none when there is no folder."""
  if not is_folder(path):
    return []
  with _explained(path, 'read') as gfile:
    names = gfile.listdir(path) if is_remote(path) else os.listdir(path)
    return sorted(name.rstrip('/') for name in names)


def remove_tree(path: Location) -> None:
  """Removes a file, or a folder with all in it; nothing when there is neither."""
  with _explained(path, 'removed') as gfile:
    if is_remote(path):
      if gfile.isdir(path):
        gfile.rmtree(path)
      elif gfile.exists(path):
        gfile.remove(path)
    elif os.path.isdir(path) and not os.path.islink(path):
      shutil.rmtree(path)
    else:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def copy_tree(source: Location, target: str, last: str = _MANIFEST) -> None:
  """Copies a local folder to a remote one, so that a reader finds all of it or no manifest.

  Args:
    source: the local folder.
    target: the remote one; what lies there and is not in `source` is removed.
    last: the file to remove first and to copy last.
  """
  names = [os.path.relpath(os.path.join(folder, name), source)
           for folder, _, files in os.walk(source) for name in files]
  with _explained(target, 'written') as gfile:
    if gfile.exists(join(target, last)):
      gfile.remove(join(target, last))
    for name in _walk(target):
      if name not in names:
        gfile.remove(join(target, name))
    for name in sorted(names, key=lambda name: (name == last, name)):
      _make_way(gfile, join(target, name))
      gfile.copy(os.path.join(source, name), join(target, name), overwrite=True)


def cache_folder() -> Path:
  """$RETRO_JAX_CACHE, or ~/.cache/retro_jax; need not be there."""
  return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / '.cache' / 'retro_jax')


def fetch_tree(folder: Location) -> str:
  """A local copy of a remote folder; a local folder itself.

  Copies are kept in the cache under the content of the manifests in the folder, so that a
  folder that was built anew is fetched anew and one that was moved is not. Every file that a
  manifest lists is checked against its size and sha256.

  Raises:
    UserError: no such folder, a file that is not what its manifest says, or no room.
  """
  if not is_remote(folder):
    return os.fspath(folder)
  facts = {name: f for name, f in _walk(folder).items() if not Path(name).name.startswith('.')}
  if not facts:
    raise UserError(f'{shown(folder)}: {_ADVICE[errno.ENOENT]}')
  expected, contents = {}, {}
  for name in (n for n in facts if Path(n).name == _MANIFEST):
    contents[name] = read_bytes(join(folder, name))
    expected |= {os.path.join(os.path.dirname(name), file): listed
                 for file, listed in _listed(contents[name]).items()}
  # A file that no manifest knows is told from its next version by its time.
  key = [[name, *(fact[:1] if name in expected or name in contents else fact),
          hashlib.sha256(contents.get(name, b'')).hexdigest()]
         for name, fact in sorted(facts.items())]
  digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
  there = cache_folder() / 'folders' / f'{str(folder).rstrip("/").rpartition("/")[2]}-{digest}'
  if not there.is_dir():
    with _explained(there, 'written'):
      there.parent.mkdir(parents=True, exist_ok=True)
      temporary = tempfile.mkdtemp(prefix='.fetching-', dir=there.parent)
      try:
        for name in facts:
          _fetch(join(folder, name), os.path.join(temporary, name), expected.get(name))
        try:
          os.rename(temporary, there)
        except OSError:
          if not there.is_dir():  # else somebody was faster
            raise
      finally:
        shutil.rmtree(temporary, ignore_errors=True)
  return str(there)


def _listed(manifest: bytes) -> dict[str, dict[str, Any]]:
  """The files a manifest lists; none when it is not one of ours."""
  try:
    content = json.loads(manifest)
  except ValueError:
    return {}
  files = content.get('files') if isinstance(content, dict) else None
  return files if isinstance(files, dict) else {}


def _fetch(remote: str, local: str, listed: dict[str, Any] | None) -> None:
  digest, length = hashlib.sha256(), 0
  os.makedirs(os.path.dirname(local), exist_ok=True)
  with open_read(remote) as source, open(local, 'wb') as target:
    while block := source.read(_BLOCK):
      digest.update(block)
      length += len(block)
      target.write(block)
  if listed and (length, digest.hexdigest()) != (listed['bytes'], listed['sha256']):
    raise UserError(f'{shown(remote)}: is not what {_MANIFEST} says (damaged, or written while '
                    'it was fetched); fetch it again or build it anew')


def _walk(folder: str) -> dict[str, tuple[int, int]]:
  """(bytes, time) of every file below a remote folder, by relative path."""
  with _explained(folder, 'read') as gfile:
    if not gfile.isdir(folder):
      return {}
    prefix = folder.rstrip('/') + '/'
    paths = [join(below, name) for below, _, names in gfile.walk(folder) for name in names]
    return {path[len(prefix):]: size_and_time(path) for path in sorted(paths)}


@contextlib.contextmanager
def _explained(path: Location, doing: str) -> Iterator[Any]:
  """Failures inside are `UserError`s that name `path`; yields `tf.io.gfile` for a remote one."""
  if not is_remote(path):
    try:
      yield None
    except OSError as error:
      raise explain(error, path, doing) from error
    return
  import tensorflow as tf
  try:
    yield tf.io.gfile
  except (tf.errors.OpError, OSError) as error:
    raise explain(error, path, doing) from error
