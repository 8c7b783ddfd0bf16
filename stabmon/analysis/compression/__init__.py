"""Compression of the KV cache, measured on the model's own loss."""
