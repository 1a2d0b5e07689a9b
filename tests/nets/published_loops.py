"""Published neurons that loop over time by themselves, written from their papers' equations."""

import torch
from torch import nn


class Window(torch.autograd.Function):
    """A spike whose gradient is one over a window around the threshold."""

    @staticmethod
    def forward(ctx, x, width):
        ctx.save_for_backward(x)
        ctx.width = width
        return (x >= 0).float()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < ctx.width / 2).float() / ctx.width, None


class Arctan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0).float()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + (3.14159265 * x) ** 2)


class Counted(torch.autograd.Function):
    """Round to a whole number up to ``most``; the gradient is one between."""

    @staticmethod
    def forward(ctx, x, most):
        ctx.save_for_backward(x)
        ctx.most = most
        return torch.round(torch.clamp(x, 0, most))

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ((x >= 0) & (x <= ctx.most)).float(), None


class Signed(torch.autograd.Function):
    """-1, 0 or 1 by a threshold of 0.5; the gradient is one near it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0.5).float() - (x <= -0.5).float()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ((x.abs() - 0.5).abs() < 0.5).float()


class STBP(nn.Module):
    """Wu et al. 2018; Zheng et al. 2021 (tdBN): a leak of what has not fired."""

    thresh, decay = 0.5, 0.25

    def forward(self, x):
        u = o = torch.zeros_like(x[0])
        outs = torch.zeros_like(x)
        for t in range(x.shape[0]):
            u = self.decay * u * (1 - o) + x[t]
            o = Window.apply(u - self.thresh, 1.0)
            outs[t] = o
        return outs


class TET(nn.Module):
    """Deng et al. 2022: time second, a hard reset."""

    def __init__(self):
        super().__init__()
        self.thresh, self.tau = 1.0, 0.5

    def forward(self, x):
        u, spikes = 0, []
        for t in range(x.shape[1]):
            u = u * self.tau + x[:, t]
            o = Window.apply(u - self.thresh, 2.0)
            u = (1 - o) * u
            spikes.append(o)
        return torch.stack(spikes, 1)


class PLIF(nn.Module):
    """Fang et al. 2021: a learned time constant."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.2))

    def forward(self, x):
        v, spikes = torch.zeros_like(x[0]), []
        for one in x:
            h = v + (one - v) * self.w.sigmoid()
            s = Arctan.apply(h - 0.5)
            v = h * (1 - s)
            spikes.append(s)
        return torch.stack(spikes)


class GLIF(nn.Module):
    """Yao et al. 2022: gates per channel between two leaks, two inputs and two resets."""

    def __init__(self, channels=4):
        super().__init__()
        gates = torch.linspace(-0.5, 0.5, 3 * channels).view(3, 1, channels, 1, 1)
        self.a, self.b, self.c = (nn.Parameter(g.clone()) for g in gates)
        self.tau, self.leak = nn.Parameter(torch.tensor(0.25)), nn.Parameter(torch.tensor(0.05))
        self.conduct = nn.Parameter(torch.tensor(0.6))

    def forward(self, x):
        u = o = torch.zeros_like(x[0])
        spikes = torch.zeros(x.shape, device=x.device)
        for t in range(x.shape[0]):
            a, b, c = self.a.sigmoid(), self.b.sigmoid(), self.c.sigmoid()
            gated = x[t] * (1 - b * (1 - self.conduct))
            decayed = (1 - a * (1 - self.tau)) * u * (1 - c * o.detach()) - (1 - a) * self.leak
            u = decayed - (1 - c) * 0.5 * o + gated
            o = Window.apply(u - 0.5, 1.0)
            spikes[t] = o
        return spikes


class TernarySpike(nn.Module):
    """Guo et al. 2024: spikes of -1, 0 and 1."""

    def forward(self, x):
        u, spikes = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            u = 0.25 * u + x[:, t]
            o = Signed.apply(u)
            u = u * (1 - o.abs())
            spikes.append(o)
        return torch.stack(spikes, dim=1)


