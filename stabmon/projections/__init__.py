"""Locate the weights W_q and W_k that make queries and keys, and edit them."""
