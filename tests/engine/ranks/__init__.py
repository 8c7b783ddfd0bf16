"""Tests of stabmon.engine.ranks."""
