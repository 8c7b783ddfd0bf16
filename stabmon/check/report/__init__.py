"""Present the result of a check."""
