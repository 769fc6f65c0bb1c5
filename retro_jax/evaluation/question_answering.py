"""A set of questions, answered in the settings that tell whether passages are used.

`baseline` is a model without retrieval, `closed_book` the RETRO with cross-attention skipped,
`passages` the RETRO with those of each question, `shuffled` with those of another question,
none of which the question has itself. Writing answers is answering.py's business, what they
are worth answer_scores.py's; files are written by retro_jax/answer.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retro_jax.data.permutation import key, permute
from retro_jax.data.vocabulary import PAD_ID
from retro_jax.errors import UserError
from retro_jax.evaluation import answer_scores, token_scores
from retro_jax.evaluation.answering import Answerer
from retro_jax.evaluation.bits_per_byte import bootstrap
from retro_jax.evaluation.token_scores import Model
from retro_jax.retrieval.question_examples import QuestionExamples
from retro_jax.training import partitioning
from retro_jax.training.partitioning import MeshConfig

BASELINE, CLOSED_BOOK, PASSAGES, SHUFFLED = 'baseline', 'closed_book', 'passages', 'shuffled'
MEASURES = ('exact_match', 'f1')
_SHUFFLE = 5
# Images of the permutation that are tried for a question without a passage in common.
_TRIES = 64
_RECORDS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class AnsweringConfig:
  """How questions are answered.

  Attributes:
    batch_size: questions at a time, over all devices.
    num_passages: k read; 0: as in training.
    max_questions: only the first so many; 0: all.
    shuffled: whether to answer with the passages of other questions, too.
    seed: of the shuffle.
  """
  batch_size: int = 32
  num_passages: int = 0
  max_questions: int = 0
  shuffled: bool = True
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Asked:
  """Questions as the model gets them.

  Attributes:
    examples: where they come from.
    tokens: int32 [q, m].
    passages: int32 [q, K, r].
    ids: of the passages, int64 [q, K]; -1 where there is none.
  """

  examples: QuestionExamples
  tokens: np.ndarray
  passages: np.ndarray
  ids: np.ndarray

  def __len__(self) -> int:
    return len(self.tokens)

  def texts(self, question: int, count: int) -> list[str]:
    """The first `count` passages of a question, as far as there are so many."""
    rows = self.passages[question, :count][self.ids[question, :count] >= 0]
    return [self.examples.vocabulary.decode(row[row != PAD_ID].tolist()) for row in rows]


@dataclasses.dataclass(frozen=True)
class Answers:
  """What one setting gave.

  Attributes:
    texts: an answer a question.
    sources: int64 [q], whose passages were read; -1 for none.
    exact_match, f1: float64 [q].
    copied: bool [q], whether the answer stands in what was read.
  """

  texts: tuple[str, ...]
  sources: np.ndarray
  exact_match: np.ndarray
  f1: np.ndarray
  copied: np.ndarray


def read(examples: QuestionExamples, max_questions: int = 0) -> Asked:
  """The first questions of a folder, all for 0."""
  count = min(max_questions or len(examples), len(examples))
  m = examples.shape.chunk_length
  parts: dict[str, list[np.ndarray]] = {'tokens': [], 'neighbor_tokens': [], 'neighbor_ids': []}
  for first in range(0, count, _RECORDS_AT_ONCE):
    some = examples.read(np.arange(first, min(first + _RECORDS_AT_ONCE, count)))
    parts['tokens'].append(some['tokens'][:, :m])
    for name in ('neighbor_tokens', 'neighbor_ids'):
      parts[name].append(some[name][:, 0])
  return Asked(examples, *(np.concatenate(values) for values in parts.values()))


def others(ids: np.ndarray, seed: int) -> np.ndarray:
  """For each question another one with none of its passages: int64 [q].

  Args:
    ids: of the passages, int64 [q, K]; -1 where there is none.
    seed: another one, another choice.

  Raises:
    UserError: a question shares passages with all others.
  """
  def shared(questions: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    same = ids[questions][:, :, None] == ids[chosen][:, None, :]
    same &= ids[questions][:, :, None] >= 0
    return same.any((1, 2)) | (questions == chosen)

  everyone = np.arange(len(ids))
  result, todo = everyone.copy(), everyone
  for attempt in range(_TRIES):
    result[todo] = permute(todo, len(ids), key(seed, _SHUFFLE, attempt))
    todo = todo[shared(todo, result[todo])]
    if not todo.size:
      return result
  for question in todo:
    fit = everyone[~shared(np.full(len(ids), question), everyone)]
    if not fit.size:
      raise UserError('shuffled passages need questions with different ones, but one question '
                      'shares some with all others; take more questions, or '
                      'AnsweringConfig.shuffled = False')
    result[question] = fit[0]
  return result


def evaluate(asked: Asked, retro: str, baseline: str, config: AnsweringConfig,
             mesh_config: MeshConfig) -> tuple[dict[str, Answers], dict[str, Model], int]:
  """Every setting there is material for.

  Args:
    asked: the questions.
    retro, baseline: folders of runs or exported models; '' for none.
    config: how.
    mesh_config: devices.

  Returns:
    the answers by setting; the models by 'retro' and 'baseline'; k.

  Raises:
    UserError: models and questions that do not fit each other.
  """
  mesh = partitioning.make_mesh(mesh_config)
  folders = {'retro': retro, 'baseline': baseline}
  models = {name: token_scores.load(folder, asked.examples)
            for name, folder in folders.items() if folder}
  if not models:
    raise UserError('nothing to ask; name a model (retro or baseline)')
  k = 0
  settings: list[tuple[str, str, np.ndarray | None]] = []
  if 'baseline' in models:
    settings.append((BASELINE, 'baseline', None))
  if 'retro' in models:
    k = _num_passages(models['retro'], retro, asked, config)
    settings.append((CLOSED_BOOK, 'retro', None))
    settings.append((PASSAGES, 'retro', np.arange(len(asked))))
    if config.shuffled:
      settings.append((SHUFFLED, 'retro', others(asked.ids[:, :k], config.seed)))
  vocabulary = asked.examples.vocabulary
  answerers = {name: Answerer(model.config, model.parameters, vocabulary.size, mesh,
                              config.batch_size, asked.examples.shape.sequence_length)
               for name, model in models.items()}
  result = {}
  for name, model, sources in settings:
    passages = None if sources is None else asked.passages[sources, :k]
    tokens = answerers[model](asked.tokens, passages, name)
    texts = [vocabulary.decode(row.tolist()).strip() for row in tokens]
    result[name] = _scored(asked, texts, sources, k)
    print(f'answer: {name:11s} exact match {100 * result[name].exact_match.mean():.2f}, '
          f'F1 {100 * result[name].f1.mean():.2f}', flush=True)
  return result, models, k


def _num_passages(model: Model, folder: str, asked: Asked, config: AnsweringConfig) -> int:
  if not model.config.has_retrieval:
    raise UserError(f'{folder}: a baseline without CCA layers cannot read passages; '
                    'give it as the baseline')
  k = config.num_passages or model.config.num_neighbors
  held = asked.examples.shape.num_neighbors
  if not 1 <= k <= held:
    raise UserError(f'{asked.examples.folder}: holds {held} passages a question, {k} asked for; '
                    'build it with more or set num_passages')
  if model.config.retrieved_length != asked.examples.shape.retrieved_length:
    raise UserError(f'{folder} reads {model.config.retrieved_length} tokens of a passage, '
                    f'{asked.examples.folder} has {asked.examples.shape.retrieved_length}; '
                    'use a model with retrieved_length = 2 chunk_length')
  return k


def _scored(asked: Asked, texts: Sequence[str], sources: np.ndarray | None, k: int) -> Answers:
  questions = asked.examples.questions[:len(asked)]
  score = lambda measure: np.array([
      measure(text, question.answers) for text, question in zip(texts, questions)])
  if sources is None:
    copied = np.zeros(len(asked), bool)
  else:
    copied = np.array([answer_scores.occurs([text], asked.texts(source, k))
                       for text, source in zip(texts, sources.tolist())])
  return Answers(tuple(texts), np.full(len(asked), -1) if sources is None else sources,
                 score(answer_scores.exact_match), score(answer_scores.f1), copied)


def rows(answers: Mapping[str, Answers], source: str, k: int) -> list[dict[str, Any]]:
  """A row a setting: means over questions with 95 % bootstrap intervals; fractions of 1."""
  result = []
  for setting, given in answers.items():
    row: dict[str, Any] = {'setting': setting, 'source': source, 'questions': len(given.texts)}
    for measure in MEASURES:
      values = getattr(given, measure)
      low, high = bootstrap(lambda i, of=values: of[i].mean(), len(values), 0)
      row |= {measure: float(values.mean()), f'{measure}_low': low, f'{measure}_high': high}
    if setting in (PASSAGES, SHUFFLED):
      row |= {'k': k, 'copied': float(given.copied.mean())}
    result.append(row)
  return result


def gains(answers: Mapping[str, Answers]) -> dict[str, dict[str, float]]:
  """How much more `passages` has than each other setting, with paired 95 % intervals."""
  result = {}
  for setting, given in answers.items():
    if PASSAGES not in answers or setting == PASSAGES:
      continue
    found: dict[str, float] = {}
    for measure in MEASURES:
      more = getattr(answers[PASSAGES], measure) - getattr(given, measure)
      low, high = bootstrap(lambda i, of=more: of[i].mean(), len(more), 0)
      found |= {measure: float(more.mean()), f'{measure}_low': low, f'{measure}_high': high}
    result[f'over_{setting}'] = found
  return result


def answerable(asked: Asked, k: int) -> np.ndarray:
  """bool [q]: whether a right answer stands in the first k passages of the question."""
  return np.array([answer_scores.occurs(question.answers, asked.texts(i, k))
                   for i, question in enumerate(asked.examples.questions[:len(asked)])])
