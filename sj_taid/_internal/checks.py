"""Argument validation shared by the public functions."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any


def is_number(value: Any) -> bool:
    """Whether it is a real number, numpy's included."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether it is an integer, numpy's included."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def expand_home(path: str | Path) -> Path:
    """The path, its ``~`` replaced if it is a user's; pathlib raises if it is not."""
    return Path(os.path.expanduser(str(path)))  # noqa: PTH111


def targets(node: Any) -> Iterator[Any]:
    """The classes that a config names."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        node = [*node.values()]
    if isinstance(node, list):
        for child in node:
            yield from targets(child)


#: what a value must be, in words, and whether it is
Rule = tuple[str, Callable[[Any], bool]]

NUMBER: Rule = ("a number", lambda value: is_number(value) and value == value)  # infinite ones too
NOT_NEGATIVE: Rule = (
    "a finite number >= 0",
    lambda value: is_number(value) and 0 <= value < float("inf"),
)
SHARE: Rule = ("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
FLAG: Rule = ("True or False", lambda value: isinstance(value, bool))


def integer(least: int) -> Rule:
    """The rule of an integer from ``least`` on."""
    return f"an integer >= {least}", lambda value: is_whole(value) and value >= least


def check(rule: Rule, **values: Any) -> None:
    """Raise a ``ValueError`` unless all values keep the rule."""
    expected, holds = rule
    for name, value in values.items():
        if not holds(value):
            raise ValueError(f"{name} must be {expected}, but it is {value!r}")


check_numbers = partial(check, NUMBER)
check_flags = partial(check, FLAG)
check_sizes = partial(check, integer(1))
check_not_negative = partial(check, NOT_NEGATIVE)
