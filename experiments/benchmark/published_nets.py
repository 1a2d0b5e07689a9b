"""Small nets in the idioms in which published spiking nets are written.

Each has its repository's places for norm, reshape, transposition, neuron, pooling, attention and
sum, and none of its code. They take ``[T, N, 3, H, W]``, T a multiple of 2, H and W of 8.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

OPTIONS = {"surrogate_function": surrogate.ATan(), "detach_reset": True, "step_mode": "m"}


def lif(v_threshold: float = 0.5) -> Any:
    return neuron.LIFNode(tau=2.0, v_threshold=v_threshold, **OPTIONS)


def plif(v_threshold: float = 0.5) -> Any:
    return neuron.ParametricLIFNode(init_tau=2.0, v_threshold=v_threshold, **OPTIONS)


class Unit(nn.Module):
    """A layer, a norm and a neuron, which their owner calls one by one."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.neuron = layer, norm, lif()


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> Unit:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return Unit(convolution, nn.BatchNorm2d(outputs))


def unfold(y: Tensor, x: Tensor) -> Tensor:
    """``[T * N, C, ...]`` to ``[T, N, C, ...]``, of the steps and batch of x."""
    return y.reshape(*x.shape[:2], *y.shape[1:]).contiguous()


def folded(unit: Any, x: Tensor) -> Tensor:
    return unit.norm(unit.layer(x.flatten(0, 1)))


def normed(unit: Any, x: Tensor) -> Tensor:
    return unfold(folded(unit, x), x)


def normed_spikes(unit: Any, x: Tensor) -> Tensor:
    """The neuron before the layer and its norm."""
    return normed(unit, unit.neuron(x))


def fired(unit: Any, x: Tensor) -> Tensor:
    return unit.neuron(normed(unit, x))


def heads(x: Tensor) -> Tensor:
    """``[T, B, C, ...]`` to two heads of tokens, ``[T, B, 2, N, C / 2]``."""
    x = x.flatten(3).transpose(-1, -2)
    return x.reshape(*x.shape[:3], 2, -1).permute(0, 1, 3, 2, 4).contiguous()


class Net(nn.Module):
    """A net whose head reads the mean over time and space."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 5)
        self.pool, self.attention, self.last = nn.MaxPool2d(3, 2, 1), lif(0.1), lif()

    def classify(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(3).mean(3).mean(0))


class Spikformer(Net):
    """ZK-Zhou/spikformer: norms of transposed tokens, pools and sums of spikes."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.one, self.two, self.place = conv(3, width), conv(width, width), conv(width, width)
        widths = [*[(width, width)] * 4, (width, 4 * width), (4 * width, width)]
        units = (Unit(nn.Linear(a, b), nn.BatchNorm1d(b)) for a, b in widths)
        self.q, self.k, self.v, self.project, self.up, self.down = units

    def forward(self, x: Tensor) -> Tensor:
        x = unfold(self.pool(fired(self.one, x).flatten(0, 1)), x)
        x = unfold(self.pool(fired(self.two, x).flatten(0, 1)), x)
        x = fired(self.place, x) + x
        x = x.flatten(-2).transpose(-1, -2)  # T, B, N, C
        x = x + self.attend(x)
        x = x + self.tokens(self.down, self.tokens(self.up, x))
        return self.classify(x.transpose(-1, -2))

    def tokens(self, unit: Any, x: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        y = unit.norm(unit.layer(x.flatten(0, 1)).transpose(-1, -2)).transpose(-1, -2)
        return unit.neuron(y.reshape(shape or (*x.shape[:3], -1)).contiguous())

    def attend(self, x: Tensor) -> Tensor:
        T, B, N, C = x.shape
        # Keys and values pass their neurons in another shape, as published.
        shapes = ((T, B, N, C), (T, B, C, N), (T, B, C, N))
        q, k, v = (
            self.tokens(unit, x, s).reshape(T, B, N, 2, -1).permute(0, 1, 3, 2, 4).contiguous()
            for unit, s in zip((self.q, self.k, self.v), shapes, strict=True)
        )
        y = ((q @ k.transpose(-2, -1)) * 0.125) @ v
        y = self.attention(y.transpose(2, 3).reshape(T, B, N, C).contiguous())
        return self.tokens(self.project, y)


class SpikeDriven(Net):
    """BICLab/Spike-Driven-Transformer: sums and pools of norms."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.one, self.two, self.place = conv(3, width), conv(width, width), conv(width, width)
        self.q, self.k, self.v, self.project = (conv(width, width, 1) for _ in range(4))
        self.up, self.down = conv(width, 4 * width, 1), conv(4 * width, width, 1)
        self.shortcut = lif()

    def forward(self, x: Tensor) -> Tensor:
        x = fired(self.one, x)
        y = self.pool(folded(self.two, x))
        x = self.two.neuron(unfold(y, x))
        x = self.attend(unfold(folded(self.place, x) + y, x))
        y = normed_spikes(self.down, normed_spikes(self.up, x))
        return self.classify(self.last(y + x))

    def attend(self, x: Tensor) -> Tensor:
        s = self.shortcut(x)
        q, k, v = (heads(fired(unit, s)) for unit in (self.q, self.k, self.v))
        y = q.mul(self.attention(k.mul(v).sum(dim=-2, keepdim=True)))
        y = y.transpose(3, 4).reshape(x.shape).contiguous()
        return normed(self.project, y) + x


class PaddedNorm(nn.Module):
    """A norm, padded with what it makes of zero by its running statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm: Any = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y, norm = F.pad(self.norm(x), [1] * 4), self.norm
        gain = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        values = (norm.bias.detach() - norm.running_mean * gain).view(1, -1, 1, 1)
        y[:, :, :1, :] = y[:, :, -1:, :] = values
        y[:, :, :, :1] = y[:, :, :, -1:] = values
        return y


def rep_conv(width: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(width, width, 1, bias=False), PaddedNorm(width)),
        nn.Conv2d(width, width, 3, groups=width, bias=False),
        *(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.BatchNorm2d(width)),
    )


