"""A compressed cache on stock models of transformers."""
