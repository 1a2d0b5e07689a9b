"""What the parts of the package need that ``import sj_taid`` does without."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(distribution: str) -> Iterator[None]:
    """Around a part's imports: if one of them is missing, the error says what to install.

    >>> with needs("some-distribution"):
    ...     import some_module
    Traceback (most recent call last):
    ModuleNotFoundError: No module named 'some_module'; to get it: pip install some-distribution
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; to get it: pip install {distribution}", name=error.name
        ) from error
