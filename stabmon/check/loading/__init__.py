"""Models and inputs of a check."""
