"""Findings and advice from measurements."""
