"""Atomic file writes, and the refusal to write over files of others."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file that replaces ``path`` when the block ends, so that it is written whole or
    not at all."""
    # The name is always the same: what a killed process left is written over.
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.errno and not error.filename:  # as of a full disk
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def atomic_save(path: Path, content: Any) -> None:
    """``torch.save``, atomic."""
    whole = BytesIO()
    torch.save(content, whole)  # into a file its error does not say that the disk is full
    with atomic_write(path) as temporary:
        temporary.write_bytes(whole.getbuffer())


def check_replaceable(path: Path, mark: str) -> None:
    """Refuse a folder, and a file that lacks the ``mark`` of those that are written there."""
    if path.is_dir() or (
        path.is_file() and mark not in path.read_text(encoding="utf-8", errors="replace")
    ):
        raise FileExistsError(
            f"{path} is there, and this command did not write it; move it away, or choose another "
            "place with --out"
        )
