"""Atomic file writes, and the error for what cannot be written."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: of a full disk, where the system names no file, and of a folder that may not be written
FULL = {errno.ENOSPC, errno.EDQUOT}
REFUSALS = FULL | {errno.EROFS, errno.EACCES, errno.EPERM}


class Unwritable(OSError):
    """A file or folder cannot be written; what was there before is whole."""


def unwritable(
    path: Path,
    error: BaseException,
    remedy: str = "what was there before is whole: make room, or let the folder be written",
) -> Unwritable:
    """The error for a path that cannot be written; it holds a message alone, so it pickles."""
    return Unwritable(f"{path} cannot be written ({error}); {remedy}")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file that replaces ``path`` when the block ends.

    So ``path`` is written whole or not at all, by any number of processes.

    Raises:
        Unwritable: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):  # where nothing can be written, nothing can be removed either
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of :func:`atomic_write` in a folder whose process was killed."""
    for path in folder.glob(".*.[0-9]*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def report_unwritable(folder: Path) -> Iterator[None]:
    """Raise :class:`Unwritable` where a full or read-only disk is behind another library's error.

    TensorBoard's comes from a thread, and Lightning's says that a number cannot be logged.
    """
    try:
        yield
    except Unwritable:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause and not _is_refusal(cause, folder):
            cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
        if cause is None:
            raise
        raise unwritable(folder, cause) from error


def _is_refusal(error: BaseException, folder: Path) -> bool:
    if not isinstance(error, OSError) or error.errno not in REFUSALS:
        return False
    if error.filename is None:
        return error.errno in FULL
    return folder in Path(os.fsdecode(error.filename)).parents
