"""Measure whether optimizer steps are too long."""
