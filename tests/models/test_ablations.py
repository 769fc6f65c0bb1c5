"""The overlays in gin/ablations: each changes a model, and what its comment says is the paper's."""

import re
from pathlib import Path

import pytest

from tools import count_parameters

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = sorted(file.stem for file in (ROOT / 'gin' / 'ablations').glob('*.gin')
                  if file.stem != 'retro_tiny')
# Bits per byte on C4 of the paper's Table 13; None for what it does not have.
TABLE_13 = {'no_query_conditioning': 0.829, 'no_cca_positions': 0.826, 'shared_embeddings': 0.823,
            'encoder_6_layers': 0.821, 'one_neighbor': 0.858, 'four_neighbors': 0.847,
            'cca_first': 0.827, 'cca_middle': 0.823, 'cca_last': 0.831,
            'cca_every_third_from_1': 0.823, 'cca_everywhere': 0.860, 'relative_positions': None,
            'rotary_positions': None, 'separate_embeddings': None}


@pytest.mark.parametrize('overlay', OVERLAYS)
def test_each_changes_a_model(overlay):
  changes_back = {'separate_embeddings': 'retro_study', 'relative_positions': 'retro_study'}
  name = changes_back.get(overlay, 'retro_172m')
  assert count_parameters.model(name, f'gin/ablations/{overlay}.gin') != (
      count_parameters.model(name))


@pytest.mark.parametrize('overlay', OVERLAYS)
def test_the_comment_has_the_number_of_the_paper(overlay):
  text = (ROOT / 'gin' / 'ablations' / f'{overlay}.gin').read_text()
  found = re.search(r'Table 13: ([\d.]+)', text)
  assert (float(found[1]) if found else None) == TABLE_13[overlay]


def test_all_overlays_are_known():
  assert set(OVERLAYS) == set(TABLE_13)
