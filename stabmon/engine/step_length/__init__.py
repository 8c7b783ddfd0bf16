"""Measure whether optimizer steps are too long."""

from stabmon._moved import moved_names

__getattr__ = moved_names(__name__, "engine.step_length.watch")
