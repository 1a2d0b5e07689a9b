"""Build objects from configs, which may name trusted classes only."""

from __future__ import annotations

import re
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any

#: Modules whose public classes a config may name: they do nothing but what their arguments say.
TRUSTED = (
    "sj_taid.data",
    "sj_taid.model",
    "sj_taid.ops.surrogate",
    "sj_taid.training",
    "spikingjelly.activation_based.neuron",
    "spikingjelly.activation_based.surrogate",
    "torch.nn.modules.loss",
    "torch.optim",
)

#: what classes raise, next to ValueError, on arguments that they cannot take
UNFIT = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
    *(RuntimeError, TypeError),
)


def build(
    config: Any,
    trust: Collection[str] | None = None,
    keys: Mapping[str, str] | None = None,
    trusted: Collection[str] = TRUSTED,
) -> Any:
    """Build what a config describes: each ``_target_`` in it, called with the entries next to it.

    The innermost are built first. With ``_partial_`` it is a partial of the class. Nothing is
    called if one of the names is not trusted.

    Args:
        config: nested dictionaries and lists.
        trust: full names of custom classes that may be called next to ``trusted`` ones; None
            where the user has no say.
        keys: where a class's arguments are in the user's config, for errors.
        trusted: modules whose public classes may be called.

    Raises:
        ValueError: a class that is not trusted, or that does not take its arguments: by their kinds
            (:func:`sj_taid._internal.kinds.check_kinds`), or by itself.

    >>> build({"_target_": "sj_taid.FixedDecoder", "T": 8}).T
    8
    """

    def call(node: Any) -> Any:
        if isinstance(node, list):
            return [*map(call, node)]
        if not isinstance(node, dict):
            return node
        values = {key: call(value) for key, value in node.items()}
        if "_target_" not in values:
            return values
        name = values.pop("_target_")
        target, is_partial = find_class(name, trust, trusted), values.pop("_partial_", False)
        try:
            if trust is not None:  # a model by name was checked when it was saved
                from .kinds import check_kinds  # and pydantic, of the extra train

                check_kinds(target, values)
            return partial(target, **values) if is_partial else target(**values)
        except ValueError as error:
            if keys and name in keys and re.split(r"\W", str(error), maxsplit=1)[0] in values:
                error.args = (f"{keys[name]}.{error}",)
            else:
                error.add_note(f"(of {name})")
            raise
        except UNFIT as error:
            # An assertion may have no words but its own line.
            words = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or ""
            raise ValueError(f"{name} cannot be built: {words.splitlines()[0]}") from error

    for name in _targets(config):
        find_class(name, trust, trusted)
    return call(config)


def find_class(
    name: Any, trust: Collection[str] | None = None, trusted: Collection[str] = TRUSTED
) -> Any:
    """The class of this full name, in one of the ``trusted`` modules or named by ``trust``.

    Raises:
        ValueError: it is not trusted, or there is none.
        TypeError: ``trust`` is no list.
    """
    # `in` would find a part of a name in a text.
    is_list = isinstance(trust, Collection | None) and not isinstance(trust, str)
    if not is_list or not all(isinstance(one, str) for one in trust or ()):
        raise TypeError(
            f"trust must be a list of full names, such as [mypkg.MyLIF], but it is {trust!r}"
        )
    module, _, attribute = str(name).rpartition(".")
    roots = ["sj_taid"] if module == "sj_taid" else [r for r in trusted if is_below(module, [r])]
    found, is_custom = None, name in (trust or ())
    reason: ImportError | None = None
    if module and (is_custom or roots):
        try:
            found = getattr(import_module(module), attribute, None)
        except ImportError as error:
            reason = error
    if is_custom:
        if found is None:
            why = reason or f"no {attribute} in {module or 'a module that it names'}"
            raise ValueError(f"trust names {name!r}, which cannot be imported: {why}") from reason
        return found
    # Defined there: what such a module imports from elsewhere could do anything.
    is_public = isinstance(found, type) and attribute[0] != "_"
    if is_public and is_below(found.__module__, [*roots, *trusted]):
        return found
    remedy = (
        f"; if it is yours or you trust it, add trust=[{name}], in training, resuming and loading"
    )
    raise ValueError(
        f"the config names {name!r}: no public class of sj_taid or of a library's module that is "
        f"known to be harmless, so it could do anything{'' if trust is None else remedy}"
    )


def _targets(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _targets(child)


def is_below(name: str, names: Iterable[str]) -> bool:
    """Whether a dotted name is one of ``names`` or below one of them."""
    return any(f"{name}.".startswith(f"{other}.") for other in names)