class MetaSpikeformer(Net):
    """BICLab/Spike-Driven-Transformer-V2: padded norms, two norms in a row, Conv1d on tokens."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.enter, self.wide = conv(3, width, stride=2), conv(width, 2 * width, 1)
        depthwise = nn.Conv2d(2 * width, 2 * width, 7, padding=3, groups=2 * width)
        pointwise = nn.Conv2d(2 * width, width, 1, bias=False)
        self.narrow = Unit(nn.Sequential(depthwise, pointwise), nn.BatchNorm2d(width))
        self.q, self.k, self.v, self.project = (Unit(rep_conv(width), lif()) for _ in range(4))
        self.up = Unit(nn.Conv1d(width, 4 * width, 1, bias=False), nn.BatchNorm1d(4 * width))
        self.down = Unit(nn.Conv1d(4 * width, width, 1, bias=False), nn.BatchNorm1d(width))

    def forward(self, x: Tensor) -> Tensor:
        x = normed(self.enter, x)
        x = normed_spikes(self.narrow, normed_spikes(self.wide, x)) + x
        x = x + self.attend(x)
        y = normed_spikes(self.down, normed_spikes(self.up, x.flatten(3)))
        return self.classify(self.last(x + y.reshape(x.shape).contiguous()))

    def attend(self, x: Tensor) -> Tensor:
        s = self.enter.neuron(x)
        q, k, v = (unfold(u.layer(s.flatten(0, 1)), s) for u in (self.q, self.k, self.v))
        q, k, v = heads(self.q.neuron(q)), heads(self.k.neuron(k)), heads(self.v.neuron(v))
        y = (q @ (k.transpose(-2, -1) @ v)) * 0.125
        y = self.attention(y.transpose(3, 4).reshape(*x.shape[:3], -1).contiguous())
        return unfold(self.project.layer(y.reshape(x.shape).flatten(0, 1)), x)


def container(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> Any:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False)
    return layer.SeqToANNContainer(convolution, nn.BatchNorm2d(outputs))


class SpikingResformer(Net):
    """xyshi2000/SpikingResformer: clones as shortcuts, halves of a norm, rates in a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.enter, self.project = container(3, width, 3, 2), container(width, width, 1)
        self.lif, self.weights, self.leave = lif(), lif(), lif()
        self.both = container(width, 2 * width, 2, 2)
        self.up = nn.Sequential(lif(), container(width, 2 * width, 1))
        self.middle = nn.Sequential(lif(), container(2 * width, 2 * width))
        self.down = nn.Sequential(lif(), container(2 * width, width, 1))
        self.register_buffer("rate", torch.zeros(1, 1, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(self.enter(x))
        shortcut, x = x.clone(), self.up(x)
        inner = x.clone()
        x = self.middle(x) + inner
        return self.classify(self.down(x) + shortcut)

    def attend(self, x: Tensor) -> Tensor:
        T, B, C, _, _ = x.shape
        shortcut, s = x.clone(), self.lif(x)
        y = self.both(s).reshape(T, B, 2, C, -1)
        first, second = y[:, :, :, : C // 2, :], y[:, :, :, C // 2 :, :]
        s = s.reshape(T, B, 2, C // 2, -1)
        if self.training:
            rate = s.detach().mean((0, 1, 3, 4), keepdim=True)
            self.rate: Tensor = 0.9 * self.rate + 0.1 * rate
        scale = (self.rate * C).clamp(0.01).rsqrt()
        weights = self.weights(torch.matmul(first.transpose(-1, -2), s) * scale)
        y = self.leave((torch.matmul(second, weights) * 0.25).reshape(x.shape))
        return self.project(y) + shortcut


class SpikingUNet(nn.Module):
    """AndyCao1125/SDDPM: an embedding added to a norm, skips concatenated, norms of outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.one, self.same, self.up = conv(3, width), conv(width, width), conv(width, width)
        self.down, self.block = conv(width, width, stride=2), conv(2 * width, width)
        self.deep, self.short = conv(width, width), nn.Conv2d(2 * width, width, 1)
        self.tail, self.out = nn.BatchNorm2d(width), nn.Conv2d(width, 3, 3, padding=1)
        self.over_time, self.end = nn.Conv3d(3, 3, (3, 3, 1), padding=(1, 1, 0)), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        skip = normed(self.same, fired(self.one, x))
        y = normed_spikes(self.down, skip)
        y = F.interpolate(self.up.neuron(y).flatten(0, 1), scale_factor=2, mode="nearest")
        y = unfold(self.up.norm(self.up.layer(y)), x)
        x = torch.cat([y, skip], dim=2)
        times = self.embedding(torch.ones_like(x[0, :, :1, 0, 0]))[:, :, None, None]
        y = torch.add(normed_spikes(self.block, x), times.repeat(1, 1, *x.shape[-2:]))
        y = normed_spikes(self.deep, y) + unfold(self.short(x.flatten(0, 1)), x)
        y = unfold(self.out(F.silu(self.tail(y.flatten(0, 1)))), x)
        z = self.over_time(y.permute(1, 2, 3, 4, 0)).permute(4, 0, 1, 2, 3)
        z = unfold(self.end(z.flatten(0, 1)), x)
        return torch.sum((F.silu(z) + y) * weigh_steps(x), dim=0)


def weigh_steps(x: Tensor) -> Tensor:
    return 0.8 ** torch.arange(len(x) - 1, -1, -1, device=x.device).view(-1, 1, 1, 1, 1)


class SpikingVQVAE(nn.Module):
    """Arktis2022/Spiking-Diffusion: layers in a row, codes repeated over time, a loop over it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(layer.Conv2d(3, width, 3, 2, 1), layer.BatchNorm2d(width), lif()),
            *(layer.Conv2d(width, width, 1), layer.BatchNorm2d(width), lif()),
        )
        self.codes = nn.Embedding(8, width)
        self.spikes = nn.Sequential(layer.Conv2d(width, width, 1), layer.BatchNorm2d(width), lif())
        self.decoder = nn.Sequential(
            *(layer.ConvTranspose2d(width, width, 3, 2, 1, 1), layer.BatchNorm2d(width), lif()),
            layer.ConvTranspose2d(width, 3, 3, 1, 1),
        )
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        flat = z.mean(0).permute(0, 2, 3, 1).contiguous()
        distances = (flat.unsqueeze(-2) - self.codes.weight).square().sum(-1)
        codes = self.codes(distances.argmin(-1))
        quantized = (flat + (codes - flat).detach()).permute(0, 3, 1, 2).contiguous()
        spikes = self.spikes(torch.unsqueeze(quantized, 0).repeat(len(x), 1, 1, 1, 1))
        loss = F.mse_loss(codes, flat.detach()) + F.mse_loss(flat, codes.detach())
        loss = loss + torch.mean((self.trace(spikes) - self.trace(z.detach())) ** 2)
        loss = loss + torch.mean((self.trace(spikes.detach()) - self.trace(z)) ** 2)
        return torch.tanh(torch.sum(self.decoder(spikes) * weigh_steps(x), dim=0)), loss

    def trace(self, x: Tensor) -> Tensor:
        now, steps = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            now = now + (x[t, ...] - now) / 2
            steps.append(now.unsqueeze(0))
        return torch.cat(steps, dim=0)


def norm_first(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        layer.SeqToANNContainer(
            *(nn.ConstantPad2d(kernel // 2, 0.0), nn.BatchNorm2d(inputs)),
            nn.Conv2d(inputs, outputs, kernel, stride, bias=False),
        ),
        plif(0.1),
    )


class SFOD(nn.Module):
    """yimeng-fan/SFOD: norms before convolutions, concatenated features of several sizes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = norm_first(3, width, 3), norm_first(width, width, 3, 2)
        self.sew = nn.Sequential(norm_first(width, width // 2, 3), norm_first(width // 2, width, 3))
        self.dense = nn.ModuleList(norm_first(i * width, width, 3) for i in (1, 2))
        self.lateral, self.neck = norm_first(width, width, 1), norm_first(3 * width, width, 1)
        up = nn.ConvTranspose2d(width, width, 4, 2, 1, bias=False)
        self.up = layer.SeqToANNContainer(nn.BatchNorm2d(width), up)
        self.boxes = nn.Conv2d(2 * width, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.one(x)
        low = self.two(high)
        features = [low * (1.0 - self.sew(low))]
        for dense in self.dense:
            features.append(dense(torch.cat(features, 2)))
        both = (f.permute(1, 0, 2, 3, 4) for f in (high, torch.cat(features, 2)))  # N, T, C, H, W
        high, low = (f.permute(1, 0, 2, 3, 4) for f in both)
        y = torch.cat([self.lateral(high), self.up(self.neck(low))], 2).permute(1, 0, 2, 3, 4)
        return self.boxes(y.sum(dim=1) / y.shape[1])


class Element(nn.Module):
    """Two convolutions with neurons, joined with their input, in place where it can be."""

    def __init__(self, width: int, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Sequential(container(width, width), plif(), container(width, width), plif())
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.conv(x), x)


class SEWResNet(Net):
    """fangwei123456/Spike-Element-Wise-ResNet, DVS Gesture: joined spikes, pools in containers."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        joins = (operator.iadd, lambda out, x: x * (1.0 - out), operator.imul)
        add, iand, both = (Element(width, join) for join in joins)
        pool = layer.SeqToANNContainer(nn.MaxPool2d(2, 2))
        self.conv = nn.Sequential(container(3, width, 1), plif(), add, pool, iand, both, pool)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.conv(x))


KINDS: tuple[Any, ...] = (Spikformer, SpikeDriven, MetaSpikeformer, SpikingResformer)
KINDS += (SpikingUNet, SpikingVQVAE, SFOD, SEWResNet)
NETS: dict[str, Callable[[int], nn.Module]] = {kind.__name__: kind for kind in KINDS}


def build(name: str, width: int = 8) -> nn.Module:
    """A net of that width, with norms of random weights and statistics, so that it fires."""
    torch.manual_seed(0)
    net = NETS[name](width)
    norms: list[Any] = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.uniform_(norm.bias, -0.2, 1.0)
        nn.init.uniform_(norm.running_mean, -0.3, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return net
