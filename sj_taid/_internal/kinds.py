"""Kinds of values: a config's are checked by what the classes that take them declare."""

import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)
#: what takes an object says itself what to write instead of a text
OF_OBJECTS = ("needs_python_object", "callable_type")


def check_kinds(target: Any, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise a ``ValueError`` if a value is of another kind than ``target`` declares.

    ``prefix`` is of the names in an error. Objects pass, and null where a library's annotations
    leave it out.

    >>> from sj_taid import ALIFNode
    >>> check_kinds(ALIFNode, {"init_tau": 3, "decay_input": "no"}, "neuron.")
    Traceback (most recent call last):
    ValueError: neuron.decay_input: input should be a valid boolean, but it is 'no'
    """
    is_own = target.__module__.partition(".")[0] == "sj_taid"
    for name, kind in declared_kinds(target).items():
        value = values.get(name)
        if name not in values or (value is None and not is_own):
            continue
        for number in value if isinstance(value, list | tuple) else [value]:
            is_huge = isinstance(number, int) and not -(2**63) <= number < 2**63
            if is_huge or (isinstance(number, float) and number != number):
                raise ValueError(f"{prefix}{name}: a number of 64 bits, but it is {value!r}")
        try:
            # JSON's lists are tuples too, and its texts are paths.
            TypeAdapter(kind, config=STRICT).validate_json(json.dumps(value))
        except ValidationError as error:
            said = [one["msg"] for one in error.errors() if one["type"] not in OF_OBJECTS]
            if said or not isinstance(value, str):
                expected = "; ".join(dict.fromkeys(said)).lower() or "an object, by its _target_"
                raise ValueError(f"{prefix}{name}: {expected}, but it is {value!r}") from None
        except Exception:  # an object, or an annotation that pydantic does not know
            continue


@cache
def declared_kinds(target: Any) -> dict[str, Any]:
    """The annotations of arguments, of base classes too, since ``**kwargs`` go there."""
    kinds: dict[str, Any] = {}
    for owner in inspect.getmro(target)[::-1] if isinstance(target, type) else [target]:
        function = vars(owner).get("__init__") if isinstance(owner, type) else owner
        if not inspect.isfunction(function):
            continue
        with suppress(Exception):  # names that are there for type checkers alone
            kinds |= get_type_hints(owner if is_dataclass(owner) else function)
        for name, parameter in inspect.signature(function).parameters.items():
            if isinstance(parameter.default, bool):  # a flag, annotated or not
                kinds.setdefault(name, bool)
    return kinds
