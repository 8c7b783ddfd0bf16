"""Eviction policies, one per file; importing a file registers its policy."""
