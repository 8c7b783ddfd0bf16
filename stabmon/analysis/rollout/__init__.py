"""Attention rollout: shares of the input's tokens in each token of the last layer."""
