"""Modules that loop over time by themselves, in the idioms of public code, and hostile ones."""

import torch
from torch import nn

THRESH, WIDTH, DECAY = 0.5, 0.5, 0.25
time_window = 4


class Triangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma):
        ctx.save_for_backward(x, torch.tensor([gamma]))
        return (x > 0).float()

    @staticmethod
    def backward(ctx, grad):
        x, gamma = ctx.saved_tensors
        gamma = gamma[0].item()
        return grad * (1 / gamma) ** 2 * (gamma - x.abs()).clamp(min=0), None


class Rectangle(torch.autograd.Function):
    """Thresholds and widths are globals."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.ge(THRESH).float()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (abs(x - THRESH) < WIDTH).float() / (2 * WIDTH)


fire = Rectangle.apply


# ---- idioms


class TimeSecond(nn.Module):
    """A list and stack, time second."""

    def __init__(self, thresh=1.0, tau=0.5, gamma=1.0):
        super().__init__()
        self.thresh, self.tau, self.gamma = thresh, tau, gamma
        self.act = Triangle.apply

    def forward(self, x):
        mem, pot = 0, []
        for t in range(x.shape[1]):
            mem = mem * self.tau + x[:, t, ...]
            spike = self.act(mem - self.thresh, self.gamma)
            mem = (1 - spike) * mem
            pot.append(spike)
        return torch.stack(pot, dim=1)


class Writes(nn.Module):
    """Zeros for the whole output, time first, a decay by detached spikes, ``if i >= 1``."""

    def forward(self, x):
        mem, spike = torch.zeros_like(x[0]), torch.zeros_like(x[0])
        out, old = torch.zeros_like(x), 0
        for i in range(x.size(0)):
            mem = old * DECAY * (1 - spike.detach()) + x[i] if i >= 1 else x[i]
            spike = fire(mem)
            old = mem.clone()
            out[i] = spike
        return out


class FixedWindow(nn.Module):
    """The same with a number of steps that is a global."""

    def forward(self, x):
        mem, spike = torch.zeros_like(x[0]), torch.zeros_like(x[0])
        out, old = torch.zeros_like(x), torch.zeros_like(x[0])
        for i in range(time_window):
            mem = old * DECAY * (1 - spike) + x[i] if i >= 1 else x[i]
            spike = fire(mem)
            old = mem.clone()
            out[i] = spike
        return out


class ReadsBack(nn.Module):
    """Its output of the step before is read from the output."""

    def forward(self, x):
        u, out = torch.zeros(x.shape[1:], device=x.device), torch.zeros(x.shape, device=x.device)
        for t in range(x.shape[0]):
            u = 0.3 * u * (1 - out[max(t - 1, 0)]) + x[t]
            out[t] = fire(u)
        return out


class TimeLast(nn.Module):
    def forward(self, x):
        u, out = torch.zeros(x.shape[:-1], device=x.device), torch.zeros(x.shape, device=x.device)
        for t in range(x.size(-1)):
            u = 0.3 * u * (1 - out[..., max(t - 1, 0)]) + x[..., t]
            out[..., t] = fire(u)
        return out


class FoldedView(nn.Module):
    """[T * N, ...] unfolded by a view with its own T."""

    def __init__(self, T=4):
        super().__init__()
        self.T = T

    def forward(self, x):
        y = x.view(self.T, x.shape[0] // self.T, *x.shape[1:])
        v, outs = torch.zeros_like(y[0]), []
        for t in range(self.T):
            v = v + (y[t] - v) / 2.0
            s = fire(v)
            v = v * (1.0 - s)
            outs.append(s.unsqueeze(0))
        return torch.cat(outs, 0).flatten(0, 1)


class FoldedSlices(nn.Module):
    """[T * N, ...] cut into its steps."""

    T = 4

    def __init__(self):
        super().__init__()
        self.steps = 4

    def forward(self, x):
        size = x.shape[0] // self.steps
        mem, outs = 0, []
        for t in range(self.steps):
            mem = mem * 0.5 + x[t * size : (t + 1) * size]
            s = fire(mem)
            mem = mem - s * THRESH
            outs.append(s)
        return torch.cat(outs, 0)


class FirstStep(nn.Module):
    """``if t == 0``, an iteration over the sequence, and a state that starts at its reset."""

    def __init__(self, v_reset=-0.2):
        super().__init__()
        self.v_reset = v_reset

    def forward(self, x_seq):
        outs, v = [], torch.full_like(x_seq[0], self.v_reset)
        for x in x_seq:
            v = v + (x - (v - self.v_reset)) * 0.5
            s = fire(v)
            v = torch.where(s > 0, torch.full_like(v, self.v_reset), v)
            outs += [s]
        return torch.stack(outs)


class TwoStates(nn.Module):
    """An adaptive threshold, and a learned gate per channel."""

    def __init__(self, channels=4):
        super().__init__()
        self.gate = nn.Parameter(torch.linspace(-1, 1, channels).view(channels, 1, 1))

    def forward(self, x_seq):
        v, a, outs = torch.zeros_like(x_seq[0]), torch.zeros_like(x_seq[0]), []
        for t in range(x_seq.shape[0]):
            v = v * self.gate.sigmoid() + x_seq[t]
            s = Triangle.apply(v - 0.5 - a, 1.0)
            v, a = v - s * 0.5, 0.9 * a + 0.1 * s
            outs.append(s)
        return torch.stack(outs, dim=0)


class ThreeStates(nn.Module):
    """Current, voltage, refractory trace; leaks that are learned."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.3))
        self.beta = nn.Parameter(torch.tensor(0.8))

    def forward(self, x):
        i = v = r = torch.zeros_like(x[:, 0])
        outs = []
        for t in range(x.shape[1]):
            i = self.alpha * i + x[:, t]
            v = self.beta * v + (1 - self.beta) * i - r
            s = fire(v)
            v = v * (1 - s.detach())
            r = 0.5 * r + s
            outs.append(s)
        return torch.stack(outs, 1)


