"""A page over evaluations: python tools/evaluation_report.py --gin_file=... .

Numbers of any set of `results.json` beside what the paper leads to expect, with curves,
settings and what was not run: report.html, report.png and report.json.
"""

import dataclasses
from collections.abc import Mapping

from retro_jax import configuration
from retro_jax.evaluation import evaluation_report


@dataclasses.dataclass(frozen=True)
class EvaluationReportJob:
  """What to report on, and where.

  Attributes:
    report: folder for the report.
    results: folders with a `results.json`, by the name a reader shall see.
    runs: folders of training runs whose losses are drawn, by name.
  """
  report: str
  results: Mapping[str, str]
  runs: Mapping[str, str] = dataclasses.field(default_factory=dict)


def run(job: EvaluationReportJob) -> None:
  """Writes the three files."""
  page = evaluation_report.write(job.report, job.results, job.runs)
  print(f'report: {page}')


if __name__ == '__main__':
  configuration.main(EvaluationReportJob, run)
