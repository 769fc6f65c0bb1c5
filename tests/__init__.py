"""Tests, one folder a package of retro_jax; helpers that several share are modules here."""
