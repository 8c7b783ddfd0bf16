"""Eviction policies, one a file; importing any of them registers it."""
