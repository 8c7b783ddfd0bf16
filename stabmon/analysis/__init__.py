"""Look into the attention of any model: attribution, patterns, and what a compressed KV cache loses."""
