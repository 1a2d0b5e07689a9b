"""Modules of a net found and replaced wherever it holds them, also in lists, dicts and tuples."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn

#: Where torch keeps a module's hooks. The dictionaries move, so handles to remove them still work.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class Site(NamedTuple):
    """A module, every path to it, and the device and dtype of the parameters before it.

    ``hidden`` if only a list, dict or tuple holds it, where torch does not look.
    """

    module: Any
    paths: tuple[str, ...]
    hidden: bool
    device: torch.device
    dtype: torch.dtype

    @property
    def path(self) -> str:
        """The first of the paths."""
        return self.paths[0]


def copy_net(net: nn.Module) -> nn.Module:
    """A deep copy with the voltages too, which torch does not copy if they have a graph."""
    memories = (m.memories() for m in net.modules() if isinstance(m, base.MemoryModule))
    attributes = (vars(m).values() for m in net.modules())
    held = chain.from_iterable(chain(memories, attributes))
    computed = [value for value in held if isinstance(value, Tensor) and not value.is_leaf]
    return copy.deepcopy(net, {id(value): value.detach().clone() for value in computed})


def find_modules(net: nn.Module, kind: type) -> list[Site]:
    """Every module of ``kind`` in ``net``, once."""
    paths = defaultdict(list)
    for path, module in net.named_modules(remove_duplicate=False):
        paths[module].append(path)
    registered = set(paths)

    def note(path: str, module: nn.Module) -> nn.Module:
        if path not in paths[module]:
            paths[module].append(path)
        return module

    _map_modules(net, "", note, set())
    sites = []
    near = next(filter(torch.is_floating_point, net.parameters()), torch.empty(0))
    for module, names in paths.items():
        near = next(filter(torch.is_floating_point, module.parameters(recurse=False)), near)
        if isinstance(module, kind):
            hidden = module not in registered
            sites.append(Site(module, tuple(names), hidden, near.device, near.dtype))
    return sites


def replace_modules(net: nn.Module, new_of: Mapping[nn.Module, nn.Module]) -> None:
    """Replace the keys of ``new_of`` in ``net`` by its values, which take over their hooks."""
    for old, new in new_of.items():
        new.train(old.training)
        empty = nn.Module()
        for hooks in _HOOKS:
            setattr(new, hooks, getattr(old, hooks))
            setattr(old, hooks, getattr(empty, hooks))
        old.register_forward_pre_hook(_warn_replaced)
    _map_modules(net, "", lambda path, module: new_of.get(module, module), set())


def _map_modules(
    value: Any, path: str, function: Callable[[str, nn.Module], nn.Module], walked: set[int]
) -> Any:
    """Replace each module that ``value`` leads to by ``function(path, module)``.

    Lists, dicts and a module's attributes are changed in place; a changed tuple becomes a new one.
    ``walked`` has the ``id`` of the containers already seen.
    """
    if isinstance(value, nn.Module):
        new = function(path, value)
        for members in (value._modules, vars(value)) if new is value else ():
            _map_items(members, f"{path}." if path else "", "", function, walked)
        return new
    if isinstance(value, tuple):
        items = [_map_modules(v, f"{path}[{i}]", function, walked) for i, v in enumerate(value)]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if isinstance(value, list | dict):
        _map_items(value, f"{path}[", "]", function, walked)
    return value


def _map_items(items: Any, start: str, end: str, function: Any, walked: set[int]) -> None:
    """:func:`_map_modules` for the items of a list or dict, whose paths are ``start key end``."""
    if id(items) in walked:
        return
    walked.add(id(items))
    for key, item in list(items.items() if isinstance(items, dict) else enumerate(items)):
        shown = repr(key) if end else key
        new = _map_modules(item, f"{start}{shown}{end}", function, walked)
        if new is not item:
            items[key] = new


def _warn_replaced(module: nn.Module, inputs: Any) -> None:
    warnings.warn(
        f"a {type(module).__name__} runs that swap_neurons or to_lif has replaced: something other "
        "than an attribute, list, dict or tuple of the net still holds it, such as a closure. Let "
        "that look the neuron up in the net when it is called.",
        stacklevel=5,
    )
