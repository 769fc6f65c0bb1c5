"""What every embedder offers, and what all of them share. The embedders: embedders.py."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from retro_jax import storage


class Embedder(Protocol):
  """What the rest of the package asks of an embedder."""

  @property
  def dimension(self) -> int:
    """Length d0 of a vector."""

  @property
  def fingerprint(self) -> str:
    """Sixteen hex digits that change when the vectors would."""

  def describe(self) -> dict[str, Any]:
    """Facts for a manifest, JSON-able; everything the vectors depend on."""

  def embed(self, texts: Sequence[str],
            on_progress: Callable[[int], None] | None = None) -> np.ndarray:
    """float32 [N, d0] in the order of `texts`; `on_progress` gets numbers of texts done."""

  def warm_up(self, texts: int) -> None:
    """Compiles what `embed` needs for up to so many texts of any length."""


class EmbedderBase(abc.ABC):
  """What all embedders share: the fingerprint, and pickling without loaded state."""

  @functools.cached_property
  def fingerprint(self) -> str:
    return storage.fingerprint(self.describe())

  @abc.abstractmethod
  def describe(self) -> dict[str, Any]:
    """See `Embedder.describe`."""

  def warm_up(self, texts: int) -> None:
    """See `Embedder.warm_up`; most have nothing to compile."""
    del texts

  def __getstate__(self) -> dict[str, Any]:
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

  def __setstate__(self, state: Mapping[str, Any]) -> None:
    # Not attribute by attribute: the dataclasses are frozen.
    self.__dict__.update(state)


def valid_unicode(text: str) -> str:
  """The text, lone surrogates (a JSON file can hold them) replaced by question marks."""
  return text if text.isascii() else text.encode('utf-8', 'replace').decode()
