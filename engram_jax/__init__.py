"""Engram: conditional memory for language models, on JAX meshes."""

__version__ = "0.1.0"
