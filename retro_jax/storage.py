"""How artefacts reach the disk: temporary name, atomic rename, manifest, checksums.

Every stage that leaves a folder behind goes through `building`; every reader goes
through `read_manifest`. What the manifests say is the business of the stages.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from retro_jax.errors import UserError

MANIFEST = 'manifest.json'


def fingerprint(value: Any) -> str:
  """Sixteen hex digits that change when `value` (anything JSON can hold) changes."""
  text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_checksum(path: str | os.PathLike) -> str:
  """sha256 of a file's bytes, in hex."""
  digest = hashlib.sha256()
  with open(path, 'rb') as f:
    while block := f.read(1 << 20):
      digest.update(block)
  return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = 'w') -> Iterator[Any]:
  """An open file that takes its name only when the block ends without an error."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
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
  with `files`, the size and sha256 of everything in the folder.
  """
  folder = Path(folder)
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.building-', dir=folder.parent))
  try:
    yield temporary
    files = {
        str(p.relative_to(temporary)): {'bytes': p.stat().st_size, 'sha256': file_checksum(p)}
        for p in sorted(temporary.rglob('*')) if p.is_file()
    }
    write_json(temporary / MANIFEST, {**manifest, 'files': files})
    # mkdtemp and some writers make things private; an artefact is as readable as its folder.
    for path in (temporary, *temporary.rglob('*')):
      path.chmod(0o755 if path.is_dir() else 0o644)
    if folder.exists():
      shutil.rmtree(folder)
    os.replace(temporary, folder)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes `value` as indented JSON under its name at once."""
  with atomic_file(path) as f:
    json.dump(value, f, indent=2, ensure_ascii=False, default=str)
    f.write('\n')


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
    UserError: no artefact there, one of another kind, or a file missing or cut short.
  """
  path = Path(folder) / MANIFEST
  try:
    manifest = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError(f'{folder}: no {kind} there (no {MANIFEST}); build it first') from None
  except json.JSONDecodeError as error:
    raise UserError(f'{path}: not valid JSON ({error}); rebuild the {kind}') from None
  if manifest.get('kind') != kind:
    raise UserError(f'{folder}: is a {manifest.get("kind")!r}, expected a {kind!r}')
  for name, facts in manifest.get('files', {}).items():
    file = Path(folder) / name
    if not file.exists() or file.stat().st_size != facts['bytes']:
      raise UserError(f'{file}: missing or of another size than {MANIFEST} says; '
                      f'rebuild the {kind}')
  return manifest


def is_current(folder: str | os.PathLike, kind: str, inputs: Mapping[str, Any]) -> bool:
  """Whether `folder` holds a finished artefact made from exactly these `inputs`."""
  try:
    return read_manifest(folder, kind).get('inputs') == as_json(inputs)
  except UserError:
    return False
