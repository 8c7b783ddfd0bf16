"""Visibility of keys: causality, window, mask and bias as one object, asked block by block."""

from stabmon._moved import moved_names

__getattr__ = moved_names(__name__, "operator.visibility.visibility", "operator.visibility.pieces")
