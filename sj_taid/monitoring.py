"""Firing rates and learned parameters of each layer of neurons."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from ._internal.neurons import need_neurons
from ._internal.report import table
from .ops.surrogate import counts, levels_of
from .thresholds import describe_at_reset, threshold_of, warn_at_bound, warn_at_reset

_SCALE = (
    "sj_taid.calibrate(net, x_seq) sets their v_threshold for the firing rate that you choose; or "
    "put a norm before them."
)
#: what may be wrong with a layer's rate, and what to do
_REMEDIES = {
    "dead": _SCALE,
    "saturated": _SCALE,
    "not finite": "A voltage is NaN or infinite: torch.autograd.detect_anomaly() finds where from.",
}


@dataclass(frozen=True)
class LayerState:
    """One layer of neurons.

    Attributes:
        firing_rate: spikes per neuron and time step, in [0, 1], negative ones included; of a neuron
            that counts to D the mean count, in [0, D], as a count of n is n spikes to a weight.
            ``None`` before the first input, NaN if a voltage was not finite.
        tau: membrane time constant in time steps, the mean over channels; ``None`` for a neuron
            without one.
        v_threshold: threshold voltage, the mean over channels.
    """

    firing_rate: float | None
    tau: float | None
    v_threshold: float


def monitor(net: nn.Module, *, dead: float = 1e-3, saturated: float = 0.9) -> Monitor:
    """Count the spikes of the neurons of ``net``, SpikingJelly's own too, by forward hooks.

    Neurons are subclasses of ``BaseNode`` and ``SimpleBaseNode``; it does not see others, such as
    ``PSN``.

    Args:
        net: a module with neurons.
        dead: firing rate below which a layer counts as dead: it passes nothing on, and may
            receive no gradient. A rule of thumb, as is the next.
        saturated: firing rate above which a layer hardly passes any information on; of a neuron
            that counts to D, that share of D.

    Returns:
        A :class:`.Monitor`, which counts without synchronisation until it is read. The graphs of a
        net compiled before have no hooks: call ``torch.compiler.reset()`` in between.

    Raises:
        ValueError: not ``0 <= dead <= saturated <= 1``, or ``net`` has no neurons.

    >>> from sj_taid import ALIFNode
    >>> net = nn.Sequential(nn.Identity(), ALIFNode(v_threshold=0.5))
    >>> with monitor(net) as watch:
    ...     spikes = net(torch.tensor([[2.0, 0.0]]))
    >>> watch.state()["1"]
    LayerState(firing_rate=0.5, tau=2.0, v_threshold=0.5)
    """
    return Monitor(net, dead, saturated)


class Monitor(AbstractContextManager["Monitor"]):
    """A counter of spikes, on until :meth:`remove` or the end of ``with``."""

    def __init__(self, net: nn.Module, dead: float, saturated: float) -> None:
        if not 0.0 <= dead <= saturated <= 1.0:
            raise ValueError(
                f"expected 0 <= dead <= saturated <= 1, but dead={dead}, saturated={saturated}"
            )
        self._dead = dead
        self._saturated = saturated
        self._counts = {site.path: _Count(site.node) for site in need_neurons(net, "watch")}
        self._hooks = [count.node.register_forward_hook(count) for count in self._counts.values()]

    def clear(self) -> None:
        """Forget the spikes counted so far."""
        for count in self._counts.values():
            count.clear()

    def remove(self) -> None:
        """Stop counting; the counts stay readable."""
        for hook in self._hooks:
            hook.remove()

    def state(self) -> dict[str, LayerState]:
        """Path -> :class:`LayerState`, over all inputs since the start or :meth:`clear`.

        Warns of dead and saturated layers, of voltages that were not finite, and of thresholds at
        their ``min_v_threshold`` or at the reset voltage.
        """
        states = self.layers()
        for mark, remedy in _REMEDIES.items():
            rates = {p: s.firing_rate for p, s in states.items() if self._mark(p, s) == mark}
            if rates:
                listed = ", ".join(f"{path or 'net'} ({rate:.2g})" for path, rate in rates.items())
                text = f"{mark} layers, spikes per neuron and step: {listed}. {remedy}"
                warnings.warn(text, stacklevel=2)
        warn_at_bound(self._nodes())
        warn_at_reset(self._nodes())
        return states

    def _mark(self, path: str, state: LayerState) -> str:
        """What is wrong with a layer's rate, or ""."""
        rate = state.firing_rate
        if rate is None:
            return ""
        if math.isnan(rate):
            return "not finite"
        levels = levels_of(self._counts[path].node.surrogate_function)
        if rate < self._dead:
            return "dead"
        return "saturated" if rate > self._saturated * levels else ""

    def _nodes(self) -> dict[str, nn.Module]:
        return {path: count.node for path, count in self._counts.items()}

    def layers(self) -> dict[str, LayerState]:
        """The result of :meth:`state`, without a warning."""
        return {
            path: LayerState(count.rate(), *tau_and_threshold(count.node))
            for path, count in self._counts.items()
        }

    def __str__(self) -> str:
        rows = []
        for path, state in self.layers().items():
            numbers = ("-" if value is None else f"{value:.4g}" for value in astuple(state))
            rows.append((path or "net", *numbers, self._mark(path, state)))
        listed = table(("layer", "rate", "tau", "threshold", "note"), rows)
        return f"{listed}\n{describe_at_reset(self._nodes())}".rstrip()

    def __exit__(self, *error: object) -> None:
        self.remove()


class _Count:
    """The forward hook of one neuron, without a :class:`Monitor`, so that copies count apart."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.clear()

    def clear(self) -> None:
        self.spikes: Tensor | float = 0.0
        self.steps: Tensor | float = 0.0  # a tensor: torch.compile compiles for every number

    def rate(self) -> float | None:
        return float(self.spikes) / float(self.steps) if self.steps else None

    def __call__(self, node: Any, inputs: Any, output: Tensor | Sequence[Tensor]) -> None:
        self.node = node  # another has the hook after swap_neurons
        spikes = spikes_of(node, output).detach()
        # A neuron whose voltage is NaN fires no spike: NaN and infinity times 0 make the sum NaN.
        v = torch.as_tensor(node.v).detach().sum(dtype=torch.float64)
        fired = spikes if counts(node.surrogate_function) else spikes.ne(0)
        self.spikes = self.spikes + fired.sum(dtype=torch.float64) + 0.0 * v
        self.steps = self.steps + spikes.new_full((), spikes.numel(), dtype=torch.float64)


def spikes_of(node: Any, output: Tensor | Sequence[Tensor]) -> Tensor:
    """The spikes or counts in a neuron's output, in which OTTT neurons have a trace too."""
    spikes = output if isinstance(output, Tensor) else output[0]
    return spikes * node.levels if getattr(node, "normalize", False) else spikes


def tau_and_threshold(node: Any) -> tuple[float | None, float]:
    """The tau, if it has one, and threshold of a neuron, their means over its channels."""
    if isinstance(node, neuron.ParametricLIFNode):
        tau = 1.0 / node.w.sigmoid()
    else:
        tau = getattr(node, "tau", None)
    return None if tau is None else _mean(tau), _mean(threshold_of(node))


def _mean(value: Tensor | float) -> float:
    return torch.as_tensor(value).detach().mean().item()