class TSLIF(nn.Module):
    """Feng et al. 2025: a dendrite and a soma, which fire together, with learned exchange."""

    def __init__(self):
        super().__init__()
        for name, value in (("a1", 0.6), ("a2", 0.4), ("b1", 0.2), ("b2", 0.3), ("k", 0.5)):
            setattr(self, name, nn.Parameter(torch.tensor(value)))

    def forward(self, x):
        d = s = torch.zeros_like(x[0])
        spikes = []
        for t in range(x.shape[0]):
            dendrite = self.a1 * d + self.b1 * s + x[t]
            soma = self.a2 * s + self.b2 * dendrite
            fired_d, fired_s = Arctan.apply(dendrite - 0.8), Arctan.apply(soma - 0.6)
            d, s = dendrite - 0.8 * fired_d, soma - 0.6 * fired_s
            spikes.append(self.k * fired_d + (1 - self.k) * fired_s)
        return torch.stack(spikes)


class CLIF(nn.Module):
    """Huang et al. 2024: a complementary potential that remembers spikes."""

    def forward(self, x):
        u = m = torch.zeros_like(x[0])
        spikes = []
        for t in range(x.shape[0]):
            u = 0.5 * u + x[t]
            s = Arctan.apply(u - 0.8)
            m = m * torch.sigmoid(0.5 * u) + s
            u = u - s * (0.8 + torch.sigmoid(m))
            spikes.append(s)
        return torch.stack(spikes)


class DIET(nn.Module):
    """Rathi and Roy 2020: a learned leak and threshold, a soft reset of the step before."""

    def __init__(self):
        super().__init__()
        self.leak = nn.Parameter(torch.tensor(0.9))
        self.threshold = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        u, outs = torch.zeros_like(x[0]), []
        o = torch.zeros_like(u)
        for t in range(x.shape[0]):
            u = self.leak * u + x[t] - self.threshold * o
            o = Window.apply(u / self.threshold - 1.0, 2.0)
            outs.append(o)
        return torch.stack(outs)


class LTMD(nn.Module):
    """Wang et al. 2022: a learned threshold, a moderated dropout left out."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        u, outs = 0, []
        for t in range(x.shape[-1]):
            u = 0.25 * u + x[..., t]
            o = Window.apply(u - torch.tanh(self.w), 1.0)
            u = u * (1 - o)
            outs.append(o)
        return torch.stack(outs, dim=-1)


class TCLIF(nn.Module):
    """Zhang et al. 2024: two compartments that feed each other."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor([-0.2, 0.3]).view(2, 1, 1, 1, 1))

    def forward(self, x):
        d = s = torch.zeros_like(x[0])
        spikes = []
        for t in range(x.shape[0]):
            d = d - torch.sigmoid(self.beta[0]) * s + x[t]
            s = s + torch.sigmoid(self.beta[1]) * d
            o = Arctan.apply(s - 1.0)
            d, s = d - 0.5 * o, s - o
            spikes.append(o)
        return torch.stack(spikes)


class LSNN(nn.Module):
    """Bellec et al. 2018: spikes raise the threshold."""

    rho, beta = 0.9, 0.6

    def forward(self, x):
        v = b = z = torch.zeros_like(x[0])
        out = torch.zeros_like(x)
        for t in range(x.shape[0]):
            b = self.rho * b + (1 - self.rho) * z
            v = 0.7 * v + x[t] - z * (0.5 + self.beta * b)
            z = Arctan.apply(v - (0.5 + self.beta * b))
            out[t] = z
        return out


class ILIF(nn.Module):
    """Luo et al. 2024 (SpikeYOLO): counts to four in training."""

    def forward(self, x):
        mem, spike = torch.zeros_like(x[0]), torch.zeros_like(x[0])
        out, old = torch.zeros_like(x), 0
        for i in range(x.shape[0]):
            mem = (old - spike.detach()) * 0.25 + x[i] if i >= 1 else x[i]
            spike = Counted.apply(mem, 4)
            old = mem.clone()
            out[i] = spike
        return out


PUBLISHED = {
    **dict.fromkeys((STBP, PLIF, GLIF, TSLIF, CLIF, DIET, TCLIF, LSNN, ILIF), "tnchw"),
    **dict.fromkeys((TET, TernarySpike), "ntchw"),
    LTMD: "nchwt",
}
