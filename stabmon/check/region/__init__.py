"""Map where attention stays stable."""
