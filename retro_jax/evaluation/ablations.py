"""One set of held-out documents, scored by the models and in the retrieval settings that matter.

`baseline` (the same decoder trained without retrieval), `retro_off`, `retro_on` and
`retro_random` (neighbours that were not retrieved for the text) are the four whose order
says whether retrieval is used. Sweeps change one thing of `retro_on` at a time: k, the half of
a neighbour that is seen, whose neighbours they are, which database they come from. Scoring is
in token_scores.py, files in results.py.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from retro_jax.data.records import Examples
from retro_jax.data.windows import Documents, Reading
from retro_jax.errors import UserError
from retro_jax.evaluation import token_scores
from retro_jax.evaluation.bits_per_byte import Score
from retro_jax.evaluation.token_scores import TokenScores
from retro_jax.training import checkpoints, partitioning

# What is shown of a neighbour, by the name of the setting.
_PARTS = {'N and F': 'NF', 'N only': 'N', 'F only': 'F', 'neither': ''}


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """How held-out text is scored.

  Attributes:
    batch_size: windows a batch, over all devices.
    max_examples: only the documents that begin in the first so many sequences; 0: all.
    num_neighbors: k read; 0: as in training.
    stride: tokens between windows of n tokens inside a document; 0 is n / 2, as in the paper; n
      scores the stored sequences as they lie, which is half the work.
  """
  batch_size: int = 8
  max_examples: int = 0
  num_neighbors: int = 0
  stride: int = 0


@dataclasses.dataclass(frozen=True)
class SweepConfig:
  """What else is scored with the same RETRO.

  Attributes:
    neighbors: values of k; those above what the examples hold are left out, and said to be.
    parts: whether to show it [N, F], N only, F only and neither.
    shuffled: whether to give each chunk the neighbours of a chunk of another document.
    examples: further folders of examples by name, of the same texts with neighbours from
      another database or retriever, read with the k of `retro_on`.
    seed: of the shuffle.
  """
  neighbors: tuple[int, ...] = ()
  parts: bool = False
  shuffled: bool = False
  examples: Mapping[str, str] = dataclasses.field(default_factory=dict)
  seed: int = 0

  def __post_init__(self):
    if any(k < 0 for k in self.neighbors):
      raise UserError(f'SweepConfig.neighbors = {self.neighbors}, expected numbers from 0')


@dataclasses.dataclass(frozen=True)
class Setting:
  """One way to score the documents.

  Attributes:
    name: in `results.json`.
    model: folder of a run or exported model.
    reading: what it is given.
    examples: folder that the neighbours come from.
    sweep: which sweep it belongs to: 'neighbors', 'parts', 'control' or 'database'; '' for the
      four settings.
  """
  name: str
  model: str
  reading: Reading
  examples: str
  sweep: str = ''


class Scorer:
  """Scores settings over the same documents; each model is loaded and each pass made once.

  Attributes:
    documents: what is scored.
  """

  def __init__(self, examples: str, config: EvaluationConfig,
               mesh_config: partitioning.MeshConfig, folder: str | os.PathLike | None = None):
    """
    Args:
      examples: folder of retrieval examples with the neighbours to judge.
      config: how.
      mesh_config: devices.
      folder: where scores are kept from run to run; None for nowhere.

    Raises:
      UserError: no examples there, or a stride or batch that does not fit.
    """
    self.documents = Documents(Examples(examples), config.max_examples)
    self._config, self._folder = config, folder and Path(folder)
    self._mesh = partitioning.make_mesh(mesh_config)
    self.model = functools.cache(
        functools.partial(token_scores.load, examples=self.documents.examples))
    self._examples = functools.cache(Examples)
    self._made: dict[Any, TokenScores] = {}

  def __call__(self, setting: Setting) -> TokenScores:
    """The scores of one setting; prints its bits-per-byte.

    Raises:
      UserError: a model and examples of different vocabularies or chunk lengths, more
        neighbours than there are, or a baseline that is to read some.
    """
    model = self.model(setting.model)
    reading = setting.reading if setting.reading.num_neighbors else Reading(0)
    neighbors = self._examples(setting.examples) if reading.num_neighbors else None
    key = (model.fingerprint, reading, neighbors and neighbors.fingerprint)
    if key not in self._made:
      self._made[key] = token_scores.score(
          model, self.documents, reading, self._mesh, batch_size=self._config.batch_size,
          stride=self._config.stride, neighbors=neighbors, label=setting.name,
          folder=self._folder and self._folder / setting.name.replace(' ', '_'))
    value = self._made[key].score().bits_per_byte
    print(f'evaluate: {setting.name:13s} {value:.4f} bits per byte', flush=True)
    return self._made[key]

  def check(self, settings: Iterable[Setting]) -> None:
    """Refuses settings that cannot all be scored, before the first one is.

    Raises:
      UserError: as calling it, and two settings of one name.
    """
    seen = set()
    for setting in settings:
      if setting.name in seen or '/' in setting.name:
        raise UserError(f'SweepConfig.examples: {setting.name!r} is no name for a setting; choose '
                        'one that no other has, without "/"')
      seen.add(setting.name)
      token_scores.check(self.model(setting.model).config, self.documents, setting.reading,
                         self._examples(setting.examples))

  def protocol(self) -> dict[str, Any]:
    """How it is scored, in words that `results.json` keeps."""
    n = self.documents.examples.shape.sequence_length
    return {'window': n, 'stride': self._config.stride or n // 2,
            'documents': len(self.documents), 'chunks': self.documents.num_chunks,
            'whole_split': not self._config.max_examples}


def read_neighbors(retro: str, config: EvaluationConfig) -> int:
  """k of `retro_on`: that of the settings, or that of training.

  Raises:
    UserError: no model there.
  """
  return config.num_neighbors or checkpoints.read_model_description(retro)[0].num_neighbors


def main_settings(retro: str, baseline: str, examples: str, random_examples: str,
                  config: EvaluationConfig) -> list[Setting]:
  """The four settings, without those whose model or examples are ''.

  Raises:
    UserError: nothing is left, or no model is there.
  """
  result = []
  if baseline:
    result.append(Setting('baseline', baseline, Reading(0), examples))
  if retro:
    k = read_neighbors(retro, config)
    result += [Setting('retro_off', retro, Reading(0), examples),
               Setting('retro_on', retro, Reading(k), examples)]
    if random_examples:
      result.append(Setting('retro_random', retro, Reading(k), random_examples))
  if not result:
    raise UserError('nothing to evaluate; name a model (retro or baseline) and its examples')
  return result


def sweep_settings(retro: str, examples: str, config: EvaluationConfig, sweep: SweepConfig
                   ) -> tuple[list[Setting], list[str]]:
  """What a sweep adds to the four settings, and a sentence for each value it cannot score.

  Raises:
    UserError: no model or examples there.
  """
  k, held = read_neighbors(retro, config), Examples(examples).shape.num_neighbors
  result, left_out = [], []
  for value in sorted(set(sweep.neighbors)):
    if value <= held:
      result.append(Setting(f'k={value}', retro, Reading(value), examples, 'neighbors'))
    else:
      left_out.append(f'k={value}: {examples} holds {held} neighbours a chunk')
  if sweep.parts:
    result += [Setting(name, retro, Reading(k, parts), examples, 'parts')
               for name, parts in _PARTS.items()]
  if sweep.shuffled:
    result.append(Setting('shuffled', retro, Reading(k, shuffled=True, seed=sweep.seed), examples,
                          'control'))
  for name, folder in sweep.examples.items():
    result.append(Setting(name, retro, Reading(k), folder, 'database'))
  return result, left_out


def compare(retro: str, baseline: str, examples: str, random_examples: str,
            config: EvaluationConfig, mesh_config: partitioning.MeshConfig) -> dict[str, Score]:
  """The four settings, by name, each summed by document; those without material are left out.

  Args:
    retro, baseline: folders of runs or exported models.
    examples: folder of retrieval examples with the neighbours to judge.
    random_examples: the same sequences with random neighbours.
    config: how.
    mesh_config: devices.

  Raises:
    UserError: as `Scorer`, or nothing to score.
  """
  settings = main_settings(retro, baseline, examples, random_examples, config)
  scorer = Scorer(examples, config, mesh_config)
  return {setting.name: scorer(setting).score() for setting in settings}
