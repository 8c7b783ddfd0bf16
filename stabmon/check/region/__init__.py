"""The region of stable attention around a model."""

from stabmon._moved import moved_names

__getattr__ = moved_names(__name__, "check.region.region")
