"""Data modules at a size for tests, and what the tests of several of them need."""

from filelock import FileLock, Timeout

from sj_taid._internal.kinds import check_kinds, declared_kinds
from sj_taid.data.base import LOCK


def make(cls, root=None, **options):
    shared = {"name": "test", "channels": 1, "image_size": 16, "batch_size": 50, "classes": 10}
    values = shared | ({} if root is None else {"root": str(root)}) | options
    check_kinds(declared_kinds(cls), values, "dataset.")  # as a config's
    return cls(**values)


def ready(*arguments, **options):
    module = make(*arguments, **options)
    module.prepare_data()
    module.setup()
    return module


def first(loader):
    return next(iter(loader))


def cut(path, share=0.5):
    """What a download that was killed leaves."""
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


def is_locked(folder):
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
