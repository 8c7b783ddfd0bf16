"""Find attention that no adapter recorded."""
