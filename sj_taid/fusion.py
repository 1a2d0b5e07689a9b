"""Batch norms fused with the neurons that read them into one operator."""

from __future__ import annotations

from typing import Any

from spikingjelly.activation_based import layer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._checks import check_net
from ._forward import Forward
from ._fused_neuron import KINDS, FusedNeuron
from ._norm_input import PassOn
from .report import Report, Row
from .tracing import has_hooks, trace

__all__ = ["fuse_norm", "unfuse_norm"]

#: The classes that compute torch's batch norm over time and batch.
KNOWN_NORMS = frozenset(
    getattr(home, name)
    for home in (nn, layer)
    for name in (
        *(f"BatchNorm{n}d" for n in (1, 2, 3)),
        *(f"ThresholdDependentBatchNorm{n}d" for n in (1, 2, 3)),
        "SyncBatchNorm",
    )
    if hasattr(home, name)
)


def fuse_norm(net: nn.Module) -> Report:
    r"""Let every :class:`~sj_taid.ALIFNode` apply the batch norm before it, in place.

    .. math::
        Y[t] = \gamma\,\frac{X[t] - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta, \qquad
        S = \mathrm{ALIF}(Y)

    as one operator that neither writes nor saves :math:`Y`; outputs and gradients are equal to
    rounding. The norm stays where it is, with the same keys of ``state_dict``, but only passes its
    input on to the neuron.

    A norm of torch's or SpikingJelly's is fused if an ALIF in step mode ``"m"`` is its only reader.
    That is found by tracing the ``forward`` of each module (``torch.fx``, in training and in eval
    mode, on both sides of a branch), from one block into the next, and where time is folded into
    the batch (``SeqToANNContainer``, ``seq_to_ann_forward``, ``unflatten(0, ...)``).

    Once fused, anything but the neuron that reads what the norm passes on raises an error that
    names :func:`.unfuse_norm`, as after a replaced neuron or in a slice ``net[:2]``; so does a
    neuron whose norm was not called before it, as in a ``forward`` that branches on a flag.
    Convert to ``SyncBatchNorm`` first and fuse then.

    Returns:
        The report: ``print`` it.

    >>> from sj_taid import ALIFNode
    >>> net = nn.Sequential(layer.Conv2d(1, 4, 3), layer.BatchNorm2d(4), ALIFNode())
    >>> for module in net:
    ...     module.step_mode = "m"
    >>> print(fuse_norm(net))
    1 norms fused, 0 left alone
    layer  kind         done          note
    1      BatchNorm2d  fused into 2  equal outputs to rounding
    """
    check_net(net, "fuse_norm")
    paths = {module: path for path, module in net.named_modules()}
    traced = trace(net, is_norm)
    rows = []
    for norm in filter(is_norm, paths):
        reader: Any = traced.readers.get(norm)
        note = _why_not(norm, reader, norm in traced.folded)
        if note is None and reader is None:
            note = traced.obstacles[norm]
        if note is None:
            reader.apply_norm(norm)
        done = "" if note else f"fused into {paths[reader]}"
        rows.append(
            Row(paths[norm], type(norm).__name__, done, note or "equal outputs to rounding")
        )
    return Report("norms fused", tuple(rows))


def unfuse_norm(net: nn.Module) -> None:
    """Undo :func:`.fuse_norm`: every norm is applied by itself again, in place.

    >>> from sj_taid import ALIFNode
    >>> net = nn.Sequential(layer.BatchNorm2d(4, step_mode="m"), ALIFNode(step_mode="m"))
    >>> len(fuse_norm(net).changed), unfuse_norm(net), net[1].norm
    (1, None, None)
    """
    check_net(net, "unfuse_norm")
    for module in net.modules():
        if isinstance(module, FusedNeuron):
            module.apply_norm(None)
        elif isinstance(vars(module).get("forward"), PassOn):  # its neuron is gone
            del module.forward


def _why_not(norm: Any, reader: Any, folded: bool) -> str | None:
    """Why ``norm`` cannot be fused with ``reader``, if there is one; ``None`` if it can.

    ``folded``: whether it is in a container that folds time into the batch.
    """
    forward = vars(norm).get("forward")
    if isinstance(forward, PassOn):
        return "fused already"
    if forward is not None:
        ours = isinstance(forward, Forward)
        return "recomputed already" if ours else "its forward was replaced"
    if type(norm) not in KNOWN_NORMS:
        return f"{type(norm).__name__} is not known to compute torch's batch norm"
    if has_hooks(norm):
        return "it has hooks, which would see its input instead of its output"
    if reader is None:
        return None
    if type(reader) not in KINDS:
        return f"its reader is a {type(reader).__name__}, not a neuron on the fused operator"
    if has_hooks(reader, "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        return "its reader has a hook on its input, which would act before the norm"
    if reader.norm is not None:
        return "its reader applies another norm already"
    if reader.step_mode != "m" or not (folded or getattr(norm, "step_mode", "s") == "m"):
        return "it does not run on [T, N, C, *], as layer.BatchNorm*d does in step mode 'm'"
    return None


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm)
