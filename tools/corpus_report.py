"""A report on a chunk database: python tools/corpus_report.py --gin_file=gin/data/report.gin ... .

Sizes, copies and sources of the corpus, and what its neighbours could give a model before one
is trained: report.html, pictures and results.json. The numbers are made in
retro_jax/evaluation/corpus_report.py and potential.py.
"""

import dataclasses
from pathlib import Path

from retro_jax import configuration
from retro_jax.errors import UserError
from retro_jax.evaluation import corpus_report, corpus_report_page, results
from retro_jax.evaluation.chunk_samples import StoredChunks
from retro_jax.evaluation.corpus_report import ReportConfig
from retro_jax.retrieval.database import ChunkDatabase
from retro_jax.retrieval.sharded_index import Index

CONFIGURABLES = (ReportConfig,)


@dataclasses.dataclass(frozen=True)
class CorpusReportJob:
  """What to report on, and where.

  Attributes:
    report: folder for the report.
    database: chunk store.
    index: folder of the index over it; '' for none.
    examples: folders of retrieval examples with neighbours from it; a single one may stand for
      itself. The report calls them by the names of their folders.
    config: how closely to look.
  """
  report: str
  database: str
  index: str = ''
  examples: tuple[str, ...] | str = ()
  config: ReportConfig = ReportConfig()


def run(job: CorpusReportJob) -> None:
  """Measures, then writes numbers, pictures and page."""
  database = ChunkDatabase.open(job.database)
  index = Index.open(job.index, database) if job.index else None
  folders = (job.examples,) if isinstance(job.examples, str) else tuple(job.examples)
  examples: dict[str, StoredChunks] = {}
  for folder in filter(None, folders):
    if Path(folder).name in examples:
      raise UserError(f'{folder}: another folder of examples has this name too; rename one')
    examples[Path(folder).name] = StoredChunks(folder, database=job.database)
  body = corpus_report.measure(database, examples, index, job.config)
  path = results.write(job.report, job, body)
  page = corpus_report_page.write(job.report, body)
  print('\n'.join(corpus_report_page.headlines(body)))
  print(f'report: {page}; numbers in {path}')


if __name__ == '__main__':
  configuration.main(CorpusReportJob, run, CONFIGURABLES)
