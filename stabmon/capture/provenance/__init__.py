"""Products of queries and keys, followed through a forward to a softmax's use."""

from stabmon._moved import moved_names

__getattr__ = moved_names(__name__, "capture.provenance.tracker", "capture.provenance.next_scores")
