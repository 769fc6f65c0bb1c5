"""HTML files that need nothing else and in which no text can act: frame, cells, tables.

No script, no network, and a policy in the head that forbids both. Every text passes through
`text`, which escapes it. What stands on a page is the business of report_page.py,
inspection_page.py and corpus_report_page.py.
"""

import base64
import codecs
import html
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax import storage
from retro_jax.data.vocabulary import PAD_ID, Vocabulary
from retro_jax.evaluation.visible import visible


def text(value: Any) -> str:
  """Any value as HTML text that also is safe inside quotes."""
  return html.escape(visible(value), quote=True)


def write(path: str | os.PathLike, title: str, body: str) -> None:
  """Writes one page.

  Args:
    path: of the HTML file.
    title: plain text.
    body: HTML; whoever made it has escaped the texts in it.
  """
  with storage.atomic_file(path) as f:
    f.write(_PAGE.format(title=text(title), style=_STYLE, body=body))


def facts(values: Mapping[str, Any]) -> str:
  """Names and values below each other."""
  return '<dl>' + ''.join(
      f'<dt>{text(name)}</dt><dd>{text(value)}</dd>' for name, value in values.items()) + '</dl>'


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
  """A table of plain texts; the first `left` columns are words, the others numbers."""
  def row(cells: Sequence[Any], tag: str) -> str:
    return '<tr>' + ''.join(
        f'<{tag}{" class=words" if i < left else ""}>{text(cell)}</{tag}>'
        for i, cell in enumerate(cells)) + '</tr>'
  return ('<div class="scroll"><table>' + row(header, 'th')
          + ''.join(row(cells, 'td') for cells in rows) + '</table></div>')


def picture(path: str | os.PathLike, words: str) -> str:
  """A PNG inside the page; `words` say what it shows to who cannot see it."""
  data = base64.b64encode(Path(path).read_bytes()).decode()
  return f'<img src="data:image/png;base64,{data}" alt="{text(words)}">'


def cell(heading: str, tokens: np.ndarray, kinds: np.ndarray, vocabulary: Vocabulary) -> str:
  """The text of some tokens under a heading, parts of it coloured.

  Args:
    heading: plain text.
    tokens: int [n]; padding stands for no text.
    kinds: names of CSS classes, str [n] or object [n]; '' for text that is not coloured.
    vocabulary: of the tokens.
  """
  pieces = [f'<mark class="{kind}">{text(part)}</mark>' if kind else text(part)
            for part, kind in marked(tokens, kinds, vocabulary)]
  body = ''.join(pieces) or f'<i>{text(no_text(tokens))}</i>'
  return f'<div class="cell"><h5>{text(heading)}</h5><div class="text">{body}</div></div>'


def no_text(tokens: np.ndarray) -> str:
  """What to say where tokens stand for no text."""
  if np.any(np.asarray(tokens) != PAD_ID):
    return 'no text: only tokens that begin or end documents'
  return 'the document ends here'


def marked(tokens: np.ndarray, kinds: np.ndarray, vocabulary: Vocabulary
           ) -> list[tuple[str, str]]:
  """Text of tokens in runs of one kind each, as (text, kind); runs without text are left out.

  A character whose bytes lie in two runs belongs to the one in which it ends.
  """
  kinds = np.asarray(kinds, object)
  edges = [0, *(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1), len(kinds)]
  decoder = codecs.getincrementaldecoder('utf-8')('replace')
  runs = []
  for first, last in zip(edges, edges[1:]):
    data = vocabulary.decode_bytes(np.asarray(tokens[first:last]).tolist())
    if part := decoder.decode(data, final=bool(last == len(kinds))):
      runs.append((part, str(kinds[first])))
  return runs


_STYLE = '''
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: #fff; color: #1b1b1b;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 1.6rem 0 .4rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h4 { font-size: .85rem; margin: .6rem 0 .2rem; grid-column: 1 / -1; overflow-wrap: anywhere; }
h5 { font-size: .75rem; font-weight: 600; color: #555; margin: 0 0 .2rem; }
small { font-weight: 400; color: #555; } img { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0; }
th, td { text-align: right; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.words { text-align: left; } .prose th, .prose td { white-space: normal; vertical-align: top; }
.scroll + h3, .prose + h3, dl + h3 { margin-top: 1.4rem; }
.sequence { margin: 1rem 0; border-top: 2px solid #0072b2; padding-top: .5rem; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
article { margin: 1rem 0 2rem; padding: .8rem; background: #f6f7f8; border-radius: 6px; }
.row { display: grid; grid-template-columns: 1fr 1fr; gap: 0 .6rem; }
.cell { min-width: 0; background: #fff; border: 1px solid #ccd; border-radius: 4px;
  padding: .4rem .5rem; }
.query .cell { border: 2px solid #0072b2; }
.neighbor .cell:last-child { border-style: dashed; background: #fdfbf4; }
.text { font: 12.5px/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; tab-size: 4; unicode-bidi: isolate; }
mark { background: #ffdf80; color: inherit; border-bottom: 1px solid #b07800; }
mark.asked { background: #cfe6f7; border-color: #0072b2; }
mark.both { background: #cdeccf; border-color: #2b7a34; }
mark.prompt { background: none; color: #666; border: 0; }
mark.prompt.next { background: #ffdf80; }
mark.begins { background: none; border-bottom: 2px solid #555; }
mark.asked.begins, mark.next.begins, mark.both.begins { border-bottom: 2px solid; }
mark.asked.begins { background: #cfe6f7; } mark.next.begins { background: #ffdf80; }
mark.both.begins { background: #cdeccf; }
.flag { display: inline-block; margin-left: .4rem; padding: 0 .4rem; border-radius: 3px;
  background: #a24a00; color: #fff; font-size: .75rem; font-weight: 600; }
.bits { font-size: .8rem; font-weight: 600; white-space: normal; }
.better { color: #00569c; } .worse { color: #a24a00; }
.none { color: #555; margin: .6rem 0 0; }
@media (max-width: 44rem) { body { padding: .6rem; } article { padding: .5rem; }
  .row { grid-template-columns: 1fr; gap: .3rem; } }
'''

_PAGE = '''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
'''
