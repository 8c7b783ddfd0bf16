"""Processes that Ctrl-C reaches, and that end with their test."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil


@contextmanager
def interruptible(command: list[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a process, and end it and its children however the test ends.

    A runner of tests that was itself started in the background ignores SIGINT, and its children
    inherit that.

    Args:
        command: program and arguments.
        **options: of ``subprocess.Popen``.
    """

    def restore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(command, preexec_fn=restore, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
            process.wait()
