"""Kinds of values: a config's are checked by what the classes that take them declare."""

import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from .checks import targets

#: of torch and numpy
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]

STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
#: pydantic's errors where an object is declared
OF_OBJECTS = ("needs_python_object", "callable_type")


def check_kinds(kinds: Mapping[str, Any], values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise a ``ValueError`` if a value of a config is of another kind than it should be.

    Values that are not in ``kinds`` pass, and objects; ``prefix`` is of the names in an error.

    >>> from sj_taid import ALIFNode
    >>> values = {"init_tau": 3, "decay_input": "no"}
    >>> check_kinds(declared_kinds(ALIFNode), values, "neuron.")
    Traceback (most recent call last):
    ValueError: neuron.decay_input: input should be a valid boolean, but it is 'no'
    """
    for name, value in values.items():
        if name not in kinds or any(targets(value)):  # what is built is checked there
            continue
        try:
            # JSON's lists are tuples too, and its texts are paths.
            TypeAdapter(kinds[name], config=STRICT).validate_json(json.dumps(value))
        except ValidationError as error:
            said = [one["msg"] for one in error.errors() if one["type"] not in OF_OBJECTS]
            said = [words[0].lower() + words[1:] for words in said]  # not the names in them
            expected = "; ".join(dict.fromkeys(said)) or "an object, by its _target_"
            raise ValueError(f"{prefix}{name}: {expected}, but it is {value!r}") from None
        except Exception:  # an object, or an annotation that pydantic does not know
            continue


@cache
def declared_kinds(target: Any) -> dict[str, Any]:
    """The annotations of arguments, of base classes too, since ``**kwargs`` go there."""
    kinds: dict[str, Any] = {}
    for owner in reversed(inspect.getmro(target)) if isinstance(target, type) else [target]:
        function = vars(owner).get("__init__") if isinstance(owner, type) else owner
        if not inspect.isfunction(function):
            continue
        parameters = inspect.signature(function).parameters.values()
        kinds |= {one.name: bool for one in parameters if isinstance(one.default, bool)}
        with suppress(Exception):  # names that are there for type checkers alone
            annotated = owner if is_dataclass(owner) else function
            kinds |= get_type_hints(annotated, include_extras=True)
    is_own = target.__module__.partition(".")[0] == "sj_taid"
    # Libraries leave null out where they take it.
    return kinds if is_own else {name: kind | None for name, kind in kinds.items()}
