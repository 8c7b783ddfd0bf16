"""Errors of other people's models as one line for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stabmon.check.loading.pretrained import quiet
from stabmon.check.loading.source import error_words


@contextmanager
def one_line_errors(
    doing: str, mend: str, *, keep: tuple[type[Exception], ...] = (ValueError,)
) -> Iterator[None]:
    """Turn any error of a model into a ValueError of one line.

    Messages of transformers are held back meanwhile.

    Args:
        doing: the work that failed, the start of the line.
        mend: the user's way out, the end of the line.
        keep: errors that pass unchanged.

    Raises:
        ValueError: for any other error.

    Example:
        >>> with one_line_errors("the model failed", "give fewer samples"):
        ...     raise RuntimeError("out of memory")
        Traceback (most recent call last):
        ValueError: the model failed (RuntimeError: out of memory); give fewer samples
    """
    try:
        with quiet():
            yield
    except keep:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{doing} ({error_words(error)}); {mend}") from error
