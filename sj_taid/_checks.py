"""Argument validation shared by the public functions."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn


def check_net(net: Any, function: str) -> None:
    """Raise a ``TypeError`` unless ``net`` is a module."""
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"{function} needs the net, a torch.nn.Module, but got {net!r:.80} of type "
            f"{type(net).__name__}; give the net itself"
        )


def is_number(value: Any) -> bool:
    """Whether it is a real number, numpy's included."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether it is an integer, numpy's included."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def are_two_numbers(values: Any) -> bool:
    """Whether it is a pair of numbers."""
    return isinstance(values, Sequence) and len(values) == 2 and all(map(is_number, values))


def check_numbers(**numbers: Any) -> None:
    """Raise a ``ValueError`` unless all are numbers, infinite ones included."""
    for name, value in numbers.items():
        if not is_number(value) or value != value:
            raise ValueError(f"{name} must be a number, but it is {value!r}")


def check_flags(**flags: Any) -> None:
    """Raise a ``ValueError`` unless all are booleans."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, but it is {value!r}")


def check_example_input(example_input: Any) -> None:
    """Raise a ``TypeError`` unless it is a tensor or a tuple of inputs."""
    if not isinstance(example_input, Tensor | tuple):
        raise TypeError(
            "example_input must be a tensor, or a tuple for several inputs, but it is a "
            f"{type(example_input).__name__}"
        )


def check_sizes(**sizes: Any) -> None:
    """Raise a ``ValueError`` unless all are integers >= 1."""
    for name, value in sizes.items():
        if not is_whole(value) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, but it is {value!r}")


def check_weights(**weights: Any) -> None:
    """Raise a ``ValueError`` unless all are numbers >= 0."""
    for name, value in weights.items():
        if not is_number(value) or not value >= 0:
            raise ValueError(f"{name} must be a number >= 0, but it is {value!r}")


def check_count(n: Any) -> None:
    """Raise a ``ValueError`` unless ``n`` is a number of images to sample."""
    if not is_whole(n) or n < 0:
        raise ValueError(
            f"sample needs a number of images, an integer >= 0, but got {n!r:.80}; "
            "give one, such as sample(16)"
        )