class OwnMethod(nn.Module):
    """The step is a method of its own, the surrogate a module within."""

    def __init__(self):
        super().__init__()
        self.act = Surrogate(2.0)

    def update(self, v, x):
        v = v * 0.5 + x
        s = self.act(v - 1.0)
        return v - s.detach(), s

    def forward(self, x):
        v, outs = 0.0, []
        for one in x.unbind(0):
            v, s = self.update(v, one)
            outs.append(s)
        return torch.stack(outs)


class Surrogate(nn.Module):
    def __init__(self, alpha):
        super().__init__()
        self.alpha = alpha

    def forward(self, x):
        soft = (self.alpha * x).sigmoid()
        return ((x >= 0).float() - soft).detach() + soft


#: the class, and how its input lies
IDIOMS = {
    "TimeSecond": (TimeSecond, "ntchw"),
    "Writes": (Writes, "tnchw"),
    "FixedWindow": (FixedWindow, "tnchw"),
    "ReadsBack": (ReadsBack, "tnchw"),
    "TimeLast": (TimeLast, "nchwt"),
    "FoldedView": (FoldedView, "(tn)chw"),
    "FoldedSlices": (FoldedSlices, "(tn)chw"),
    "FirstStep": (FirstStep, "tnchw"),
    "TwoStates": (TwoStates, "tnchw"),
    "ThreeStates": (ThreeStates, "ntchw"),
    "OwnMethod": (OwnMethod, "tnchw"),
}


# ---- hostile


class _Hostile(nn.Module):
    """A LIF of ``step(t, x_seq, v)``, where a subclass does something else."""

    def step(self, t, x, v):
        return v * 0.5 + x[t]

    def end(self, outs, x):
        return torch.stack(outs)

    def steps(self, x):
        return range(x.shape[0])

    def forward(self, x):
        v, outs = torch.zeros_like(x[0]), []
        for t in self.steps(x):
            v = self.step(t, x, v)
            s = fire(v)
            v = v * (1 - s)
            outs.append(s)
        return self.end(outs, x)


class StopsEarly(_Hostile):
    def forward(self, x):
        v, out = torch.zeros_like(x[0]), torch.zeros_like(x)
        for t in range(x.shape[0] - 1):
            v = self.step(t, x, v)
            out[t] = fire(v)
        return out


class StopsAtValue(_Hostile):
    def steps(self, x):
        return (t for t in range(x.shape[0]) if t == 0 or x[t].sum() > 0)


class LooksAhead(_Hostile):
    def step(self, t, x, v):
        return v * 0.5 + x[min(t + 1, x.shape[0] - 1)]


class LooksBack(_Hostile):
    def step(self, t, x, v):
        return v * 0.5 + x[t] + x[max(t - 2, 0)]


