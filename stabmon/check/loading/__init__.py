"""Load the model and the inputs of a check."""
