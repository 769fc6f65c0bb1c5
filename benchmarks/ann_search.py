"""Approximate search side by side: recall, queries per CPU second, bytes per vector.

  python benchmarks/ann_search.py --embeddings=embeddings.npy --output=search.json \\
      --picture=search.png

The parts of this project (ScaNN, exact) against faiss: exact, HNSW, and inverted lists with
the quantisers that others have used for RETRO. One process, one thread, the contenders one
after the other in each round. Needs faiss-cpu. The last --queries rows of a shuffled
file are the queries and are in no index.
"""

import os

# Read by the libraries when they are loaded: one thread for all of them.
os.environ.update({name: '1' for name in (
    'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')})

# pylint: disable=wrong-import-position
import argparse
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.retrieval.exact import ExactPart, array_blocks, exact_search, squared_distances
from retro_jax.retrieval.index import IndexConfig, build_part, latency, load_part
from retro_jax.retrieval.scann_part import ScannPart

RECALL = 0.97
FLAT, HNSW = 'faiss flat (exact)', 'faiss HNSW32'
OURS = 'ScaNN'
EFFORTS = {  # what is varied of each family of faiss, beside the ScaNN leaves below
    'efSearch': (8, 12, 16, 24, 32, 48, 64, 96, 128, 256),
    'nprobe': (4, 8, 16, 32, 64, 128)}


@dataclasses.dataclass
class Point:
  """One system with one setting.

  Attributes:
    system, setting: what it is called.
    search: float32 [q, d0] -> ids [q, k].
    bytes_per_vector: of its serialised index.
    rescored: whether it reads the embeddings of the store beside it.
    build_seconds: CPU time of building the index.
    recall: share of the true k nearest that it finds; an equally far one counts.
    seconds: CPU time for all queries, one number a round.
    one_query_ms: CPU time of a query asked alone.
  """

  system: str
  setting: str
  search: Callable[[np.ndarray], np.ndarray]
  bytes_per_vector: float
  rescored: bool
  build_seconds: float
  recall: float = 0.0
  seconds: list[float] = dataclasses.field(default_factory=list)
  one_query_ms: float = 0.0

  def as_json(self, queries: int) -> dict[str, Any]:
    return {'system': self.system, 'setting': self.setting, 'recall': round(self.recall, 4),
            'queries_per_cpu_second': round(queries / float(np.median(self.seconds)), 1),
            'queries_per_cpu_second_rounds': [round(queries / s, 1) for s in self.seconds],
            'one_query_ms': round(self.one_query_ms, 3),
            'bytes_per_vector': round(self.bytes_per_vector, 1),
            'reads_stored_embeddings': self.rescored,
            'build_cpu_seconds': round(self.build_seconds, 1)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--embeddings', default='', help='.npy file, [n, d0] float16 or float32')
  parser.add_argument('--synthetic', type=int, default=0,
                      help='in place of a file: so many vectors of 32 around centres')
  parser.add_argument('--queries', type=int, default=1000, help='held out of the indexes')
  parser.add_argument('--k', type=int, default=2, help='neighbours')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--output', default='', help='JSON file for the numbers')
  parser.add_argument('--picture', default='', help='PNG file')
  arguments = parser.parse_args()
  if bool(arguments.embeddings) == bool(arguments.synthetic):
    parser.error('name either --embeddings or --synthetic')
  vectors = (np.load(arguments.embeddings) if arguments.embeddings
             else synthetic(arguments.synthetic))
  order = np.random.default_rng(0).permutation(len(vectors))
  base = vectors[np.sort(order[:-arguments.queries])]
  queries = vectors[order[-arguments.queries:]].astype(np.float32)
  result = compare(base, queries, arguments.k, arguments.rounds)
  print(table(result))
  for claim in result['claims']:
    print(f'{"PASS" if claim["holds"] else "FAIL"}  {claim["text"]}')
  if arguments.output:
    Path(arguments.output).write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
  if arguments.picture:
    draw(result, arguments.picture)


def synthetic(count: int) -> np.ndarray:
  """Unit vectors around centres, float16 [count, 32]: enough to see the program run."""
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(50, 32))[rng.integers(0, 50, count)] + 0.5 * rng.normal(size=(count, 32))
  return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def compare(base: np.ndarray, queries: np.ndarray, k: int, rounds: int) -> dict[str, Any]:
  """Builds every index, measures every point, judges the claims."""
  truth, distances = exact_search(queries, array_blocks(base), k)
  del truth
  with tempfile.TemporaryDirectory() as folder:
    points = [*exact_points(base, k), *scann_points(Path(folder), base, k), *faiss_points(base, k)]
    for point in points:
      found = point.search(queries)
      near = squared_distances(queries, base, found) <= distances[:, -1:] * (1 + 1e-6)
      point.recall = float(np.mean(near))
      alone = queries[:50]
      start = time.process_time()
      for query in alone:
        point.search(query[None])
      point.one_query_ms = (time.process_time() - start) / len(alone) * 1e3
    for number in range(rounds):
      for point in points:
        start = time.process_time()
        point.search(queries)
        point.seconds.append(time.process_time() - start)
      print(f'round {number + 1} of {rounds} done', flush=True)
  return {'vectors': len(base), 'dimension': base.shape[1], 'queries': len(queries), 'k': k,
          'rounds': rounds, 'points': [p.as_json(len(queries)) for p in points],
          'claims': claims(points, k)}


