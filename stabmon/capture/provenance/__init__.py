"""Products of queries and keys, followed through a forward to a softmax's use."""
