"""Optional dependencies of the parts of the package, and errors that say how to install them."""

from collections.abc import Iterator
from contextlib import contextmanager

TRAIN = '".[train]" in a checkout of sj-taid'
REMEDY = "; to get it: pip install "


@contextmanager
def needs(distribution: str) -> Iterator[None]:
    """Around imports: if one of them is missing, the error says what to install.

    The innermost ``needs`` decides.

    >>> with needs("some-distribution"):
    ...     import some_module
    Traceback (most recent call last):
    ModuleNotFoundError: No module named 'some_module'; to get it: pip install some-distribution
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if REMEDY in str(error):
            raise
        raise ModuleNotFoundError(f"{error}{REMEDY}{distribution}", name=error.name) from error
