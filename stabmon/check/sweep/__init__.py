"""Sweep over learning rates on a narrow proxy model."""

from stabmon._moved import moved_names

__getattr__ = moved_names(__name__, "check.sweep.sweep")
