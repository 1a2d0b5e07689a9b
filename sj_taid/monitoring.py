"""Firing rates and learned parameters of each layer of neurons."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from ._internal import compat
from .nets.neurons import need_neurons
from .nets.report import table
from .ops.surrogate import is_integer, levels_of

#: The firing rate below which a layer counts as dead: it passes nothing on, and may receive no
#: gradient. A rule of thumb, as is the next.
DEAD = 1e-3
#: The rate above which a layer hardly passes any information on; of counts to D that share of D.
SATURATED = 0.9
_SCALE = (
    "sj_taid.calibrate(net, x_seq) sets their v_threshold for the firing rate that you choose; or "
    "put a norm before them."
)
#: what may be wrong with a layer, and what to do
_REMEDIES = {
    "dead": _SCALE,
    "saturated": _SCALE,
    "voltage not finite": "torch.autograd.detect_anomaly() finds where NaN or infinity come from.",
    "threshold at or below the reset voltage": (
        "Such a neuron fires at every step without any input, and one that counts divides by it: "
        "train with a min_v_threshold above the v_reset."
    ),
    "threshold at its lower bound": (
        "It rises again when the loss asks for it; another min_v_threshold lets it fall further."
    ),
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


class monitor(AbstractContextManager["monitor"]):
    """Count the spikes of neurons by forward hooks, until :meth:`remove` or ``with`` ends.

    It counts without synchronisation until it is read. The graphs of a net compiled before have no
    hooks: call ``torch.compiler.reset()`` in between.

    Neurons are subclasses of ``BaseNode`` and ``SimpleBaseNode``, SpikingJelly's own too; it does
    not see others, such as ``PSN``.

    Args:
        net: a module with neurons.

    Raises:
        ValueError: ``net`` has no neurons.

    >>> from sj_taid import ALIFNode
    >>> net = nn.Sequential(nn.Identity(), ALIFNode(v_threshold=0.5))
    >>> with monitor(net) as watch:
    ...     spikes = net(torch.tensor([[2.0, 0.0]]))
    >>> watch.state()["1"]
    LayerState(firing_rate=0.5, tau=2.0, v_threshold=0.5)
    """

    def __init__(self, net: nn.Module) -> None:
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

        Warns of dead and saturated layers (rates below 0.001 and above 0.9), of voltages that were
        not finite, and of thresholds at their ``min_v_threshold`` or at the reset voltage.
        """
        states = self.layers()
        warn_of(self._notes(states))
        return states

    def _notes(self, states: Mapping[str, LayerState]) -> dict[str, list[str]]:
        """What is wrong with each layer, by its path."""
        found = {}
        for path, state in states.items():
            node = self._counts[path].node
            rate = DEAD if state.firing_rate is None else state.firing_rate
            of_rate = {
                "dead": rate < DEAD,
                "saturated": rate > SATURATED * levels_of(node.surrogate_function),
                "voltage not finite": math.isnan(rate),
            }
            notes = [note for note, holds in of_rate.items() if holds]
            found[path] = notes + _notes_on_threshold(node)
        return found

    def layers(self) -> dict[str, LayerState]:
        """The result of :meth:`state`, without a warning."""
        return {
            path: LayerState(count.rate(), *tau_and_threshold(count.node))
            for path, count in self._counts.items()
        }

    def firing_rate(self) -> float:
        """Spikes per neuron and time step, of all layers together; NaN before the first input."""
        counts = self._counts.values()
        steps = sum(float(count.steps) for count in counts)
        return sum(float(count.spikes) for count in counts) / steps if steps else math.nan

    def __str__(self) -> str:
        states = self.layers()
        notes, rows = self._notes(states), []
        for path, state in states.items():
            numbers = ("-" if value is None else f"{value:.4g}" for value in astuple(state))
            rows.append((path or "net", *numbers, ", ".join(notes[path])))
        return table(("layer", "rate", "tau", "threshold", "note"), rows)

    def __exit__(self, *error: object) -> None:
        self.remove()


class _Count:
    """A forward hook that counts one neuron's spikes; without the monitor, so that copies count."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.clear()

    def clear(self) -> None:
        self.spikes: Tensor | float = 0.0
        self.steps: Tensor | float = 0.0  # a tensor: torch.compile compiles for every number

    def rate(self) -> float | None:
        return float(self.spikes) / float(self.steps) if self.steps else None

    def __call__(self, node: Any, inputs: Any, output: Tensor | Sequence[Tensor]) -> None:
        spikes = spikes_of(node, output).detach()
        # A neuron whose voltage is NaN fires no spike: NaN and infinity times 0 make the sum NaN.
        v = torch.as_tensor(node.v).detach().sum(dtype=torch.float64)
        self.spikes = self.spikes + spikes.sum(dtype=torch.float64) + 0.0 * v
        self.steps = self.steps + spikes.new_full((), spikes.numel(), dtype=torch.float64)


def spikes_of(node: Any, output: Tensor | Sequence[Tensor]) -> Tensor:
    """The number of spikes of each neuron in its output, which OTTT neurons give with a trace."""
    spikes = output if isinstance(output, Tensor) else output[0]
    if not is_integer(node.surrogate_function):
        return spikes.ne(0)
    return spikes * node.levels if getattr(node, "normalize", False) else spikes


def warn_of(notes: Mapping[str, Sequence[str]]) -> None:
    """Warn of what is wrong with layers, path -> notes, and say what to do."""
    for note, remedy in _REMEDIES.items():
        if paths := [path or "net" for path, found in notes.items() if note in found]:
            warnings.warn(f"layers {', '.join(paths)}: {note}. {remedy}", stacklevel=3)


def notes_on_thresholds(net: nn.Module) -> dict[str, list[str]]:
    """The neurons of ``net`` whose threshold has fallen to their reset voltage or lower bound."""
    return {path: _notes_on_threshold(module) for path, module in net.named_modules()}


def _notes_on_threshold(node: Any) -> list[str]:
    if not isinstance(node, compat.NEURONS):
        return []
    threshold, least = torch.as_tensor(_threshold_of(node)), getattr(node, "min_v_threshold", None)
    if (threshold <= (node.v_reset or 0.0)).any():  # a soft reset leaves the voltage at 0
        return ["threshold at or below the reset voltage"]
    is_low = least is not None and (threshold <= least).any()
    return ["threshold at its lower bound"] if is_low else []


def tau_and_threshold(node: Any) -> tuple[float | None, float]:
    """The tau, if it has one, and threshold of a neuron, their means over its channels."""
    if isinstance(node, neuron.ParametricLIFNode):
        tau = 1.0 / node.w.sigmoid()
    else:
        tau = getattr(node, "tau", None)
    return None if tau is None else _mean(tau), _mean(_threshold_of(node))


def _threshold_of(node: Any) -> Any:
    """The threshold that a neuron fires at, which ALIF's ``min_v_threshold`` bounds."""
    return getattr(node, "effective_v_threshold", node.v_threshold)


def _mean(value: Tensor | float) -> float:
    return value.detach().mean().item() if isinstance(value, Tensor) else float(value)
