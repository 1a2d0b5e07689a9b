"""Random nets, in the many idioms in which spiking nets are written.

A net is drawn by its seed: norms of every setting, in every layout, read by a neuron through every
shape, or by something else before or instead; joins, attention, pools, loops, checkpoints.
"""

import numpy as np
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.utils.checkpoint import checkpoint

import sj_taid
from sj_taid._internal.compat import FUNCTIONAL_STATES
from sj_taid.ops.surrogate import MultiLevelSpikeCount

T, N, C, H, W = SHAPE = (5, 2, 6, 4, 3)
L = H * W


def home(y):
    return y.reshape(SHAPE)


def tokens_home(y):
    return y.reshape(T, N, L, C).transpose(2, 3).reshape(SHAPE)


def same(y):
    return y


#: by layout of a norm's output, ways to a neuron, and from there to ``SHAPE``
WAYS = {
    "folded": {
        "view": (lambda y: y.view(T, N, *y.shape[1:]), same),
        "unflatten": (lambda y: y.unflatten(0, (T, N)), same),
        "channels last": (lambda y: y.permute(0, 2, 3, 1).reshape(T, N, L, C), tokens_home),
        "merged": (lambda y: y.reshape(T, N * C, H, W), home),
        "scrambled": (lambda y: y.permute(0, 2, 3, 1).reshape(SHAPE), same),
        "windows": (
            lambda y: y.view(T, N, C, 2, 2, W).permute(0, 1, 3, 2, 4, 5).reshape(T, 2 * N, C, 2, W),
            lambda s: s.reshape(T, N, 2, C, 2, W).transpose(2, 3).reshape(SHAPE),
        ),
        "batch outermost": (lambda y: home(y).transpose(0, 1).contiguous().transpose(0, 1), same),
        "batch for time": (lambda y: y.view(N, T, C, H, W).transpose(0, 1), same),
        "squeezed": (lambda y: home(y.unsqueeze(0)).unsqueeze(-1).squeeze(-1), same),
        "stacked": (lambda y: torch.stack(y.chunk(T)), same),
        "backwards": (lambda y: home(y).flip(0), same),
        "first axes swapped": (lambda y: home(y).transpose(0, 3), lambda s: s.transpose(0, 3)),
    },
    "tokens": {
        "to images": (home, same),
        "kept": (lambda y: y.reshape(T, N, C, L).contiguous(), home),
        "transposed": (lambda y: y.transpose(1, 2).reshape(T, N, L, C).contiguous(), tokens_home),
        "scrambled": (lambda y: y.transpose(-1, -2).reshape(T, N, C, L), home),
        "heads": (lambda y: y.reshape(T, N, 2, C // 2, L), home),
    },
    "last": {
        "tokens": (lambda y: y.view(T, N, L, C), tokens_home),
        "images": (lambda y: y.reshape(T, N, H, W, C).permute(0, 1, 4, 2, 3).contiguous(), same),
        "merged": (lambda y: y.view(T, N * L, C), tokens_home),
    },
    "sequence": {
        "as it is": (same, same),
        "flat": (lambda y: y.flatten(3), lambda s: s.unflatten(3, (H, W))),
    },
}


class TdBN(nn.BatchNorm2d):
    def __init__(self, channels, **options):
        super().__init__(channels, **options)


def tdbn(channels, affine=True, **options):
    return layer.ThresholdDependentBatchNorm2d(0.7, 1.0, channels, **options)


def conv2d():
    return nn.Conv2d(C, C, 3, padding=1, bias=False)


def in_tokens(step, x):
    return step.norm(step.layer(x.flatten(0, 1).flatten(2)))


def in_transposed_tokens(step, x):
    return step.norm(step.layer(x.flatten(0, 1).flatten(2).transpose(1, 2)).transpose(1, 2))


def in_rows(step, x):
    return step.norm(step.layer(x.flatten(3).transpose(2, 3).reshape(-1, C)))


def folded(step, x):
    return step.norm(step.layer(x.flatten(0, 1)))


#: the layer, the norm, how they are called and the layout of what comes out
FORMS = {
    "conv": (conv2d, nn.BatchNorm2d, folded, "folded"),
    "own tdbn": (conv2d, TdBN, folded, "folded"),
    "bare": (nn.Identity, nn.BatchNorm2d, folded, "folded"),
    "conv1d": (lambda: nn.Conv1d(C, C, 1, bias=False), nn.BatchNorm1d, in_tokens, "tokens"),
    "linear": (lambda: nn.Linear(C, C), nn.BatchNorm1d, in_transposed_tokens, "tokens"),
    "rows": (lambda: nn.Linear(C, C), nn.BatchNorm1d, in_rows, "last"),
    "layers": (
        *(lambda: layer.Conv2d(C, C, 3, padding=1, step_mode="m"), layer.BatchNorm2d),
        *(lambda step, x: step.norm(step.layer(x)), "sequence"),
    ),
    "tdbn": (nn.Identity, tdbn, lambda step, x: step.norm(step.layer(x)), "sequence"),
    "container": (
        *(conv2d, nn.BatchNorm2d),
        *(lambda step, x: functional.seq_to_ann_forward(x, [step.layer, step.norm]), "sequence"),
    ),
}
SETTINGS = {
    "train": {},
    "frozen": {},
    "no statistics": {"track_running_stats": False},
    "no affine": {"affine": False},
    "average": {"momentum": None},
}


class Scale(torch.autograd.Function):
    """A function of one's own, which asks nothing of its argument."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, grad):
        s = ctx.saved_tensors[0].sigmoid()
        return grad * (s + ctx.saved_tensors[0] * s * (1 - s))


def look(get):
    """A reader that only looks."""

    def touch(step, y):
        with torch.no_grad():
            step.seen.append(get(y))
        return y

    return touch


def change(do):
    """A reader that changes its argument in place."""

    def touch(step, y):
        do(y)
        return y

    return touch


def retain(step, y):
    y.retain_grad()
    step.seen.append(lambda: y.grad)
    return y


def read_twice(step, y):
    step.more.append(y.square().mean())
    return y


#: what may happen to a norm's output or to spikes before the next reader
TOUCHES = {
    "tensor hook": change(lambda y: y.requires_grad and y.register_hook(lambda g: 1.5 * g)),
    "retain": lambda step, y: retain(step, y) if y.requires_grad else y,
    "twice": read_twice,
    "peek": look(lambda y: y.double().mean(0)),
    "numpy": look(lambda y: torch.from_numpy(y.detach().numpy().copy())),
    "tensor": look(lambda y: y.new_tensor(y.sum().item())),
    "stop": lambda step, y: y.detach(),
    "scale in place": change(lambda y: y.mul_(1.2)),
    "add in place on a view": change(lambda y: y[:, :1].add_(0.5)),
    "assign": change(lambda y: y.select(1, 0).fill_(0.3)),
    "flat view in place": lambda step, y: y.reshape(-1).mul_(0.9).view(y.shape),
    "view": lambda step, y: y.view(len(y), -1).view(y.shape),
    "summand in place": lambda step, y: torch.ones_like(y).add_(y).square(),
    "cast": lambda step, y: y.to(torch.float64).to(y.dtype),
    "iterate": lambda step, y: torch.stack([*y]),
    "function": lambda step, y: Scale.apply(y),
    "clone": lambda step, y: y.clone(),
    "slices": lambda step, y: torch.cat([y[:1], y[1:]]),
    "split": lambda step, y: torch.cat(y.split([1, y.shape[1] - 1], 1)[::-1], 1),
    "unbind": lambda step, y: torch.stack(y.unbind(1), 1),
    "gate": lambda step, y: y * y.sigmoid(),
    "expand": lambda step, y: y.unsqueeze(0).expand(2, *y.shape).mean(0),
}


def indexed(get):
    """A reader of values by an index: in place of them if they have the same shape."""

    def touch(step, y):
        z = y[get(y)]
        if z.shape == y.shape:
            return z
        step.more.append(z.square().mean())
        return y

    return touch


TOUCHES |= {
    "permuted by a tensor": indexed(lambda y: torch.arange(len(y)).roll(1)),
    "columns by a tensor": indexed(lambda y: (..., torch.arange(y.shape[-1]).flip(0))),
    "a mask": indexed(lambda y: torch.arange(y.numel()).view(y.shape) % 3 > 0),
    "mixup": lambda step, y: 0.7 * y + 0.3 * y[torch.arange(len(y)).roll(1)],
}


def touched(step, name, y):
    return y if name is None else TOUCHES[name](step, y)


def attend(q, k, v):
    """Attention of channels in two heads."""
    q, k, v = (x.flatten(3).transpose(-1, -2).reshape(T, N, L, 2, C // 2) for x in (q, k, v))
    q, k, v = (x.permute(0, 1, 3, 2, 4) for x in (q, k, v))
    return tokens_home(((q @ k.transpose(-2, -1)) @ v * 0.1).transpose(2, 3))


def attend_by_einsum(q, k, v):
    weights = torch.einsum("tnchw,tndhw->tncd", q, k)
    return torch.einsum("tncd,tndhw->tnchw", weights, v) * 0.1


def in_place(operation):
    def join(x, y):
        out = x.clone()
        getattr(out, operation)(y)
        return out

    return join


def fold_over(function):
    return lambda x: function(x.flatten(0, 1)).reshape(SHAPE)


JOINS = {
    "add": lambda x, y: x + y,
    "add in place": in_place("add_"),
    "product": lambda x, y: x * y,
    "iand": lambda x, y: x * (1.0 - y),
    "halves": lambda x, y: torch.cat([x[:, :, : C // 2], y[:, :, C // 2 :]], 2),
    "stack": lambda x, y: torch.stack([x, 2 * y]).sum(0),
    "attention": attend,
    "einsum": attend_by_einsum,
    "max pool": fold_over(nn.MaxPool2d(3, 1, 1)),
    "mean": lambda x: x - x.mean((3, 4), keepdim=True),
    "over time": lambda x: torch.cat([x[:1], 0.5 * x[1:] + 0.5 * x[:-1]]),
}
ARITY = {"attention": 3, "einsum": 3} | dict.fromkeys([*JOINS][:6], 2)


class Join(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, *values):
        return JOINS[self.name](*values)

    def extra_repr(self):
        return self.name


class Step(nn.Module):
    """A norm, a neuron or both, with what reads in between."""

    def __init__(self, rng):
        super().__init__()
        self.form = pick(rng, FORMS)
        make, norm, _, self.layout = FORMS[self.form]
        self.setting = pick(rng, SETTINGS, [6, 2, 1, 1, 1])
        self.layer, self.norm = make(), norm(C, **SETTINGS[self.setting])
        if hasattr(self.norm, "step_mode"):
            self.norm.step_mode = "m"
        self.norm.train(self.setting != "frozen")
        self.way = pick(rng, WAYS[self.layout])
        self.before = pick(rng, TOUCHES) if rng.random() < 0.35 else None
        self.after = pick(rng, TOUCHES) if rng.random() < 0.25 else None
        self.neuron = draw_neuron(rng) if rng.random() < 0.75 else None
        self.has_norm = self.neuron is None or rng.random() < 0.85
        self.seen, self.more = [], []

    def forward(self, x):
        to, back = WAYS[self.layout][self.way]
        if not self.has_norm:
            return touched(self, self.after, self.neuron(x))
        y = to(touched(self, self.before, FORMS[self.form][2](self, x)))
        if self.neuron is not None:
            y = touched(self, self.after, self.neuron(y))
        return back(y)

    def extra_repr(self):
        return f"{self.form}, {self.setting}, {self.before}, {self.way}, {self.after}"


class Twice(nn.Module):
    """A step whose output it reads again."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, x):
        return self.step(self.step(x))


class Checkpointed(nn.Module):
    """A step that is computed again in backward, from rest each time."""

    def __init__(self, step, reentrant):
        super().__init__()
        self.step, self.reentrant = step, reentrant

    def run(self, x):
        functional.reset_net(self.step)
        return self.step(x)

    def forward(self, x):
        return checkpoint(self.run, x, use_reentrant=self.reentrant)


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.steps, self.reads = nn.ModuleList(), []
        for i in range(rng.integers(2, 7)):
            if i and rng.random() < 0.4:
                step = Join(pick(rng, JOINS))
            elif i > 1 and rng.random() < 0.1:
                step = self.steps[rng.integers(i)]  # shared
            else:
                step = draw_step(rng)
            arity = ARITY.get(step.name, 1) if isinstance(step, Join) else 1
            self.steps.append(step)
            self.reads.append([int(i - rng.integers(0, min(i, 2) + 1)) for _ in range(arity)])
        for norm in self.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                for name, (low, high) in RANGES.items():
                    if (tensor := getattr(norm, name)) is not None:
                        nn.init.uniform_(tensor, low, high)
        self.seen, self.fails = [], False

    def forward(self, x):
        values = [x]
        drawn = [step for step in self.modules() if isinstance(step, Step)]
        for step in drawn:
            step.seen, step.more = self.seen, []
        for i, (step, reads) in enumerate(zip(self.steps, self.reads, strict=True)):
            if self.fails and i == len(self.steps) - 1:
                raise KeyError("in the middle")
            values.append(step(*(values[read] for read in reads)))
        more = [term for step in drawn for term in step.more]
        for step in drawn:
            step.more = []
        return values[-1], torch.stack([v.mean(0) for v in values]).sum(0), *more


RANGES = {"weight": (0.5, 2.0), "bias": (-0.2, 0.8)}
RANGES |= {"running_mean": (-0.3, 0.3), "running_var": (0.5, 1.5)}


def pick(rng, names, odds=None):
    odds = None if odds is None else np.array(odds) / sum(odds)
    return str(rng.choice([*names], p=odds))


def draw_step(rng):
    step, kind = Step(rng), rng.random()
    if kind < 0.1:
        return Twice(step)
    if kind < 0.2:
        step.before = step.after = None
        return Checkpointed(step, reentrant=bool(rng.random() < 0.5))
    return step


def draw_integer_neuron(rng):
    # No voltage comes near the window's bounds, where rounding would change a gradient.
    fires = MultiLevelSpikeCount(int(rng.integers(1, 6)), grad_window=(-90.0, 90.0))
    options = {"surrogate_function": fires, "v_threshold": 0.5, "step_mode": "m"}
    options["detach_reset"] = bool(rng.random() < 0.5)
    if FUNCTIONAL_STATES and rng.random() < 0.7:
        return neuron.ILIFNode(tau=float(rng.choice([4 / 3, 1.7, 2.0])), **options)
    return sj_taid.ALIFNode(v_reset=None, decay_input=bool(rng.random() < 0.5), **options)


def draw_neuron(rng):
    if rng.random() < 0.2:
        return draw_integer_neuron(rng)
    options = {"surrogate_function": surrogate.ATan(), "v_threshold": 0.5, "step_mode": "m"}
    options |= {"v_reset": None if rng.random() < 0.3 else 0.0, "detach_reset": rng.random() < 0.5}
    kinds = (neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode, sj_taid.ALIFNode)
    return kinds[rng.integers(4)](**options)
