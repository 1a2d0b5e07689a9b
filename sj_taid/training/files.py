"""Atomic file writes, and the error for what cannot be written."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: the error numbers of a full disk and of a read-only folder
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


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
    except (OSError, RuntimeError) as error:
        is_torch = "inline_container" in str(error)  # torch's own writer of files
        if not is_torch and getattr(error, "errno", None) not in REFUSALS:
            raise
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):  # where nothing can be written, nothing can be removed either
            temporary.unlink(missing_ok=True)


def check_replaceable(path: Path, mark: str) -> None:
    """Refuse to write over a file that lacks the ``mark`` of those that are written there."""
    if path.is_file() and mark not in path.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError(
            f"{path} is there, and this command did not write it; move it away, or choose another "
            "place with --out"
        )


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of :func:`atomic_write` in a folder whose process was killed."""
    for path in folder.glob(".*.[0-9]*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def report_unwritable(folder: Path) -> Iterator[None]:
    """Raise :class:`Unwritable` where the disk is full or read-only, whatever libraries raise.

    TensorBoard's error comes from a thread, and Lightning's says that a number cannot be logged.
    """
    try:
        yield
    except Unwritable:
        raise
    except Exception:
        probe = folder / ".probe"
        with atomic_write(probe) as temporary:
            temporary.write_bytes(bytes(1 << 16))
        probe.unlink()
        raise
