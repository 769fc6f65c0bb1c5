"""Counts the parameters of the paper's four models from their gin files, allocating nothing.

  python tools/count_parameters.py [--output=FILE]

Prints JSON by model: `baseline_non_embedding` and `retro_non_embedding` count the weight
matrices, as the paper's Table 2 does: its 172, 425, 1,451 M leave no room for norm scales and
attention biases, 0.01 to 0.05 % of a model, which are `baseline_vectors` and `retro_vectors`.
`embedding` is the decoder's table, which is READ as well, and `encoder_embedding` RETRO's
own for neighbours.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from retro_jax import configuration, storage  # pylint: disable=wrong-import-position
from retro_jax.errors import EXIT_CODE, UserError  # pylint: disable=wrong-import-position
from retro_jax.models.config import RetroConfig  # pylint: disable=wrong-import-position
from retro_jax.sweeps.sizes import (  # pylint: disable=wrong-import-position
    count_parameters as count,
)

# Each model and its baseline, as named in gin/models/.
MODELS = {'retro_172m': 'baseline_132m', 'retro_425m': 'baseline_368m',
          'retro_1_5b': 'baseline_1_3b', 'retro_7_5b': 'baseline_7b'}


@dataclasses.dataclass(frozen=True)
class CountJob:
  """What is resolved from one gin file."""

  model: RetroConfig


def model(name: str, *overlays: str) -> RetroConfig:
  """The config in `gin/models/{name}.gin`, changed by files that come after it.

  Raises:
    UserError: no such file, or settings that do not resolve.
  """
  line = configuration.CommandLine((f'gin/models/{name}.gin', *overlays),
                                   (('CountJob.model', '@RetroConfig()'),), False)
  return configuration.resolve(CountJob, (RetroConfig,), line).model


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--output', metavar='FILE', help='also write the JSON to this file')
  arguments = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')  # shapes only: no accelerator needs waking
  try:
    counts = {}
    for retro_name, baseline_name in MODELS.items():
      baseline, with_retrieval = count(model(baseline_name)), count(model(retro_name))
      counts[retro_name] = {
          'baseline_non_embedding': baseline['non_embedding'],
          'retro_non_embedding': with_retrieval['non_embedding'],
          'baseline_vectors': baseline['vectors'],
          'retro_vectors': with_retrieval['vectors'],
          'embedding': with_retrieval['embedding'],
          'encoder_embedding': with_retrieval['encoder_embedding']}
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(EXIT_CODE)
  print(json.dumps(counts, indent=2))
  if arguments.output:
    storage.write_json(arguments.output, counts)


if __name__ == '__main__':
  main()
