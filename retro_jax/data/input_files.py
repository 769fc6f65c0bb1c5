"""Files of a corpus as bytes: which a pattern names, whether they changed, gzip or not.

What stands in them is corpus.py's business; paths on disks and in buckets are files.py's.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import os
import time
import zlib
from collections.abc import Iterator
from typing import Any

from retro_jax import files
from retro_jax.errors import UserError
from retro_jax.storage import fingerprint

# From this size on a file's checksum is remembered, and a remote file is not read for it.
_LARGE_BYTES = 8 << 20
# A file that was written so shortly ago may be written again without its time changing.
_SETTLED_NS = 2_000_000_000
_GZIP_MAGIC = b'\x1f\x8b'
_UTF8_MARK = b'\xef\xbb\xbf'
_UTF16_MARKS = (b'\xff\xfe', b'\xfe\xff', b'\0\0\xfe\xff')  # the first also begins UTF-32
_DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)


class BadContent(UserError):
  """What stands in a file is not what it should be; the file itself could be read."""


@dataclasses.dataclass(frozen=True)
class InputFile:
  """A file as it was when the corpus was listed.

  Attributes:
    path: where it lies.
    name: its path below the fixed folder of the pattern, as text.
    bytes: its size.
    changed_ns: when it was last changed, in nanoseconds.
  """

  path: str
  name: str
  bytes: int
  changed_ns: int

  def checksum(self) -> str:
    """sha256 of the file; of a large remote one, size and time instead.

    That of a large local file is remembered in the cache under its identity, size and times, so
    that a corpus is read for it once. The time of an inode's last change is among them, which
    no program can set back.

    Raises:
      UserError: the file was changed, or cannot be read.
    """
    self.refuse_if_changed()
    if self.bytes < _LARGE_BYTES:
      return self._sha256()
    if files.is_remote(self.path):
      return f'{self.bytes} bytes of {self.changed_ns}'
    status = os.stat(self.path)
    key = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    place = files.cache_folder() / 'checksums' / fingerprint(key)
    with contextlib.suppress(OSError):
      known = place.read_text(encoding='ascii', errors='replace')
      if len(known) == 64:
        return known
    known = self._sha256()
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS:
      with contextlib.suppress(UserError):  # without a cache it is only read again
        files.write_bytes(place, known.encode())
    return known

  def _sha256(self) -> str:
    digest = hashlib.sha256()
    with files.open_read(self.path) as f:
      try:
        while block := f.read(1 << 20):
          digest.update(block)
      except OSError as error:
        raise files.explain(error, self.path, 'read') from error
    self.refuse_if_changed()
    return digest.hexdigest()

  def refuse_if_changed(self) -> None:
    """Raises UserError when the file is gone or is not the one that was listed."""
    now = files.size_and_time(self.path)
    if now != (self.bytes, self.changed_ns):
      raise UserError(f'{files.shown(self.path)}: was changed while it was being read '
                      f'({self.bytes:,} bytes when the corpus was listed, {now[0]:,} now); run '
                      'the command again when nobody writes it')

  def lines(self) -> Iterator[bytes]:
    """Lines with their ends, unzipped and without a byte order mark.

    Raises:
      BadContent: gzip data is damaged (after the lines before the damage), or it is UTF-16.
      UserError: the file was changed, or cannot be read.
    """
    number = 0
    with self._open() as stream:
      try:
        for number, line in enumerate(stream, start=1):
          yield line.removeprefix(_UTF8_MARK) if number == 1 else line
      except _DAMAGED as error:
        raise BadContent(f'{files.shown(self.path)}:{number + 1}: gzip data is cut short or '
                         f'damaged from here ({error}); get the file anew') from None
      except OSError as error:
        raise files.explain(error, self.path, 'read') from error
    self.refuse_if_changed()

  def read(self) -> bytes:
    """The whole content; as `lines`."""
    with self._open() as stream:
      try:
        data = stream.read()
      except _DAMAGED as error:
        raise BadContent(f'{files.shown(self.path)}: gzip data is cut short or damaged ({error}); '
                         'get the file anew') from None
      except OSError as error:
        raise files.explain(error, self.path, 'read') from error
    self.refuse_if_changed()
    return data.removeprefix(_UTF8_MARK)

  @contextlib.contextmanager
  def _open(self) -> Iterator[Any]:
    """The file's bytes; content decides what is gzip, not the name."""
    self.refuse_if_changed()
    shown = files.shown(self.path)
    with files.open_read(self.path) as raw:
      head = raw.peek(4)[:4]
      zipped = head.startswith(_GZIP_MAGIC)
      if self.name.endswith('.gz') and head and not zipped:
        raise BadContent(f'{shown}: is named .gz but holds no gzip data; rename or compress it')
      with gzip.GzipFile(fileobj=raw) if zipped else contextlib.nullcontext(raw) as stream:
        if zipped:
          try:
            head = stream.peek(4)[:4]
          except _DAMAGED:
            head = b''  # whoever reads on meets it again
        if head.startswith(_UTF16_MARKS):
          raise BadContent(f'{shown}: is UTF-16 or UTF-32, expected UTF-8; convert it')
        yield stream


def find_files(pattern: str) -> list[InputFile]:
  """The files that `pattern` names, sorted by path (see `files.glob`).

  Raises:
    UserError: there are none, or one of them is no regular file.
  """
  paths = files.glob(pattern)
  if not paths:
    what = 'is a folder, expected files' if files.is_folder(pattern) else (
        'no file of that name or pattern')
    raise UserError(f'{files.shown(pattern)}: {what}; check the path')
  base = files.fixed_folder(pattern)
  return [InputFile(path, _name(path, base), *files.size_and_time(path)) for path in paths]


def _name(path: str, base: str) -> str:
  """`path` below `base`, bytes of it that are no UTF-8 spelt out."""
  name = path.removeprefix(base + '/') if files.is_remote(path) else os.path.relpath(path, base)
  return os.fsencode(name).decode('utf-8', 'backslashreplace')
