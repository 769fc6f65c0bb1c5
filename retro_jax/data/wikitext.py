"""WikiText as a source of documents: articles of its plain files, with their number of words.

WikiText (Merity et al. 2016) is one file of many articles. A line ' = Title = ' begins one,
' = = Section = = ' does not, nor does a formula ' = 1 rad / s and k = ', which no empty line
precedes; in copies without empty lines the two cannot be told apart. Its perplexities are a
word: what counts as one, here and in the literature, is every token by white space and the
end of every line. Other files of text are corpus.py's business.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from retro_jax.data import corpus
from retro_jax.data.corpus import Document, Report
from retro_jax.data.input_files import find_files

WORDS = 'words'  # metadata of a document: how many it has in WikiText's own counting
_TITLE = re.compile(r' = ([^=\s](?:[^=]*[^=\s])?) = ?\r?\n?')


@dataclasses.dataclass(frozen=True)
class WikiText:
  """One document an article of files in WikiText's format, plain or gzip; a shard is a file.

  The text stays as it is, ' @-@ ' and '<unk>' included. What stands before the first title
  belongs to the first article. `words` in the metadata counts the lines that the file has:
  copies without the empty lines have fewer words than the original.

  Attributes:
    pattern: which files, see `files.glob`.
  """
  pattern: str
  report: Report = corpus.report_field()

  def shards(self) -> list['WikiTextShard']:
    """One a file, in order of path."""
    return [WikiTextShard(file) for file in find_files(self.pattern)]

  def documents(self) -> Iterator[Document]:
    """Articles in order of path and line.

    Raises:
      UserError: the pattern names no file, a file cannot be read, or none has text.
    """
    return corpus.chain(self.shards(), self.report, self.pattern)

  def describe(self) -> dict[str, Any]:
    return corpus.describe_shards('wikitext', self.shards())


@dataclasses.dataclass(frozen=True)
class WikiTextShard(corpus.FileShard):
  """One file."""

  def documents(self) -> Iterator[Document]:
    corpus.reset(self.report)
    title, first, lines, replaced = '', 1, [], False
    empty_lines, after_empty = False, True
    for number, raw in enumerate(self.file.lines(), start=1):
      line, bad = corpus.decode_utf8(raw)
      match = _TITLE.fullmatch(line)
      if match and (after_empty or not empty_lines):
        if title:
          yield self._document(title, first, lines, replaced)
          lines, replaced, first = [], False, number
        title = match[1]
      after_empty = line.isspace()
      empty_lines |= after_empty
      lines.append(line)
      replaced |= bad
    if lines:
      yield self._document(title, first, lines, replaced)

  def _document(self, title: str, first: int, lines: Sequence[str], replaced: bool) -> Document:
    text = ''.join(lines)
    self.report.count(text, replaced)
    # Titles repeat now and then, places do not.
    place = f'{self.name}:{first}'
    return Document(id=place, text=text, title=title, source='wikitext', place=place,
                    metadata={WORDS: len(text.split()) + len(lines)})

  def describe(self) -> dict[str, Any]:
    return {'kind': 'wikitext', 'file': self.name, 'file_bytes': self.file.bytes,
            'content': self.file.checksum()}
