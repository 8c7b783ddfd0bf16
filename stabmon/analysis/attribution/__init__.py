"""Attribution of a model's outputs to its input tokens."""
