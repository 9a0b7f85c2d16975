"""A progress bar for what turns out to take seconds. What switches off transformers' own bars switches off this one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from transformers.utils import logging

# What is done by then never shows a bar, nor makes one: in most models that is everything.
DELAY_SECONDS = 1.5

_thread = threading.local()


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Call what it yields with the number of values that are done now, from any thread.

    There is no bar under `transformers.utils.logging.disable_progress_bar()` or a verbosity above warnings, nor on
    other ranks than a machine's first, nor within `silent()`.
    """
    done, bar, begun, lock = 0, None, monotonic(), threading.Lock()
    shown = logging.get_verbosity() <= logging.WARNING and os.environ.get("LOCAL_RANK", "0") in ("0", "-1")
    shown = shown and not getattr(_thread, "silent", False)

    def advance(count: int) -> None:
        nonlocal done, bar
        with lock:
            done += count
            if bar is not None:
                bar.update(count)
            elif monotonic() - begun >= DELAY_SECONDS:
                bar = _bar(what, total, done)

    try:
        yield advance if shown else _ignore
    finally:
        if bar is not None:
            bar.close()


@contextmanager
def silent() -> Iterator[None]:
    """No bars in this thread: for what is done again and again within a loop that has its own."""
    before, _thread.silent = getattr(_thread, "silent", False), True
    try:
        yield
    finally:
        _thread.silent = before


def _bar(what: str, total: int, done: int) -> Any:
    return logging.tqdm(desc=what, total=total, initial=done, unit=" values", unit_scale=True, leave=False)


def _ignore(count: int) -> None:
    pass
