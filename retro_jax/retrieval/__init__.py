"""Chunk databases, their index, and the neighbours that training examples carry."""
