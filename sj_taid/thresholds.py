"""Thresholds that ``state_dict`` leaves out, and warnings of thresholds that fell too far."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ._internal import compat
from ._internal.checks import check_numbers
from ._internal.neurons import check_net
from .neuron import ALIFNode


def fixed_thresholds(net: nn.Module) -> dict[str, float]:
    """The thresholds of ``net`` that are not parameters, by the paths of their neurons.

    >>> from spikingjelly.activation_based.neuron import LIFNode
    >>> fixed_thresholds(nn.Sequential(nn.Linear(2, 2), LIFNode(v_threshold=0.5)))
    {'1': 0.5}
    """
    check_net(net)
    nodes = {path: getattr(node, "v_threshold", None) for path, node in net.named_modules()}
    return {path: value for path, value in nodes.items() if isinstance(value, float)}


def set_fixed_thresholds(net: nn.Module, thresholds: Mapping[str, Any]) -> None:
    """Set the thresholds that :func:`fixed_thresholds` returned.

    Raises:
        ValueError: ``net`` has no such threshold at a path, or a value is no number; nothing is
            set then.
    """
    there = fixed_thresholds(net)
    for path in thresholds:
        if path not in there:
            raise ValueError(f"no neuron with a fixed threshold at {path!r}; there are {[*there]}")
    check_numbers(**{f"the threshold of {path!r}": value for path, value in thresholds.items()})
    for path, value in thresholds.items():
        neuron: Any = net.get_submodule(path)
        neuron.v_threshold = float(value)


def threshold_of(node: Any) -> Any:
    """The threshold that a neuron fires at, which ALIF's ``min_v_threshold`` bounds."""
    return getattr(node, "effective_v_threshold", node.v_threshold)


def describe_at_reset(nodes: Mapping[str, nn.Module]) -> str:
    """Names the neurons whose threshold is at or below their reset voltage; "" if there is none.

    >>> from sj_taid import ALIFNode
    >>> describe_at_reset({"low": ALIFNode(v_threshold=-0.5), "fine": ALIFNode()})[:50]
    'thresholds at or below the reset voltage: low. The'
    """
    found = []
    for path, node in nodes.items():
        if isinstance(node, compat.NEURONS):
            rest = node.v_reset or 0.0  # a soft reset leaves it at 0
            if (torch.as_tensor(threshold_of(node)) <= rest).any():
                found.append(path or "net")
    if not found:
        return ""
    return (
        f"thresholds at or below the reset voltage: {', '.join(found)}. These neurons fire at "
        "every step without any input: train with a min_v_threshold above their v_reset."
    )


def warn_at_reset(nodes: Mapping[str, nn.Module]) -> None:
    """Warn of what :func:`describe_at_reset` finds."""
    if text := describe_at_reset(nodes):
        warnings.warn(text, stacklevel=3)


def warn_at_bound(nodes: Mapping[str, nn.Module]) -> None:
    """Warn of thresholds at or below their ``min_v_threshold``."""
    listed = []
    for path, node in nodes.items():
        if isinstance(node, ALIFNode) and node.min_v_threshold is not None:
            bounded = node.v_threshold.detach() <= node.min_v_threshold
            if bounded.any():
                share = f"{int(bounded.sum())} of {bounded.numel()}"
                listed.append(f"{path or 'net'} ({node.min_v_threshold:g}, {share})")
    if listed:
        warnings.warn(
            f"thresholds at their lower bound: {', '.join(listed)}. They rise again "
            "when the loss asks for it; another min_v_threshold lets them fall further.",
            stacklevel=3,
        )
