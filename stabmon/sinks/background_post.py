"""Send messages by HTTP from a thread of its own, without ever holding up who sends them."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import urllib.error
import urllib.request
from collections import Counter, deque
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger("stabmon")
_WAITING = 100
"""Messages that wait; further ones are dropped."""
_PAUSES = (1.0, 4.0)
"""Seconds before each repetition of a message that failed."""


class BackgroundPost:
    """Messages to one URL, posted one after the other by a daemon thread.

    A message that meets a dead or busy server is tried three times. The first failure is logged at
    once, all of them together on closing. The URL, which may be a secret, is in no message: its
    host alone is. The thread starts with the first message; a forked process begins with an empty
    queue and a thread of its own.

    Args:
        url: an ``http`` or ``https`` URL.
        timeout: seconds for one connection, and for one answer.

    Raises:
        ValueError: for another URL.

    Example:
        >>> post = BackgroundPost("https://hooks.example.com/secret")
        >>> post.host
        'hooks.example.com'
        >>> post.close()
    """

    def __init__(self, url: str, timeout: float = 5.0) -> None:
        self.host = _host_of(url)
        self._url, self._timeout = url, timeout
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._thread: threading.Thread | None = None
        self._count = 0
        self._start_anew()

    def put(self, body: bytes) -> None:
        """Add a message in JSON; drop it if too many wait. Returns at once."""
        if os.getpid() != self._pid:  # the thread, and perhaps the lock, stayed with the parent
            self._start_anew()
        with self._lock:
            self._count += 1
            if len(self._waiting) >= _WAITING:
                self._lost["too many waited"] += 1
                return
            self._waiting.append(body)
            self._lock.notify()
        if self._thread is None:
            self._closing.clear()
            self._thread = threading.Thread(target=self._run, name="stabmon webhook", daemon=True)
            self._thread.start()
            atexit.register(self.close)

    def close(self, seconds: float = 2.0) -> None:
        """Wait for what is left to be sent, and report what was not; may be called twice.

        Args:
            seconds: longest time to wait.
        """
        thread, self._thread = self._thread, None
        if thread is None or os.getpid() != self._pid:
            return
        atexit.unregister(self.close)
        self._closing.set()
        with self._lock:
            self._lock.notify()
        thread.join(seconds)
        with self._lock:
            left = len(self._waiting) + self._is_sending
            self._waiting.clear()
        if left:
            self._lost["the run ended"] += left
        if lost := self._lost.total():
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self._lost.items())
            logger.warning(
                "stabmon: %d of %d messages did not reach the webhook at %s (%s)",
                lost,
                self._count,
                self.host,
                reasons,
            )
        self._lost.clear()
        self._count = 0

    def _start_anew(self) -> None:
        self._pid = os.getpid()
        self._lock, self._closing = threading.Condition(), threading.Event()
        self._waiting: deque[bytes] = deque()
        self._thread, self._count, self._is_sending = None, 0, False
        self._lost: Counter[str] = Counter()
        """Messages that were lost, by reason."""

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._waiting and not self._closing.is_set():
                    self._lock.wait()
                if not self._waiting:
                    return
                body, self._is_sending = self._waiting.popleft(), True
            reason, is_first = self._deliver(body), False
            with self._lock:
                self._is_sending = False
                if reason:
                    self._lost[reason] += 1
                    is_first = self._lost.total() == 1
            if is_first and not self._closing.is_set():  # else closing reports it
                logger.warning(
                    "stabmon: a message did not reach the webhook at %s (%s); training goes on, and "
                    "further failures are counted",
                    self.host,
                    reason,
                )

    def _deliver(self, body: bytes) -> str:
        """Post a message, and return why it could not be; empty if it was."""
        for pause in (*_PAUSES, None):
            reason, is_final = self._post(body)
            if not reason or is_final or pause is None or self._closing.wait(pause):
                break
        return reason

    def _post(self, body: bytes) -> tuple[str, bool]:
        """Post a message once: why it failed, and whether another try would be in vain."""
        request = urllib.request.Request(
            self._url,
            body,
            {"Content-Type": "application/json", "User-Agent": "stabmon"},
            method="POST",
        )
        try:
            with self._opener.open(request, timeout=self._timeout):
                return "", True
        except urllib.error.HTTPError as error:
            error.close()
            return f"HTTP {error.code}", error.code < 500 and error.code != 429
        except urllib.error.URLError as error:
            known = isinstance(error.reason, OSError)
            return (str(error.reason) if known else type(error.reason).__name__), not known
        except OSError as error:
            return str(error) or type(error).__name__, False
        except Exception as error:  # its text may hold the URL
            return type(error).__name__, True


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refusal of redirections, which would turn a POST into a GET without its message."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _host_of(url: str) -> str:
    """Return the host of a URL.

    Raises:
        ValueError: if it is none of ``http`` or ``https``, without repeating it.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except (ValueError, TypeError, AttributeError):
        parts, host = None, None
    if parts is None or parts.scheme not in ("http", "https") or not host:
        raise ValueError("the webhook's url is no http:// or https:// URL with a host: correct it")
    return str(host)
