"""Measuring a trained model: bits-per-byte, ablations, reports."""
