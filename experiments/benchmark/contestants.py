"""The neurons that are measured: ours on every backend that works here, and its peers.

All are leaky integrate-and-fire neurons with tau = 2, threshold 1 and an ATan surrogate. LIF learns
nothing, PLIF tau; ours, FlexSN and snnTorch's Leaky learn tau and the threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

from sj_taid import ALIFNode
from sj_taid.ops import backends


def contestants(device: torch.device) -> dict[str, nn.Module]:
    """By name, modules from ``[T, N]`` to ``[T, N]`` with fresh state at every call."""
    return dict(_contestants(device))


def _contestants(device: torch.device) -> Iterator[tuple[str, nn.Module]]:
    for backend in backends.BACKENDS:
        node = ALIFNode(step_mode="m", surrogate_function=surrogate.ATan(), backend=backend).to(
            device
        )
        reason = why_not(node, device)
        if reason is None:
            yield f"ALIF {backend}", Fresh(node)
        else:
            print(f"skipped ALIF {backend}: {reason}")
    options = {"step_mode": "m", "surrogate_function": surrogate.ATan()}
    yield "SpikingJelly LIF", Fresh(neuron.LIFNode(**options)).to(device)
    yield "SpikingJelly PLIF", Fresh(neuron.ParametricLIFNode(**options)).to(device)
    if hasattr(neuron, "FlexSN"):
        yield "SpikingJelly FlexSN", Fresh(flex_sn()).to(device)
    else:
        print(f"skipped FlexSN: SpikingJelly {version('spikingjelly')} has none")
    try:
        yield f"snnTorch Leaky {version('snntorch')}", Leaky().to(device)
    except PackageNotFoundError:
        print("skipped snnTorch's Leaky: pip install snntorch")


def why_not(node: nn.Module, device: torch.device) -> str | None:
    """Why the node's backend cannot run on the device."""
    try:
        node(torch.zeros(1, 1, device=device))
    except backends.BackendUnavailableError as error:
        return str(error)
    functional.reset_net(node)
    return None


class Fresh(nn.Module):
    """A SpikingJelly neuron, reset before every call."""

    def __init__(self, node: nn.Module) -> None:
        super().__init__()
        self.node = node

    def forward(self, x_seq: Tensor) -> Tensor:
        functional.reset_net(self.node)
        return self.node(x_seq)


# FlexSN takes a function that captures no module, so this one is global.
FIRE = surrogate.ATan()


def alif_step(x: Tensor, v: Tensor, w: Tensor, v_threshold: Tensor) -> tuple[Tensor, Tensor]:
    """ALIF as a step that SpikingJelly's FlexSN fuses."""
    h = v + (x - v) * torch.sigmoid(w)
    spike = FIRE(h - v_threshold)
    return spike, (1.0 - spike) * h


def flex_sn() -> nn.Module:
    parameters = (nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(())))
    return neuron.FlexSN(alif_step, 1, static_inputs=parameters)


class Leaky(nn.Module):
    """snnTorch's Leaky in its loop over time: V[t] = beta V[t-1] + X[t], reset to zero."""

    def __init__(self) -> None:
        super().__init__()
        import snntorch

        self.node = snntorch.Leaky(
            beta=0.5,
            spike_grad=snntorch.surrogate.atan(),
            learn_beta=True,
            learn_threshold=True,
            reset_mechanism="zero",
        )

    def forward(self, x_seq: Tensor) -> Tensor:
        v = self.node.init_leaky()
        spikes = []
        for x in x_seq:
            spike, v = self.node(x, v)
            spikes.append(spike)
        return torch.stack(spikes)
