"""Measure and predict the attention of a model."""
