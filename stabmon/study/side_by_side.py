"""Tasks of a study, each in a process that ends with this one."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from stabmon.study.plan import StudySettings, Task
from stabmon.study.task import run_task
from stabmon.study.variants import BASE

LOOK = 0.5
"""Seconds between looks at what the processes say."""
PATIENCE = 1.0
"""Seconds for processes to end once they are asked to; then they are killed."""
_news: Any = None
"""Queue to the parent, in a process of :func:`run_tasks`."""


def run_tasks(
    settings: StudySettings,
    remaining: list[Task],
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Run tasks and yield each result as its task ends.

    Those on a frozen base wait for their base. Whatever ends this generator, an interruption for
    example, ends the processes within seconds; results that they have written stay.

    Args:
        settings: the study.
        remaining: its tasks without a result.
        say: called every few seconds with the state of a training in words.
    """
    if settings.workers == 0:
        yield from ((task, run_task(settings, task, say)) for task in remaining)
        return
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(
        settings.workers, mp_context=context, initializer=_begin, initargs=(news,)
    ) as pool:
        bases = {task for task in remaining if task.variant == BASE}
        blocked = [
            task
            for task in remaining
            if task.kind == "frozen" and Task("joint", BASE, task.seed) in bases
        ]
        running: dict[Future[dict[str, Any]], Task] = {
            pool.submit(_work, settings, task): task for task in remaining if task not in blocked
        }
        try:
            while running:
                ended = wait(running, timeout=LOOK, return_when=FIRST_COMPLETED).done
                _pass_on(news, say)
                for future in ended:
                    task = running.pop(future)
                    yield task, future.result()
                    ready = [each for each in blocked if task == Task("joint", BASE, each.seed)]
                    blocked = [each for each in blocked if each not in ready]
                    running |= {pool.submit(_work, settings, each): each for each in ready}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            _end([each for each in multiprocessing.active_children() if each not in others])
            raise


def _begin(news: Any) -> None:
    """Prepare a process: one thread, no interruption of its own, an end with its parent's."""
    global _news
    _news = news
    news.cancel_join_thread()  # nobody reads it any more once the parent has gone
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _work(settings: StudySettings, task: Task) -> dict[str, Any]:
    return run_task(settings, task, lambda line: None if _news is None else _news.put(line))


def _pass_on(news: Any, say: Callable[[str], None]) -> None:
    while True:
        try:
            say(news.get_nowait())
        except queue.Empty:
            return


def _end(processes: Sequence[BaseProcess]) -> None:
    for each in processes:
        each.terminate()
    until = time.monotonic() + PATIENCE
    for each in processes:
        each.join(max(0.0, until - time.monotonic()))
        if each.is_alive():
            each.kill()