def exact_points(base: np.ndarray, k: int) -> Iterator[Point]:
  import faiss

  start = time.process_time()
  flat = faiss.IndexFlatL2(base.shape[1])
  flat.add(base.astype(np.float32))
  yield Point(FLAT, '', lambda q: flat.search(q, k)[1], 4 * base.shape[1], False,
              time.process_time() - start)
  part = ExactPart(base)
  yield Point('exact part of this project', '', lambda q: part.search(q, k)[0], 0, True, 0)


def scann_points(folder: Path, base: np.ndarray, k: int) -> Iterator[Point]:
  """The project's own path with each storage, as tuned and around; ScaNN's own answers too."""
  for storage in ('int8', 'bfloat16', 'float32'):
    target = folder / storage
    target.mkdir()
    config = IndexConfig(kind='scann', storage=storage, recall_at=k, target_recall=RECALL)
    start = time.process_time()
    facts = build_part(target, base, config, threads=1)
    seconds = time.process_time() - start
    tuned = load_part(target, facts, base)
    print(f'ScaNN {storage}: latency {latency(tuned, base[::997].astype(np.float32), k)}')
    chosen = tuned.settings.leaves_to_search
    for factor in (0.25, 0.5, 0.75, 1, 1.5, 2.5, 4):
      leaves = max(1, round(chosen * factor))
      settings = dataclasses.replace(tuned.settings, leaves_to_search=leaves)
      part = ScannPart(tuned._searcher, settings, base)  # pylint: disable=protected-access
      label = f'{leaves}/{settings.leaves} leaves, {settings.reorder}'
      label += ' (tuned)' if factor == 1 else ''
      yield Point(f'{OURS} {storage}', label, lambda q, p=part: p.search(q, k)[0],
                  facts['bytes_per_vector'], True, seconds)
      yield Point(f'{OURS} {storage}, not re-scored', label,
                  lambda q, p=part: p.candidates(q, k), facts['bytes_per_vector'], False, seconds)


def faiss_points(base: np.ndarray, k: int) -> Iterator[Point]:
  """HNSW, and inverted lists over about the square root of the vectors.

  The suffix np turns off polysemous training of the product quantiser: same recall, a
  fraction of the time.
  """
  import faiss

  lists = 2 ** round(math.log2(math.sqrt(len(base))))
  rows = base.astype(np.float32)
  keys = {HNSW: 'HNSW32',
          'faiss Megatron Retro': f'OPQ32_64,IVF{lists}_HNSW32,PQ32np' if base.shape[1] >= 64
                                  else f'OPQ16_32,IVF{lists}_HNSW32,PQ16np',
          'faiss IVF-SQ8': f'IVF{lists}_HNSW32,SQ8'}
  for system, key in keys.items():
    start = time.process_time()
    index = faiss.index_factory(base.shape[1], key)
    index.train(rows)
    index.add(rows)
    seconds = time.process_time() - start
    print(f'{key}: built in {seconds:.1f} CPU s', flush=True)
    size = len(faiss.serialize_index(index)) / len(base)
    name = 'efSearch' if system == HNSW else 'nprobe'
    for effort in EFFORTS[name]:
      if name == 'nprobe' and effort > lists:
        continue
      yield Point(system, f'{key}, {name} {effort}', faiss_search(index, name, effort, k), size,
                  False, seconds)
    if 'PQ' in key:
      search = faiss_search(index, name, 32, 25 * k)
      yield Point(f'{system}, best {25 * k} re-scored', f'{key}, {name} 32',
                  lambda q, s=search: rescored(q, base, s(q), k), size, True, seconds)


def faiss_search(index: Any, name: str, effort: int, k: int) -> Callable[[np.ndarray], np.ndarray]:
  import faiss

  def search(queries: np.ndarray) -> np.ndarray:
    faiss.ParameterSpace().set_index_parameter(index, name, effort)
    return index.search(queries, k)[1]

  return search