class Shuffles(_Hostile):
    def end(self, outs, x):
        return torch.stack(outs).flip(0)


class Reverses(_Hostile):
    def steps(self, x):
        return range(x.shape[0] - 1, -1, -1)


class SubtractsMean(_Hostile):
    def step(self, t, x, v):
        return v * 0.5 + x[t] - x.mean(0)


class RunningMean(_Hostile):
    def step(self, t, x, v):
        return v * 0.5 + x[: t + 1].mean(0)


class Drops(_Hostile):
    def step(self, t, x, v):
        return v * 0.5 + torch.nn.functional.dropout(x[t], 0.5, self.training)


class LastDiffers(_Hostile):
    def step(self, t, x, v):
        return v * 0.5 + x[t] * (2 if t == x.shape[0] - 1 else 1)


class LateDiffers(_Hostile):
    """Only from the sixth step on, which no trace of five shows."""

    def step(self, t, x, v):
        return v * 0.5 + x[t] * (2 if t > 4 else 1)


class TimeInFormula(_Hostile):
    def step(self, t, x, v):
        return v * 0.5 + x[t] / (t + 1)


class LengthInFormula(_Hostile):
    def step(self, t, x, v):
        return v * 0.5 + x[t] / x.shape[0]


class SizeDecides(_Hostile):
    def step(self, t, x, v):
        return v * (0.5 if x.shape[1] > 2 else 0.25) + x[t]


class MixesSteps(_Hostile):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.eye(4))

    def forward(self, x):
        x = (self.w @ x.flatten(1)).view_as(x)
        return super().forward(x)


class ParameterAStep(_Hostile):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.linspace(0.5, 1, 5))

    def step(self, t, x, v):
        return v * 0.5 + x[t] * self.p[t % 5]


class KeepsState(_Hostile):
    v = 0.0

    def forward(self, x):
        v, outs = self.v, []
        for t in range(x.shape[0]):
            v = v * 0.5 + x[t]
            outs.append(fire(v))
        self.v = v.detach()
        return torch.stack(outs)


class Collects(_Hostile):
    def __init__(self):
        super().__init__()
        self.voltages = []

    def step(self, t, x, v):
        v = v * 0.5 + x[t]
        self.voltages = [*self.voltages, v.detach()]
        return v


class MixesNeurons(_Hostile):
    def step(self, t, x, v):
        return v * 0.5 + x[t] - v.mean()


class InPlace(_Hostile):
    def step(self, t, x, v):
        v = v * 0.5
        v += x[t]
        return v


class ChangesInput(_Hostile):
    def forward(self, x):
        v, outs = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            v = v * 0.5 + x[t]
            outs.append(fire(v))
        x.detach().mul_(0)
        return torch.stack(outs)


class GivesVoltages(_Hostile):
    """Not hostile but at the end: the sequence of last voltages comes with it."""

    def end(self, outs, x):
        return torch.stack(outs), x


class StartsFromParameter(_Hostile):
    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        v, outs = self.start.expand_as(x[0]), []
        for t in range(x.shape[0]):
            v = v * 0.5 + x[t]
            outs.append(fire(v))
        return torch.stack(outs)


class StartsFromInput(_Hostile):
    def forward(self, x):
        v, outs = x[0], []
        for t in range(x.shape[0]):
            v = v * 0.5 + x[t]
            outs.append(fire(v))
        return torch.stack(outs)


class VeryLateDiffers(_Hostile):
    """Only from the ninth step on, which no check but that of its length shows."""

    def step(self, t, x, v):
        return v * 0.5 + x[t] * (2 if t > 7 else 1)


class LastIsVoltage(_Hostile):
    """Gives spikes, and the last voltage at the last step."""

    def end(self, outs, x):
        return torch.stack([*outs[:-1], outs[-1] * 2])


class DetachesAtThird(_Hostile):
    def step(self, t, x, v):
        return (v.detach() if t == 3 else v) * 0.5 + x[t]


class NoGradient(_Hostile):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


HOSTILE = list(_Hostile.__subclasses__())


def shape_of(lies, steps):
    """The shape of an input that lies so."""
    size = {"n": 2, "c": 4, "h": 3, "w": 5, "t": steps}
    if lies.startswith("(tn)"):
        return (2 * steps, *(size[axis] for axis in lies[4:]))
    return tuple(size[axis] for axis in lies)
