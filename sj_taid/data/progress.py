"""How far something long is: a bar in a terminal, and elsewhere a line every so often."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

log = logging.getLogger(__name__)

Item = TypeVar("Item")

#: seconds between two lines, and between two looks for new files
EVERY, LOOK = 30.0, 2.0


def followed(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """The ``items``, one by one; what takes less than :data:`EVERY` says nothing but in a terminal.

    Args:
        items: what there is to do.
        what: how that is called.
        total: how many there are; by default their ``len``.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    console = Console()
    # Bars of processes side by side would write over each other.
    if console.is_terminal and multiprocessing.current_process().name == "MainProcess":
        yield from track(items, what, total, transient=True, console=console)
        return
    said = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - said >= EVERY:
            said = time.monotonic()
            log.info("%s: %d of %s", what, number, "?" if total is None else total)
        yield item


@contextmanager
def files_followed(folders: Sequence[Path], what: str, total: int) -> Iterator[None]:
    """The files that come into ``folders`` inside the block, by code that says nothing of them.

    Args:
        folders: counted with all below them; need not be there yet.
        what: how it is called that makes the files.
        total: how many files there will be.
    """
    ended = threading.Event()

    def count() -> int:
        return sum(len(files) for folder in folders for _, _, files in os.walk(folder))

    def new(seen: int) -> Iterator[int]:
        while not ended.wait(LOOK):
            found = count()
            yield from range(seen, found)
            seen = found

    items = followed(new(count()), what, total)
    watcher = threading.Thread(target=deque, args=(items, 0), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