def rescored(queries: np.ndarray, base: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
  """The k of `ids` that are nearest by exact distance."""
  order = np.argsort(squared_distances(queries, base, ids), -1, kind='stable')[:, :k]
  return np.take_along_axis(ids, order, -1)


def claims(points: list[Point], k: int) -> list[dict[str, Any]]:
  """What the documentation says, judged on these points."""
  ours = [p for p in points if p.system.startswith(OURS) and p.recall >= RECALL]
  if not ours:
    return [{'text': f'recall@{k} of {RECALL} is reached', 'holds': False, 'ratio': 0}]
  fast = min((p for p in ours if p.rescored), key=lambda p: np.median(p.seconds))
  flat = next(p for p in points if p.system == FLAT)
  ratio = float(np.median(np.divide(flat.seconds, fast.seconds)))
  where = f'{fast.system} ({fast.setting}) at recall@{k} {fast.recall:.4f}'
  result = [{'text': f'{where}: {ratio:.1f} x the queries per CPU second of faiss flat (5 wanted)',
             'holds': ratio >= 5, 'ratio': ratio}]
  hnsw = sorted((p for p in points if p.system == HNSW), key=lambda p: p.recall)
  equal = seconds_at_recall(hnsw, fast.recall)
  if equal is not None:
    ratio = equal / float(np.median(fast.seconds))
    result.append({'text': f'{where}: {ratio:.1f} x those of HNSW32 at equal recall (2 wanted)',
                   'holds': ratio >= 2, 'ratio': ratio})
  for kind, chosen in (('re-scored from the stored embeddings', [p for p in ours if p.rescored]),
                       ('by the index alone', [p for p in ours if not p.rescored])):
    small = min(chosen, key=lambda p: (p.bytes_per_vector, np.median(p.seconds)), default=None)
    if small:
      result.append({
          'text': f'{kind}: {small.bytes_per_vector:.0f} bytes a vector (at most 1,000 wanted) at '
                  f'recall@{k} {small.recall:.4f}: {small.system} ({small.setting})',
          'holds': small.bytes_per_vector <= 1000, 'ratio': small.bytes_per_vector / 1000})
  return result


def seconds_at_recall(points: list[Point], recall: float) -> float | None:
  """Time of a family at a recall between two of its points: log of time linear in recall."""
  for low, high in zip(points, points[1:]):
    if low.recall <= recall <= high.recall:
      share = (recall - low.recall) / max(high.recall - low.recall, 1e-9)
      a, b = (math.log(float(np.median(p.seconds))) for p in (low, high))
      return math.exp(a + share * (b - a))
  return None


def table(result: dict[str, Any]) -> str:
  """The points as a Markdown table."""
  lines = [f'| system | setting | recall@{result["k"]} | queries / CPU s | of flat | '
           'one query, CPU ms | bytes / vector | build, CPU s |',
           '|---|---|---|---|---|---|---|---|']
  flat = result['points'][0]['queries_per_cpu_second']
  for p in result['points']:
    more = ' + embeddings' if p['reads_stored_embeddings'] else ''
    lines.append(
        f'| {p["system"]} | {p["setting"]} | {p["recall"]:.4f} | '
        f'{p["queries_per_cpu_second"]:,.0f} | {p["queries_per_cpu_second"] / flat:.1f} x | '
        f'{p["one_query_ms"]:.2f} | {p["bytes_per_vector"]:,.0f}{more} | '
        f'{p["build_cpu_seconds"]:,.0f} |')
  return '\n'.join(lines)


def draw(result: dict[str, Any], path: str) -> None:
  """Recall against speed, all of it and the part that matters; area is bytes a vector."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, panels = pyplot.subplots(1, 2, figsize=(13, 6), sharey=True)
  systems: dict[str, list[dict[str, Any]]] = {}
  for point in result['points']:
    systems.setdefault(point['system'], []).append(point)
  for number, (system, points) in enumerate(systems.items()):
    points = sorted(points, key=lambda p: p['recall'])
    x = [p['recall'] for p in points]
    y = [p['queries_per_cpu_second'] for p in points]
    area = [max(8, p['bytes_per_vector'] / 8) for p in points]
    for panel in panels:
      line, = panel.plot(x, y, '--' if 'not re-scored' in system else '-', alpha=0.5,
                         color=pyplot.cm.tab20(number % 20))
      panel.scatter(x, y, s=area, color=line.get_color(),
                    label=f'{system}, {points[0]["bytes_per_vector"]:,.0f} B')
  panels[0].set(xlabel=f'recall@{result["k"]}', ylabel='queries per CPU second', yscale='log',
                title='all')
  panels[1].set(xlabel=f'recall@{result["k"]}', xlim=(0.9, 1.003), title='recall above 0.9')
  panels[1].axvline(RECALL, color='grey', linewidth=0.8)
  for panel in panels:
    panel.grid(alpha=0.3)
  legend = figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncol=3,
                         fontsize=9)
  for handle in legend.legend_handles:
    handle.set_sizes([40])
  figure.suptitle(f'{result["vectors"]:,} vectors of {result["dimension"]}, '
                  f'{result["queries"]:,} queries; area: bytes a vector in the index')
  figure.tight_layout(rect=(0, 0.16, 1, 1))
  figure.savefig(path, dpi=110)


if __name__ == '__main__':
  main()
