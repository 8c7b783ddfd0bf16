"""Compressed cache on stock models of transformers."""
