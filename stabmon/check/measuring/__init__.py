"""Measurements and predictions of a model's attention."""
