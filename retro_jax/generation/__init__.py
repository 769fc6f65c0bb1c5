"""Sampling from a trained model with live retrieval."""
