"""Files that are written whole or not at all, and what is said where they cannot be."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: what a system says of a full disk, naming no file, and of a place where one may not write
FULL = {errno.ENOSPC, errno.EDQUOT}
REFUSALS = FULL | {errno.EROFS, errno.EACCES, errno.EPERM}


class Unwritable(OSError):
    """A file or folder cannot be written; what stood there before is whole."""


def unwritable(
    place: Path,
    error: BaseException,
    remedy: str = "what stood there before is whole: make room, or let the folder be written",
) -> Unwritable:
    """The error that says so; an exception of its message alone, which processes can hand on."""
    return Unwritable(f"{place} cannot be written ({error}); {remedy}")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` when the block is through.

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


def remove_left(folder: Path) -> None:
    """Remove what :func:`atomic_write` left in a folder where its process was killed."""
    for left in folder.glob(".*.[0-9]*.tmp"):
        left.unlink(missing_ok=True)


@contextmanager
def written_by_others(folder: Path) -> Iterator[None]:
    """Raise :class:`Unwritable` for what others cannot write there, whatever they make of it.

    TensorBoard's error is of a thread, and Lightning says that a number cannot be logged.
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
