"""RETRO in JAX: pretraining, retrieval database, evaluation and generation."""

__version__ = "0.1.0"
