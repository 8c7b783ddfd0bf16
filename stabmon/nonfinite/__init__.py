"""Detect NaN and inf at every step, and trace them to their origin."""
