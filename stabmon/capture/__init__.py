"""Attention calls of an unmodified model, shown one by one as they happen."""

from stabmon.capture.adapters.compiled import compiled_modules
from stabmon.capture.names import clean_name
from stabmon.capture.session import AttentionCapture

__all__ = ["AttentionCapture", "clean_name", "compiled_modules"]
