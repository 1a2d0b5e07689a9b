"""How far something long is: a bar in a terminal, and elsewhere a line every so often."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import track

log = logging.getLogger(__name__)

Item = TypeVar("Item")

#: seconds between two lines
EVERY = 30.0


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
