"""Answer questions and score the answers: python -m retro_jax.answer --gin_file=... .

Closed book, with the passages of each question, and with those of another as a control.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from retro_jax import configuration, storage
from retro_jax.evaluation import question_answering, question_page, report, results
from retro_jax.evaluation.question_answering import AnsweringConfig
from retro_jax.retrieval.question_examples import QuestionExamples
from retro_jax.training.partitioning import MeshConfig

CONFIGURABLES = (AnsweringConfig, MeshConfig)
ANSWERS, PAGE = 'answers.jsonl', 'answers.html'


@dataclasses.dataclass(frozen=True)
class AnswerJob:
  """What to ask whom, and where `results.json`, `answers.jsonl` and `answers.html` go.

  Attributes:
    output: folder for the three.
    examples: questions, built by tools/build_qa_examples.py.
    retro: folder of a RETRO run or exported model; '' for none.
    baseline: folder of a model without retrieval, asked closed book; '' for none.
    shown: questions on the page.
    answering: how it is answered.
    mesh: devices.
  """
  output: str
  examples: str
  retro: str = ''
  baseline: str = ''
  shown: int = 20
  answering: AnsweringConfig = AnsweringConfig()
  mesh: MeshConfig = MeshConfig()


def run(job: AnswerJob) -> dict[str, Any]:
  """Answers, scores, writes the three files and prints the table; returns the results.

  Raises:
    UserError: models and questions that do not fit each other.
  """
  asked = question_answering.read(QuestionExamples(job.examples), job.answering.max_questions)
  answers, models, k = question_answering.evaluate(
      asked, job.retro, job.baseline, job.answering, job.mesh)
  manifest = asked.examples.manifest
  rows = question_answering.rows(answers, job.examples, k)
  body: dict[str, Any] = {
      'fingerprints': {'examples': asked.examples.fingerprint,
                       'vocabulary': manifest['vocabulary'],
                       'models': {name: model.fingerprint for name, model in models.items()}},
      'questions': {'asked': len(asked), 'of': len(asked.examples),
                    'passages': manifest['inputs']['passages'], 'shortened': manifest['counts']},
      'rows': rows, 'gains': question_answering.gains(answers)}
  if k:
    body['questions'] |= {
        'k': k, 'answer_in_passages': float(question_answering.answerable(asked, k).mean())}
  path = results.write(job.output, job, body)
  _write_answers(Path(job.output) / ANSWERS, asked, answers)
  facts = {'examples': job.examples, 'questions': f'{len(asked):,} of {len(asked.examples):,}',
           'model': job.retro or job.baseline}
  if k:
    facts |= {'passages read': k, 'questions with a right answer in them':
              f'{100 * body["questions"]["answer_in_passages"]:.1f} %'}
  question_page.write(Path(job.output) / PAGE, asked, answers, k, rows, facts, job.shown)
  header, cells = question_page.table(rows)
  print('\n'.join(report.aligned([header, *cells])))
  print(f'answer: wrote {path}, {ANSWERS} and {PAGE}')
  return body


def _write_answers(path: Path, asked: question_answering.Asked,
                   answers: dict[str, question_answering.Answers]) -> None:
  """A line a question: what was asked, what is right, what was answered in each setting."""
  with storage.atomic_file(path) as f:
    for number, question in enumerate(asked.examples.questions[:len(asked)]):
      f.write(json.dumps({
          'id': question.id, 'question': question.text, 'answers': question.answers,
          **{setting: given.texts[number] for setting, given in answers.items()}},
          ensure_ascii=False) + '\n')


def main() -> None:
  configuration.main(AnswerJob, run, CONFIGURABLES)


if __name__ == '__main__':
  main()
