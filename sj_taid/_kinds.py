"""Kinds of values: a config's are checked by what the classes that take them declare."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ._checks import FLAG, NUMBER, PATH, Rule, check, is_whole

#: the kinds that a config can write
RULES: dict[Any, Rule] = {
    NoneType: ("null", lambda value: value is None),
    bool: FLAG,
    int: ("an integer of 64 bits", lambda value: is_whole(value) and -(2**63) <= value < 2**63),
    float: NUMBER,
    str: ("text", lambda value: isinstance(value, str)),
    Path: PATH,
}
#: What stands for an object in a config. Text passes: the class's own error says what to write.
OBJECT: Rule = (
    "an object, by its _target_",
    lambda value: (
        "_target_" in value
        if isinstance(value, Mapping)
        else not isinstance(value, int | float | list | tuple)
    ),
)


def check_kinds(target: Any, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise a ``ValueError`` if a value is of another kind than ``target`` declares.

    Args:
        target: a class or function. It declares a kind by a parameter's annotation; a flag or a
            number as its default is one too.
        values: arguments of ``target``, by name.
        prefix: of the names in an error.

    >>> from sj_taid import ALIFNode
    >>> check_kinds(ALIFNode, {"init_tau": 3, "decay_input": "no"}, "neuron.")
    Traceback (most recent call last):
    ValueError: neuron.decay_input must be True or False, but it is 'no'
    """
    # Annotations of other libraries may omit None, as SpikingJelly 0.0.0.0.14's of v_reset.
    skips_null = target.__module__.partition(".")[0] != "sj_taid"
    for name, kind in declared_kinds(target).items():
        if name not in values or (skips_null and values[name] is None):
            continue
        if rule := rule_of(kind):
            check(rule, **{prefix + name: values[name]})


@cache
def declared_kinds(target: Any) -> dict[str, Any]:
    """The kinds of a class's or function's arguments, as far as they are declared."""
    kinds: dict[str, Any] = {}
    # Of base classes too, for what goes through **kwargs.
    owners = target.__mro__[::-1] if isinstance(target, type) else (target,)
    for owner in owners:
        function = vars(owner).get("__init__") if isinstance(owner, type) else owner
        if not inspect.isfunction(function):
            continue
        try:
            hints = get_type_hints(owner if is_dataclass(owner) else function)
        except Exception:  # names that are there for type checkers alone
            hints = {}
        for name, parameter in inspect.signature(function).parameters.items():
            kind, default = hints.get(name), parameter.default
            if parameter.annotation is parameter.empty and isinstance(default, int | float):
                kind = bool if isinstance(default, bool) else float
            kinds[name] = kind | None if kind and default is None else kind
    return kinds


def rule_of(kind: Any) -> Rule | None:
    """The rule of an annotation; None for one that says nothing.

    >>> import torch
    >>> rule_of(int | Sequence[float] | torch.Tensor | None)[0]
    'an integer of 64 bits or [a number, ...] or null'
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        allowed = [(type(part), part) for part in parts]  # True is 1, but not the same
        return " or ".join(map(repr, parts)), lambda value: (type(value), value) in allowed
    if origin in (Union, UnionType):
        return _any_of(part for part in parts if not (part is str and Path in parts))
    if origin in (list, tuple, Sequence, Iterable):
        anything: Rule = ("anything", lambda part: True)
        words, holds = _any_of(part for part in parts if part is not ...) or anything
        return (
            f"[{words}, ...]",
            lambda value: isinstance(value, list | tuple) and all(map(holds, value)),
        )
    if origin in (dict, Mapping):
        return "a dictionary", lambda value: isinstance(value, Mapping)
    if kind in RULES:
        return RULES[kind]
    of = origin or kind
    plain = ("builtins", "typing", "collections.abc")
    is_class = isinstance(of, type) and of.__module__ not in plain
    return OBJECT if is_class or of is Callable else None


def _any_of(kinds: Iterable[Any]) -> Rule | None:
    rules: list[Any] = [rule_of(kind) for kind in kinds]
    if {*rules} - {OBJECT, RULES[NoneType]}:  # what a config can write
        rules = [rule for rule in rules if rule is not OBJECT]
    if not rules or None in rules:
        return None
    words = dict.fromkeys(words for words, _ in rules)
    return " or ".join(words), lambda value: any(holds(value) for _, holds in rules)
