"""Training of controllers on a corpus, compared over seeds."""
