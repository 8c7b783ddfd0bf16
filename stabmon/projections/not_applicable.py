"""Say why an edit or an intervention does not fit a run."""

from __future__ import annotations


class NotApplicable(Exception):
    """An intervention does not fit this run; nothing was changed. Says why, and what a person can
    do instead.

    Args:
        reason: one sentence.
        advice: the code line or setting to change, where there is one.
    """

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice
