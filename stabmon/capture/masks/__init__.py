"""Recover masks from scores."""
