"""Describe where every head of a model looks."""
