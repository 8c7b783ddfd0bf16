"""The region of stable attention around a model."""
