"""Compute the evidence that rules judge: baselines, trends, sustained growth."""
