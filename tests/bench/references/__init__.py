"""Attention recomputed in float64 from a model's own weights.

By formulas written out here and shared with nobody.
"""
