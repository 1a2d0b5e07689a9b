"""Instantiate what a config names by ``_target_``: as Hydra does, with the errors as they are."""

from collections.abc import Collection, Iterator
from functools import partial
from importlib import import_module
from typing import Any

#: Public classes of these modules, and those that sj_taid itself exports, do nothing but what their
#: arguments say. No others are instantiated from a checkpoint's or a downloaded model's config.
TRUSTED = (
    "sj_taid.data",
    "sj_taid.model",
    "sj_taid.training",
    "spikingjelly.activation_based.neuron",
    "spikingjelly.activation_based.surrogate",
    "torch.nn.modules.loss",
    "torch.optim",
)


def instantiate(config: Any, **arguments: Any) -> Any:
    """Call the ``_target_`` of a config with the rest of it and ``arguments``, which win.

    The parts of a config are instantiated before the whole. With ``_partial_: true`` it gives a
    ``functools.partial``, which calls the target later.

    Args:
        config: dictionaries, lists and plain values; interpolations are resolved already.
        arguments: passed on as they are.

    Raises:
        ValueError: there is no such target.

    >>> instantiate({"_target_": "sj_taid.FixedDecoder"}, T=8).T
    8
    """
    if isinstance(config, list):
        return [instantiate(part) for part in config]
    if not isinstance(config, dict):
        return config
    options = {key: instantiate(value) for key, value in config.items()} | arguments
    if "_target_" not in options:
        return options
    target = _find(options.pop("_target_"))
    if options.pop("_partial_", False):
        return partial(target, **options)
    return target(**options)


def untrusted_targets(config: Any, trust: Collection[str] = ()) -> list[Any]:
    """The targets of a config that are neither public classes of :data:`TRUSTED` nor in ``trust``.

    >>> untrusted_targets({"a": [{"_target_": "sj_taid.TAID"}, {"_target_": "os.system"}]})
    ['os.system']
    """
    return [t for t in _targets(config) if t not in trust and not _is_trusted(t)]


def _targets(config: Any) -> Iterator[Any]:
    if isinstance(config, dict):
        if "_target_" in config:
            yield config["_target_"]
        config = list(config.values())
    if isinstance(config, list):
        for part in config:
            yield from _targets(part)


def _find(target: Any) -> Any:
    module, _, name = str(target).rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"there is no {target!r}: {error}") from error


def _is_trusted(target: Any) -> bool:
    module, _, name = str(target).rpartition(".")
    roots = [root for root in TRUSTED if f"{module}.".startswith(f"{root}.")]
    roots += ["sj_taid"] * (module == "sj_taid")
    if name.startswith("_") or not roots:
        return False
    try:
        found = _find(target)
    except (ImportError, ValueError):
        return False
    # What such a module imports from elsewhere is not meant.
    return isinstance(found, type) and f"{found.__module__}.".startswith(f"{roots[0]}.")
