"""Build objects from configs, which may name trusted classes only."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from importlib import import_module
from typing import Any

#: Modules whose public classes a config may name: they do nothing but what their arguments say.
TRUSTED = (
    "sj_taid.data",
    "sj_taid.model",
    "sj_taid.training",
    "spikingjelly.activation_based.neuron",
    "spikingjelly.activation_based.surrogate",
    "torch.nn.modules.loss",
    "torch.optim",
)


def build(config: Any, trust: Collection[str] | None = None, **arguments: Any) -> Any:
    """Build the object that a config describes: its ``_target_`` called with the other entries.

    Configs within it are built first. With ``_partial_`` it is a partial of the class. Nothing is
    called if one of the names is not trusted.

    Args:
        config: nested dictionaries and lists.
        trust: full names of custom classes that may be called next to those of this package,
            SpikingJelly's neurons and surrogates, ``torch.optim`` and torch's losses; None where
            the user has no say.
        arguments: for the outermost class, over those of the config.

    Raises:
        ValueError: a class that is not trusted, or that does not take its arguments.

    >>> build({"_target_": "sj_taid.FixedDecoder", "T": 8}).T
    8
    """
    names = [name for name in _targets(config) if name not in (trust or ())]
    if foreign := [name for name in names if not _is_trusted(name)]:
        remedy = (
            "; if it is yours or from a trusted source, add "
            f"trust=[{','.join(map(str, foreign))}], in training and in loading"
        )
        raise ValueError(
            f"the config names {', '.join(map(repr, foreign))}: no public class of sj_taid, "
            f"{', '.join(TRUSTED)}, so it could do anything{'' if trust is None else remedy}"
        )
    return _call(config, arguments)


def _targets(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _targets(child)


def _is_trusted(name: Any) -> bool:
    module, _, attribute = str(name).rpartition(".")
    roots = ["sj_taid"] if module == "sj_taid" else [r for r in TRUSTED if _is_in(module, [r])]
    try:
        found = getattr(import_module(module), attribute, None) if roots else None
    except ImportError:
        return False
    # Defined there: what such a module imports from elsewhere could do anything.
    return isinstance(found, type) and attribute[0] != "_" and _is_in(found.__module__, roots)


def _is_in(module: str, roots: Collection[str]) -> bool:
    return any(f"{module}.".startswith(f"{root}.") for root in roots)


def _call(node: Any, arguments: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_call(child, {}) for child in node]
    if not isinstance(node, dict):
        return node
    values = {key: _call(value, {}) for key, value in node.items()} | arguments
    if "_target_" not in values:
        return values
    name = values.pop("_target_")
    is_partial = values.pop("_partial_", False)
    try:
        module, _, attribute = name.rpartition(".")
        target = getattr(import_module(module), attribute)
        return partial(target, **values) if is_partial else target(**values)
    except (AttributeError, ImportError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name} cannot be built: {error}") from error
