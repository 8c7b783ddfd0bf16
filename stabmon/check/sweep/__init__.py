"""Sweep over learning rates on a narrow proxy model."""
