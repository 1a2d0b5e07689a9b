"""Thresholds that are plain numbers, which ``state_dict`` leaves out and calibration sets."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def fixed_thresholds(net: nn.Module) -> dict[str, float]:
    """The thresholds of ``net`` that are not parameters, by the paths of their neurons.

    >>> from spikingjelly.activation_based.neuron import LIFNode
    >>> fixed_thresholds(nn.Sequential(nn.Linear(2, 2), LIFNode(v_threshold=0.5)))
    {'1': 0.5}
    """
    nodes = {path: getattr(node, "v_threshold", None) for path, node in net.named_modules()}
    return {path: value for path, value in nodes.items() if isinstance(value, float)}


def set_fixed_thresholds(net: nn.Module, thresholds: Mapping[str, Any]) -> None:
    """Set the thresholds that :func:`fixed_thresholds` returned.

    Raises:
        ValueError: ``net`` has no such threshold at a path, or a value is not a float; nothing is
            set then.
    """
    there = fixed_thresholds(net)
    for path, value in thresholds.items():
        if path not in there:
            raise ValueError(f"no neuron with a fixed threshold at {path!r}; there are {[*there]}")
        if not isinstance(value, float):
            raise ValueError(f"the threshold of {path} must be a float, but it is {value!r}")
    for path, value in thresholds.items():
        net.get_submodule(path).v_threshold = value
