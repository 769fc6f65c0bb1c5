"""A corpus that attacks whoever looks at it, for the tests of pages and of the terminal."""

from pathlib import Path

from retro_jax.data.corpus import Document, JsonLines
from retro_jax.data.vocabulary import Vocabulary
from retro_jax.evaluation.chunk_samples import StoredChunks
from retro_jax.retrieval import database_build, pipeline
from retro_jax.retrieval.database_build import DatabaseConfig
from retro_jax.retrieval.neighbor_build import ExamplesConfig
from tests import worlds

# Each would change the title of the page, or act on a terminal, if it were let.
ATTACKS = (
    '<script>document.title="HACKED"</script>',
    '</textarea></pre></style><script>document.title="HACKED"</script>',
    '<img src=x onerror="document.title=\'HACKED\'">',
    '"\'><svg onload=document.title="HACKED">',
    '<iframe srcdoc="<script>parent.document.title=\'HACKED\'</script>"></iframe>',
    '<a href="javascript:document.title=\'HACKED\'" autofocus onfocus=document.title="HACKED">',
    '<meta http-equiv="refresh" content="0;url=data:text/html,HACKED"> &lt;script&gt; <!--',
    '\x1b]0;HACKED\x07\x1b[2J\x1b[31m red \x1b[0m \x9b31m \x08\x08\r over \x00 \x7f',
    '\u202eabc\u202c \u2066x\u2069 \u200f\u061c \u2028 end',
)
# What may not reach a terminal; line feeds and tabs may.
ACTING = ([chr(code) for code in range(32) if chr(code) not in '\n\t']
          + [chr(code) for code in range(127, 160)]
          + list('\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c\u2028'))
FORBIDDEN_TAGS = {'script', 'iframe', 'svg', 'a', 'link', 'textarea', 'form', 'base', 'object'}


def stored(folder: Path, chunk_length: int = 64) -> tuple[StoredChunks, Vocabulary]:
  """Examples of a corpus whose texts, titles, ids and sources are all attacks."""
  rows = [Document(f'{i} {attack}', f'{attack} shared words of all of them {attack} {i}',
                   title=attack) for i, attack in enumerate(ATTACKS)]
  source: JsonLines = worlds.write_source(folder / 'in.jsonl', rows)
  store = database_build.build_chunk_database(
      folder / 'db', source, worlds.vocabulary(), DatabaseConfig(chunk_length), worlds.embedder())
  pipeline.build_index(folder / 'index', store)
  pipeline.build_examples(folder / 'examples', store, store, folder / 'index',
                          ExamplesConfig(2 * chunk_length, 2, margin=2))
  return StoredChunks(folder / 'examples'), worlds.vocabulary()
