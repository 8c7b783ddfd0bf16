"""Training on a corpus from the command line: controllers on small models."""
