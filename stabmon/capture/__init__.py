"""An unmodified model in, a stream of its attention calls out."""

from stabmon.capture.compiled import compiled_modules
from stabmon.capture.names import clean_name
from stabmon.capture.session import AttentionCapture

__all__ = ["AttentionCapture", "clean_name", "compiled_modules"]
