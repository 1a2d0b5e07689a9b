"""States of neurons: their names in errors, and a reset before and after each sequence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .fused_neuron import FusedNeuron
from .nets.neurons import check_net


def name_neurons(net: nn.Module) -> None:
    """Store in every ALIF or accelerated neuron its path in ``net``, which its errors name.

    >>> from sj_taid import ALIFNode
    >>> net = nn.Sequential(nn.Linear(2, 2), ALIFNode())
    >>> name_neurons(net)
    >>> net[1].name
    '1'
    """
    check_net(net)
    for path, module in net.named_modules():
        if isinstance(module, FusedNeuron):
            module._taid_name = path


def reset(net: nn.Module) -> None:
    """Reset every module that has ``reset``, except metrics of torchmetrics.

    Those collect over batches; SpikingJelly's ``reset_net`` resets them too.
    """
    module: Any
    for module in net.modules():
        if callable(getattr(module, "reset", None)) and not _is_metric(module):
            module.reset()


def _is_metric(module: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "torchmetrics" for kind in type(module).__mro__)


@contextmanager
def fresh_state(net: nn.Module) -> Iterator[nn.Module]:
    """Run one sequence from rest: reset every state of ``net`` before and after, not its metrics.

    Put forward, backward and the optimiser's step inside. Works on SpikingJelly's own neurons too.

    >>> import torch
    >>> from sj_taid import ALIFNode
    >>> net = nn.Sequential(nn.Linear(2, 2), ALIFNode())
    >>> for x in torch.rand(3, 4, 2):
    ...     with fresh_state(net):
    ...         net(x).sum().backward()
    >>> net[1].v
    0.0
    """
    name_neurons(net)
    reset(net)
    try:
        yield net
    finally:
        reset(net)
