"""Masks recovered from the scores of a model."""
