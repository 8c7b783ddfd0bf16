"""Measure on a model's own loss how its KV cache may be compressed."""
