"""Sum up, check and follow attributions."""
