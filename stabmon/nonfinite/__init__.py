"""NaN and inf, detected at every step and traced to their origin."""
