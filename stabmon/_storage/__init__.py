"""Write files whole, encode NaN in JSON, and read stored values by type."""
