"""Files written whole, JSON with NaN, and plain values read by their types."""
