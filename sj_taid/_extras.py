"""What the parts of the package need that ``import sj_taid`` does without."""

from collections.abc import Iterator
from contextlib import contextmanager

#: all of the extra ``train``: no distribution of ours is published whose extra one could install
TRAIN = (
    "lightning torchmetrics torch-fidelity safetensors hydra-core hydra-joblib-launcher filelock "
    "torchvision scikit-learn tensorboard matplotlib pandas tabulate rich"
)
REMEDY = "; to get it: pip install "


@contextmanager
def needs(distribution: str) -> Iterator[None]:
    """Around a part's imports: if one of them is missing, the error says what to install.

    The innermost says it.

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
