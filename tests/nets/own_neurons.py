"""Neurons as users write them, on both versions of SpikingJelly: each says its step alone."""

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

from sj_taid._internal.compat import FUNCTIONAL_STATES


class Own(neuron.BaseNode):
    """A neuron of ``step(x, *states)``, which gives the output and the next states."""

    states = ()  #: apart from the voltage

    def __init__(self, surrogate_function=None, **options):
        options.setdefault("v_threshold", 0.5)
        function = surrogate_function or surrogate.ATan()
        super().__init__(surrogate_function=function, step_mode="m", **options)
        for name in self.states:
            self.register_memory(name, 0.0)

    def per_channel(self, value):
        """A parameter for each of 4 channels of images."""
        return nn.Parameter(value + torch.linspace(-0.2, 0.2, 4).view(4, 1, 1))

    def _states(self):
        return ["v", *self.states]

    if FUNCTIONAL_STATES:

        def single_step_functional_forward(self, inputs, states, *args, **kwargs):
            spike, *after = self.step(*inputs, *_tensors(inputs[0], states))
            return (spike,), tuple(after)

    else:

        def single_step_forward(self, x):
            states = [getattr(self, name) for name in self._states()]
            spike, *after = self.step(x, *_tensors(x, states))
            for name, value in zip(self._states(), after, strict=True):
                setattr(self, name, value)
            return spike


def _tensors(x, states):
    return [s if isinstance(s, torch.Tensor) else torch.full_like(x, s) for s in states]


class GLIF(Own):
    """Yao et al. 2022: gates between two leaks, two inputs and two resets."""

    def __init__(self, **options):
        super().__init__(**options)
        gates = torch.tensor([0.3, -0.4, 0.6])
        self.alpha, self.beta, self.gamma = (nn.Parameter(g.clone()) for g in gates)
        self.tau, self.leak = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.tensor(0.1))
        self.conduct = self.per_channel(torch.tensor(0.7))

    def step(self, x, v):
        alpha, beta, gamma = self.alpha.sigmoid(), self.beta.sigmoid(), self.gamma.sigmoid()
        v = (1 - alpha * (1 - self.tau)) * v - (1 - alpha) * self.leak
        v = v + (1 - beta * (1 - self.conduct)) * x
        spike = self.surrogate_function(v - self.v_threshold)
        return spike, v - gamma * v * spike - (1 - gamma) * self.v_threshold * spike


class AdaptiveThreshold(Own):
    """LSNN (Bellec et al. 2018): a spike raises the threshold, which decays."""

    states, rho, beta = ("a",), 0.9, 1.6

    def step(self, x, v, a):
        v = 0.7 * v + x
        spike = self.surrogate_function(v - (self.v_threshold + self.beta * a))
        return spike, v - spike * self.v_threshold, self.rho * a + (1 - self.rho) * spike


class TwoCompartments(Own):
    states = ("dendrite",)

    def __init__(self, **options):
        super().__init__(**options)
        self.to_soma = nn.Parameter(torch.tensor(0.6))

    def step(self, x, v, dendrite):
        dendrite = 0.8 * dendrite - 0.2 * v + x
        v = 0.6 * v + self.to_soma.tanh() * dendrite
        spike = self.surrogate_function(v - self.v_threshold)
        return spike, v - spike.detach() * self.v_threshold, dendrite


class Refractory(Own):
    """It stays silent for two steps after a spike."""

    states, silence = ("left",), 2

    def step(self, x, v, left):
        v = torch.where(left > 0, v, v + (x - v) / 1.7)
        spike = self.surrogate_function(v - self.v_threshold) * (left <= 0).to(x)
        left = torch.where(spike > 0, float(self.silence), (left - 1).clamp(min=0))
        return spike, v * (1 - spike), left


class PerChannel(Own):
    def __init__(self, **options):
        super().__init__(**options)
        self.w = self.per_channel(torch.tensor(0.0))
        self.register_buffer("threshold", torch.linspace(0.4, 0.7, 4).view(4, 1, 1))

    def step(self, x, v):
        v = v + (x - v) * self.w.sigmoid()
        spike = self.surrogate_function(v - self.threshold)
        return spike, torch.where(spike.bool(), self.w * 0.1, v)


class _Triangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, width):
        ctx.save_for_backward(x)
        ctx.width = width
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - x.abs() / ctx.width).clamp(min=0), None


class Triangle(nn.Module):
    def __init__(self, width=1.5):
        super().__init__()
        self.width = width

    def forward(self, x):
        return _Triangle.apply(x, self.width)


class OwnSurrogate(Own):
    def __init__(self, **options):
        super().__init__(surrogate_function=Triangle(), **options)

    def step(self, x, v):
        v = v / 1.3 + x
        spike = self.surrogate_function(v - self.v_threshold)
        return spike, v - self.v_threshold * spike


class ThreeStates(Own):
    """A current, and a slow trace that inhibits."""

    states, decays = ("current", "trace"), (0.8, 0.5, 0.95)

    def step(self, x, v, current, trace):
        of_current, of_v, of_trace = self.decays
        current = of_current * current + x
        v = of_v * v + current - 0.3 * trace
        spike = self.surrogate_function(v - self.v_threshold)
        return spike, v * (1 - spike), current, of_trace * trace + spike


class Ternary(Own):
    def step(self, x, v):
        v = v * 0.75 + x
        up, down = (self.surrogate_function(s * v - self.v_threshold) for s in (1, -1))
        return up - down, v - self.v_threshold * (up - down)


OWN = (
    *(GLIF, AdaptiveThreshold, TwoCompartments, Refractory, PerChannel, OwnSurrogate),
    *(ThreeStates, Ternary),
)
