"""Train controllers on a corpus and compare them over seeds."""
