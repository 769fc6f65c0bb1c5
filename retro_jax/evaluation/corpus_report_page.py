"""The page of a corpus report: its numbers in words, tables and pictures.

The numbers are made in corpus_report.py, the pictures in corpus_picture.py.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro_jax.evaluation import corpus_picture, html_page
from retro_jax.evaluation.html_page import text

PAGE, CORPUS_PICTURE = 'report.html', 'corpus.png'
_EXCERPT = 80
# A chunk that more of the others retrieve is named among the first sentences.
_HUB = 0.05
_TITLE = 'What this database holds and what its neighbours are worth'


def write(folder: str | os.PathLike, body: Mapping[str, Any]) -> Path:
  """Writes the page and its pictures into `folder`; returns the path of the page.

  Args:
    folder: for `report.html`, `corpus.png` and a `neighbors-NAME.png` for each examples.
    body: JSON of `corpus_report.measure`.
  """
  folder = Path(folder)
  corpus_picture.corpus_picture(folder / CORPUS_PICTURE, body['corpus'])
  parts = [html_page.facts({
      'database': body['database']['folder'], 'fingerprint': body['database']['fingerprint'],
      'embedder': _pairs(body['database']['embedder'] or {}) or 'none',
      'index': _index(body['index'])}), _headlines(body), *_corpus(folder, body)]
  for name, facts in body['neighbors'].items():
    picture = folder / f'neighbors-{name}.png'
    corpus_picture.neighbors_picture(picture, facts)
    parts += _neighbors(picture, name, facts)
  path = folder / PAGE
  html_page.write(path, _TITLE, '\n'.join(parts))
  return path


def headlines(body: Mapping[str, Any]) -> list[str]:
  """The few sentences a person needs first, as plain text."""
  corpus = body['corpus']
  said = [f'{corpus["documents"]:,} documents, {corpus["chunks"]:,} chunks, '
          f'{corpus["tokens"]:,} tokens, {corpus["text_bytes"] / 1e6:,.1f} MB of text, '
          f'{corpus["bytes_per_token"]:.2f} bytes a token']
  for name, facts in body['neighbors'].items():
    rows = {(row['measure'], row['part'], row['k']): row for row in facts['potential']['rows']}
    ks = facts['potential']['ks']
    k = 2 if 2 in ks else ks[-1]
    row = rows.get(('bigrams', 'NF', k))
    if row:
      said.append(
          f'{name}: of the bigrams of the next chunk, {_percent(row["nearest"])} are found in the '
          f'{k} {facts["kind"]} neighbours and {_percent(row["random"])} in {k} random ones '
          f'(difference {_percent(row["gain"])}, 95 % interval {_percent(row["gain_low"])} to '
          f'{_percent(row["gain_high"])})')
    if facts['hubs'] and facts['hubs'][0]['share'] > _HUB:
      hub = facts['hubs'][0]
      said.append(f'{name}: one chunk of {hub["title"] or hub["document"]!r} is a neighbour of '
                  f'{_percent(hub["share"])} of all chunks: {_short(hub["text"])}; such a chunk '
                  'takes the place of real neighbours')
    near = facts['near_duplicates']
    said.append(f'{name}: {_percent(near["share"])} of chunks have a near-duplicate as nearest '
                f'neighbour (a common run above {near["threshold"]:g} of the chunk)')
  return said


def _headlines(body: Mapping[str, Any]) -> str:
  return '<ul>' + ''.join(f'<li>{text(said)}.</li>' for said in headlines(body)) + '</ul>'


def _corpus(folder: Path, body: Mapping[str, Any]) -> list[str]:
  corpus, m = body['corpus'], body['database']['chunk_length']
  chunks, copies, documents = corpus['chunks'], corpus['copies'], corpus['document_lengths']
  rows = [
      ('documents', f'{corpus["documents"]:,}'),
      ('documents removed', f'{corpus["removed_documents"]:,}'),
      ('chunks', f'{chunks:,}'), ('chunk length m', m),
      ('tokens', f'{corpus["tokens"]:,}'), ('bytes of text', f'{corpus["text_bytes"]:,}'),
      ('bytes a token', f'{corpus["bytes_per_token"]:.3f}'),
      ('tokens a document, mean', f'{documents["mean"]:,.0f}'),
      *((f'tokens a document, {p} % have fewer', f'{value:,.0f}')
        for p, value in documents['percentiles'].items()),
      ('full chunks', _share(corpus['chunk_lengths'][m], chunks)),
      ('empty chunks', _share(corpus['empty_chunks'], chunks)),
      (f'short chunks (fewer than {corpus["short_below"]} tokens)',
       _share(corpus['short_chunks'], chunks)),
      ('chunks that are an exact copy of another one', _percent(copies['extra'])),
      ('chunks that occur more than once', _percent(copies['with_copies']))]
  compared = ('' if copies['compared'] == copies['seen'] else
              f' Copies were looked for among {copies["compared"]:,} of {copies["seen"]:,} chunks,'
              ' chosen by a hash of their tokens.')
  sources = corpus['sources']
  read = ('' if sources['documents_read'] == corpus['documents'] else
          f' Sources were read from a random {sources["documents_read"]:,} of the documents.')
  table = html_page.table(
      ('source', 'documents', 'tokens', 'bytes'),
      [(name or '(none)', f'{row["documents"]:,}', f'{row["tokens"]:,}', f'{row["text_bytes"]:,}')
       for name, row in sources['by_source'].items()])
  return ['<h2>The corpus</h2>', html_page.table(('', ''), rows),
          f'<p>{text("Counted over the whole store." + compared + read)}</p>',
          html_page.picture(folder / CORPUS_PICTURE,
                            'Histograms of the tokens of chunks and of documents'), table]


def _neighbors(picture: Path, name: str, facts: Mapping[str, Any]) -> list[str]:
  chunks, near, gain = facts['chunks'], facts['near_duplicates'], facts['potential']
  rows = [
      ('neighbours stored a chunk', facts['num_neighbors']),
      ('chunks with fewer', _share(facts['chunks_with_fewer'], chunks)
       if chunks else _percent(facts['fewer_neighbors'])),
      *((f'candidates turned away: {reason.replace("_", " ")}', f'{n:,}')
        for reason, n in facts['dropped'].items()),
      ('nearest neighbour is a near-duplicate *', _percent(near['share'])),
      ('nearest neighbour is identical *', _percent(near['identical']))]
  header = ['found', 'in', 'k', facts['kind'], '95 % interval', 'random', '95 % interval',
            'difference', '95 % interval']
  interval = lambda row, kind: f'{_percent(row[kind + "_low"])} to {_percent(row[kind + "_high"])}'
  parts = {'N': 'N', 'F': 'F', 'NF': '[N, F]'}
  gains = [(row['measure'], parts[row['part']], row['k'],
            _percent(row['nearest']), interval(row, 'nearest'),
            _percent(row['random']), interval(row, 'random'),
            _percent(row['gain']), interval(row, 'gain')) for row in gain['rows']]
  sample = facts['sample']
  return [
      f'<h2>{text(facts["kind"].capitalize())} neighbours of {text(name)}</h2>',
      html_page.table(('', ''), rows),
      f'<p>* On a random sample of {sample["chunks"]:,} chunks, seed {sample["seed"]}; the nearest '
      'of another document counts, and a near-duplicate shares with the chunk a run of more than '
      f'{near["threshold"]:g} m tokens.</p>',
      html_page.picture(picture, f'Distances, overlap and potential of the neighbours of {name}'),
      '<p>The chunks that were retrieved most often, and for what share of the sample:</p>',
      html_page.table(('document', 'text', 'share'),
                      [(hub['title'] or hub['document'], _short(hub['text']),
                        _percent(hub['share'])) for hub in facts['hubs']], left=2),
      '<h2>How much there is to gain</h2>',
      '<p>A model reads the neighbours of a chunk while it predicts the next one. Here is how much '
      'of the next chunk is found in them: its tokens, its pairs of tokens, and the longest run it '
      'shares with one of them, as a share of m. Random neighbours come from other documents of '
      'the same database; what they give, any text gives. On the '
      f'{gain["chunks"]:,} of the sampled chunks that another one of their document follows; '
      f'intervals are over {gain["documents"]:,} resampled documents.</p>',
      html_page.table(header, gains, left=2)]


def _index(index: Mapping[str, Any] | None) -> str:
  if not index:
    return 'none given'
  said = f'{index["method"]}, {index["kind"]}, {index["size"]:,} chunks in {index["parts"]:,} parts'
  if recall := index.get('recall'):
    said += (f', recall@{recall["at"]} {recall["recall"]:.4f} against exact search on '
             f'{recall["sample"]:,} chunks, {recall["self_recall"]:.4f} find themselves')
  return said


def _short(words: str) -> str:
  """The beginning of a chunk, quoted, for one cell of a table."""
  return repr(words[:_EXCERPT]) + (' …' if len(words) > _EXCERPT else '')


def _pairs(values: Mapping[str, Any]) -> str:
  return ', '.join(f'{name} {value}' for name, value in values.items())


def _share(part: int, whole: int) -> str:
  return f'{part:,} ({_percent(part / max(whole, 1))})'


def _percent(share: float) -> str:
  return f'{100 * share:.2f} %'
