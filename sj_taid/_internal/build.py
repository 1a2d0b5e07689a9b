"""Build objects from configs, which may name trusted classes only."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

from .checks import targets

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

KEYWORDS = ("_target_", "_partial_")
#: what classes raise on arguments that they cannot take
UNFIT = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
    *(RuntimeError, TypeError, ValueError),
)
#: ``*args`` and ``**kwargs``
STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def build(
    config: Any,
    trust: Collection[str] | None = None,
    keys: Mapping[str, str] | None = None,
    trusted: Collection[str] = TRUSTED,
) -> Any:
    """Build what a config describes: each ``_target_`` in it, called with the entries next to it.

    With ``_partial_`` it is a partial of the class. Nothing is called if one of the names is not
    trusted (:func:`find_class`). Without ``trust`` values are not checked, since they were when
    they were saved; ``keys`` has where a class's arguments are in the user's config, for errors.

    Raises:
        ValueError: a class that is not trusted, or that does not take its arguments.

    >>> build({"_target_": "sj_taid.FixedDecoder", "T": 8}).T
    8
    """

    def call(node: Any) -> Any:
        if isinstance(node, list):
            return [*map(call, node)]
        if not isinstance(node, dict):
            return node
        if "_target_" not in node:
            return {key: call(value) for key, value in node.items()}
        name = node["_target_"]
        target, place = find_class(name, trust, trusted), (keys or {}).get(name, name)
        if trust is not None:
            from .kinds import check_kinds, declared_kinds  # and pydantic, of the extra train

            # before what is in it, since that is handed some of these values
            check_kinds(declared_kinds(target), node, f"{place}.")
        values = {key: call(value) for key, value in node.items() if key not in KEYWORDS}
        try:
            if not node.get("_partial_"):
                return target(**values)
            with suppress(ValueError):  # a class without a signature
                inspect.signature(target).bind_partial(**values)
            return partial(target, **values)
        except UNFIT as error:
            raise ValueError(_explain(error, target, values, place)) from error

    for name in targets(config):
        find_class(name, trust, trusted)
    return call(config)


def _explain(error: Exception, target: Any, values: Mapping[str, Any], place: str) -> str:
    """Why a class does not take its arguments: in its own words, or by naming those it takes."""
    # An assertion may have no words but its own line.
    words = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or ""
    first, *_ = words.split("\n")
    unknown = re.search(r"unexpected keyword argument '(\w+)'", first)
    if unknown and unknown[1] in values:
        taken = inspect.signature(target).parameters.values()
        names = {one.name for one in taken if one.kind not in STARRED}
        there = ", ".join(sorted((names | values.keys()) - {unknown[1]}))
        if there and unknown[1] not in names:  # else another class within refuses it
            return f"there is no {place}.{unknown[1]}; {place} has {there}"
    return f"{place}: {first}"


def find_class(
    name: Any, trust: str | Collection[str] | None = None, trusted: Collection[str] = TRUSTED
) -> Any:
    """The class of this full name: public in one of the ``trusted`` modules, or a custom one that
    is named by ``trust``, which is None where the user has no say.

    Raises:
        ValueError: it is not trusted, or there is none.
    """
    module, _, attribute = str(name).rpartition(".")
    # `in` would find a part of a name in a text.
    if name in ([trust] if isinstance(trust, str) else trust or ()):
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"trust names {name!r}, which cannot be imported: {error}") from error
    if module == "sj_taid" or is_below(module, trusted):
        with suppress(ImportError):
            found = getattr(import_module(module), attribute, None)
            # Defined there: what such a module imports from elsewhere could do anything.
            is_public = isinstance(found, type) and attribute[0] != "_"
            if is_public and is_below(found.__module__, [module, *trusted]):
                return found
    remedy = (
        f"; if it is yours or you trust it, add trust=[{name}], in training, resuming and loading"
    )
    raise ValueError(
        f"the config names {name!r}: no public class of sj_taid or of a library's module that is "
        f"known to be harmless, so it could do anything{'' if trust is None else remedy}"
    )


def is_below(name: str, names: Iterable[str]) -> bool:
    """Whether a dotted name is one of ``names`` or below one of them."""
    return any(f"{name}.".startswith(f"{other}.") for other in names)
