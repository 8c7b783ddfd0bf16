"""Sweep learning rates on a narrow proxy model."""
