"""Folding: a neuron's threshold is divided into the layer before it, and becomes 1."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

from . import _compat
from .fusion import KNOWN_NORMS, is_norm
from .neuron import ALIFNode
from .tracing import Traced, has_hooks, trace

#: The neurons whose dynamics are known to scale.
_NEURONS = (ALIFNode, *_compat.PLAIN_NEURONS)
#: The layers other than norms that a threshold can divide; axis 0 of their weight is the channel.
_LAYERS = tuple(
    getattr(home, name) for home in (nn, layer) for name in ("Linear", "Conv1d", "Conv2d", "Conv3d")
)

#: The attributes of a neuron and of a layer through which a forward can see what folding changes.
_VOLTAGES = frozenset({"v", "v_seq", "v_reset", "v_threshold", "memories", "named_memories"})
_WEIGHTS = frozenset({"weight", "bias", "parameters", "named_parameters", "state_dict"})


@torch.no_grad()
def fold_thresholds(net: nn.Module) -> dict[str, str]:
    """Divide the layer before each neuron of ``net`` by its threshold, in place, which becomes 1.

    Returns the path of each neuron that keeps another threshold, and why.
    """
    with _watch_reads(net) as read:
        traced = trace(net, _is_source)
    for module in traced.untraced:  # it may read more than it did before it failed
        names = _find_names(module)
        for child in module.modules():
            for name in sorted(names & (_WEIGHTS if _is_source(child) else _VOLTAGES)):
                read.setdefault(child, name)
    sources = {reader: source for source, reader in traced.readers.items()}
    uses = Counter(p for module in net.modules() for p in module.parameters(recurse=False))
    kept = {}
    for path, node in net.named_modules():
        if not isinstance(node, neuron.BaseNode) or (_threshold(node) == 1.0).all():
            continue
        source = sources.get(node)
        if node in read:
            reason: str | None = f"a forward reads {read[node]} of it"
        elif source is None:
            reason = _why_no_scale(node) or _why_no_source(node, traced)
        elif source in read:
            reason = f"a forward reads {read[source]} of the {type(source).__name__} before it"
        else:
            reason = _why_no_scale(node) or _why_not_into(source, node, uses)
        if reason:
            kept[path] = reason
        else:
            _divide(source, node)
    return kept


def _find_names(module: nn.Module) -> set[str]:
    """The names in the code of a module's forward, and of its methods that this names."""
    names: set[str] = set()
    forward = inspect.unwrap(module.forward)
    codes = [getattr(f, "__code__", None) for f in (forward, type(module).forward)]
    if None in codes:
        return {*_VOLTAGES, *_WEIGHTS}
    while codes:
        code: Any = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        own = (name for name in {*code.co_names} - names if not hasattr(nn.Module, name))
        methods = [getattr(type(module), name, None) for name in own]
        codes += [method.__code__ for method in methods if inspect.isfunction(method)]
        names.update(code.co_names)
    return names


@contextmanager
def _watch_reads(net: nn.Module) -> Iterator[dict[nn.Module, str]]:
    """Record the neurons and layers of which traced forwards read voltages or weights."""
    known = {*_NEURONS, *_LAYERS, *KNOWN_NORMS}
    kinds = {m: type(m) for m in net.modules() if type(m) in known}
    read: dict[nn.Module, str] = {}

    def get(node: Any, name: str) -> Any:
        if name in _VOLTAGES or name in _WEIGHTS:
            read.setdefault(node, name)
        return super(type(node), node).__getattribute__(name)

    try:
        for node, kind in kinds.items():
            node.__class__ = type(kind.__name__, (kind,), {"__getattribute__": get})
        yield read
    finally:
        for node, kind in kinds.items():
            node.__class__ = kind


def _is_source(module: nn.Module) -> bool:
    return is_norm(module) or isinstance(module, _LAYERS)


def _why_no_scale(node: Any) -> str | None:
    """Why the dynamics of ``node`` do not scale to a threshold of 1, or ``None``."""
    threshold = _threshold(node)
    if type(node) not in _NEURONS:
        return f"what a {type(node).__name__} computes is not known to scale"
    if not ((threshold > 0) & threshold.isfinite()).all():
        return "only a positive and finite threshold scales to 1"
    rest = (node.v_reset, node.v, _compat.reset_value(node, "v"))
    if len(threshold.unique()) > 1 and any(isinstance(v, float) and v != 0.0 for v in rest):
        return "its channels have several thresholds, but one reset voltage, which is not 0"
    if has_hooks(node, "_forward_pre_hooks", "_forward_hooks"):
        return "it has forward hooks, which may read its voltage or change its input"
    return None


def _why_no_source(node: nn.Module, traced: Traced) -> str:
    """Why no layer is known to feed ``node`` alone."""
    made = traced.inputs[node]
    if isinstance(made, str):
        return made
    why = [traced.obstacles[made]] if made in traced.obstacles else []
    return "; ".join([f"a {type(made).__name__} makes its input", *why])


def _why_not_into(source: Any, node: Any, uses: Counter[nn.Parameter]) -> str | None:
    """Why the output of ``source`` cannot be divided by the threshold of ``node``, or ``None``."""
    name, threshold = type(source).__name__, _threshold(node)
    if type(source) not in KNOWN_NORMS and type(source) not in _LAYERS:
        return f"what the {name} before it computes is not known"
    if has_hooks(source):
        return f"the {name} before it has hooks"
    if source.weight is None or (is_norm(source) and source.bias is None):
        return f"the {name} before it has no weight and bias"
    if any(uses[parameter] > 1 for parameter in source.parameters()):
        return f"the {name} before it shares its parameters with another module"
    if threshold.numel() not in (1, len(source.weight)):
        return f"the {name} before it has {len(source.weight)} channels, not {threshold.numel()}"
    return None


def _divide(source: Any, node: Any) -> None:
    """Divide the output of ``source`` and every voltage of ``node`` by its threshold."""
    threshold = _threshold(node)

    def divide(value: Any, channel: int = 0) -> Any:
        if isinstance(value, Tensor):
            return value / threshold.to(value).view(-1, *[1] * (value.dim() - channel - 1))
        return value / threshold[0].item() if value else value  # all channels' where it is not 0

    for parameter in source.parameters():  # weight, and bias if there is one
        parameter.copy_(divide(parameter))
    node.v, node.v_reset = divide(node.v, 1), divide(node.v_reset)
    node.set_reset_value("v", divide(_compat.reset_value(node, "v"), 1))
    if isinstance(node, ALIFNode):
        node.v_threshold.fill_(1.0)
        node.min_v_threshold = None
    else:
        node.v_threshold = 1.0


def _threshold(node: Any) -> Tensor:
    """The threshold used, ``[1]`` or ``[C]``."""
    value = node.effective_v_threshold if isinstance(node, ALIFNode) else node.v_threshold
    return torch.as_tensor(value, dtype=torch.float64).flatten()
