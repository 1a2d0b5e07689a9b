"""What public functions ask of their arguments."""

from numbers import Integral
from typing import Any

from torch import nn


def check_net(net: Any, function: str) -> None:
    """An error for what is no module, as a path or a state dict in its place."""
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"{function} needs the net, a torch.nn.Module, but got {net!r:.80} of type "
            f"{type(net).__name__}; give the net itself"
        )


def check_count(n: Any) -> None:
    """An error for what is no number of images to draw."""
    if not isinstance(n, Integral) or isinstance(n, bool) or n < 0:
        raise ValueError(
            f"sample needs a number of images, an integer >= 0, but got {n!r:.80}; "
            "give one, such as sample(16)"
        )
