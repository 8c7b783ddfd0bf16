"""Search for attention that no adapter has recorded."""
