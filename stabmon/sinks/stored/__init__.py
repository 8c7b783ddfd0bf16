"""Records read back: as tables, and line by line while a run writes them."""
