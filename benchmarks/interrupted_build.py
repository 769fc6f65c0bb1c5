"""A build killed again and again ends with the bytes of one left alone.

  python benchmarks/interrupted_build.py --pattern='corpus/*.jsonl.gz' --kills=25

Builds database, index and neighbours of the corpus undisturbed, by one process, by two and by
Beam; then once more with SIGKILL to the whole process group at random moments, started again
each time. Prints where each kill struck and whether all folders hold the same bytes; exit code
1 when they do not. The embedder is the lexical one, unless settings say otherwise.
"""

import argparse
import filecmp
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    'one process': ['--gin.LocalRunner.workers=1'],
    'two processes': ['--gin.LocalRunner.workers=2'],
    'beam': ['--gin_file=gin/data/beam.gin'],
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--pattern', required=True, help='JSON lines of the corpus')
  parser.add_argument('--kills', type=int, default=25)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--folder', default='runs/interrupted', help='for everything made')
  parser.add_argument('settings', nargs='*', help='further --gin.X=... for every build')
  arguments, more = parser.parse_known_args()
  settings = [f'--gin.TRAIN={os.path.abspath(arguments.pattern)}', *arguments.settings, *more]
  same = compare(Path(arguments.folder), settings, arguments.kills, arguments.seed)
  print('same bytes everywhere' if same else 'DIFFERENT')
  sys.exit(0 if same else 1)


def compare(folder: Path, settings: Sequence[str], kills: int, seed: int,
            ways: Sequence[str] = tuple(WAYS)) -> bool:
  """Builds in every way and with kills; whether the folders are equal."""
  shutil.rmtree(folder, ignore_errors=True)
  same, first, seconds = True, None, 0.0
  for way in ways:
    made = folder / way.replace(' ', '_')
    begin = time.monotonic()
    process = start(made, [*settings, *WAYS[way]])
    if process.wait():
      raise RuntimeError(f'{way}: the build failed; see {made}/log.txt')
    took = time.monotonic() - begin
    first, seconds = (made, took) if first is None else (first, seconds)
    same &= report(way, first, made, f'{took:.0f} s')
  killed = folder / 'killed'
  struck = kill_often(killed, [*settings, *WAYS[ways[0]]], kills, seconds, random.Random(seed))
  return report(f'killed {struck} times', first, killed, '') and same


def start(folder: Path, settings: Sequence[str]) -> subprocess.Popen:
  """Starts a build whose FOLDER is `out` below `folder`, in a process group of its own."""
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / 'log.txt', 'a', encoding='utf-8') as log:
    return subprocess.Popen(
        [sys.executable, str(ROOT / 'tools' / 'build_retrieval.py'),
         '--gin_file=gin/data/retrieval.gin', '--gin.FOLDER=out',
         '--gin.EMBEDDER=@LexicalEmbedder()', *settings],
        cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu',
             'TF_CPP_MIN_LOG_LEVEL': '3'})


def kill_often(folder: Path, settings: Sequence[str], kills: int, seconds: float,
               rng: random.Random) -> int:
  """Kills the build `kills` times, starting over when it got to its end; then lets it end."""
  struck = 0
  while struck < kills:
    process = start(folder, settings)
    # Long enough to get past the longest task now and then, short enough to strike often.
    wait = rng.uniform(0, 0.6 * seconds)
    try:
      process.wait(wait)
      shutil.rmtree(folder / 'out')
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
      struck += 1
      print(f'  kill {struck} after {wait:5.1f} s: {last_line(folder)[:100]}', flush=True)
  if start(folder, settings).wait():
    raise RuntimeError(f'the build failed after {struck} kills; see {folder}/log.txt')
  return struck


def last_line(folder: Path) -> str:
  """The last line of ours in a build's log, which says how far it was."""
  lines = (folder / 'log.txt').read_text(encoding='utf-8', errors='replace').splitlines()
  ours = [line for line in lines if ': ' in line and line[:1].islower()]
  return ours[-1] if ours else 'at its start'


def report(name: str, first: Path, made: Path, note: str) -> bool:
  """Prints and returns whether two builds hold the same files with the same bytes."""
  a, b = (sorted(str(p.relative_to(f / 'out')) for p in (f / 'out').rglob('*') if p.is_file())
          for f in (first, made))
  different = [n for n in a if n in set(b) and not filecmp.cmp(
      first / 'out' / n, made / 'out' / n, shallow=False)]
  odd = sorted(set(a) ^ set(b))
  said = 'the same bytes' if not different and not odd else (
      f'{len(different)} files differ ({different[:3]}), {len(odd)} are in one only ({odd[:3]})')
  print(f'{name}: {len(b)} files, {said} {note}', flush=True)
  return not different and not odd


if __name__ == '__main__':
  main()
