"""Weights W_q and W_k that make queries and keys: their location and their edits."""
