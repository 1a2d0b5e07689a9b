"""Parameter groups: a separate learning rate for time constants and thresholds."""

from typing import Any

from spikingjelly.activation_based import neuron
from torch import nn

from ._internal.checks import check_not_negative
from .nets.neurons import check_net
from .neuron import ALIFNode


def parameter_groups(
    net: nn.Module, lr: float, *, lr_scale: float = 10.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for any torch optimiser: the neurons' parameters, and all others.

    Args:
        net: a module with :class:`~sj_taid.ALIFNode` s or PLIFs, whose parameters include their
            surrogates' and parametrizations'.
        lr: the learning rate of everything else.
        lr_scale: the neurons learn at ``lr * lr_scale``; 10 as measured in ``RESULTS.md``.
        weight_decay: of the neurons; it pulls tau to 2 and thresholds to 0. The others take the
            optimiser's own.

    Returns:
        The groups ``"weights"`` and ``"neurons"`` that have parameters, without frozen ones.

    Raises:
        ValueError: ``lr``, ``lr_scale`` or ``weight_decay`` is not a finite number >= 0.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 2), ALIFNode())
    >>> groups = parameter_groups(net, lr=1e-3)
    >>> optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
    >>> [(g["name"], len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    [('weights', 2, 0.001, 0.01), ('neurons', 2, 0.01, 0.0)]
    """
    check_net(net)
    check_not_negative(lr=lr, lr_scale=lr_scale, weight_decay=weight_decay)
    neurons = {
        parameter
        for module in net.modules()
        if isinstance(module, ALIFNode | neuron.ParametricLIFNode)
        for name, parameter in module.named_parameters()
        if "." not in name or name.startswith(("parametrizations.", "surrogate_function."))
    }
    learned = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups = [
        {"name": "weights", "params": [p for p in learned if p not in neurons], "lr": lr},
        {
            "name": "neurons",
            "params": [p for p in learned if p in neurons],
            "lr": lr * lr_scale,
            "weight_decay": weight_decay,
        },
    ]
    return [group for group in groups if group["params"]]
