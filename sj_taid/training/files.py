"""Atomic file writes, a log file, and the refusal to write over files of others."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file that replaces ``path`` when the block ends, so that it is written whole or
    not at all."""
    # A new file of a name that cannot be foreseen: a folder from elsewhere may hold links. Unlike
    # tempfile's it has the permissions of any other file.
    temporary = path.with_name(f".{path.name}.{token_hex(8)}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.touch(exist_ok=False)
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


class _LogFile(logging.FileHandler):
    """Writes a log file; a link at its path is replaced by a file, not followed."""

    def _open(self) -> Any:
        path = Path(self.baseFilename)
        if path.is_symlink():
            path.unlink()
        return super()._open()


def check_replaceable(path: Path, mark: str) -> None:
    """Refuse a folder, and a file that lacks the ``mark`` of those that are written there."""
    if path.is_dir() or (
        path.is_file() and mark not in path.read_text(encoding="utf-8", errors="replace")
    ):
        raise FileExistsError(
            f"{path} is there, and this command did not write it; move it away, or choose another "
            "place with --out"
        )
