"""Reason for which an edit or an intervention does not fit a run."""

from __future__ import annotations


class NotApplicable(Exception):
    """An intervention does not fit this run; nothing was changed.

    Args:
        reason: one sentence.
        advice: the code line or setting to change, where there is one.
        everywhere: it fits on no rank, for the same reason.

    Example:
        >>> try:
        ...     raise NotApplicable("q_proj is frozen", "train it")
        ... except NotApplicable as error:
        ...     print(error, "-", error.advice)
        q_proj is frozen - train it
    """

    def __init__(self, reason: str, advice: str = "", *, everywhere: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice
        self.everywhere = everywhere
