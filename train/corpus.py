"""The corpus of the training scripts, which lives in the package."""

from stabmon.training.corpus import VOCABULARY, Corpus, CorpusError, load_corpus

__all__ = ["VOCABULARY", "Corpus", "CorpusError", "load_corpus"]
