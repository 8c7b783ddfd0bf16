"""Moves of weights by an optimizer step, per parameter group and of W_q and W_k."""
