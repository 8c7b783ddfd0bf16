"""Make the readings of a run, and write its records."""
