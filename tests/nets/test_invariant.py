"""Whatever a function does, a recipe makes its tensor's values and a place points at them."""

import copy
import io
import itertools
import pickle
from contextlib import suppress
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import sj_taid
from sj_taid.kept.kept import HANDLERS, leave
from sj_taid.ops.surrogate import MultiLevelSpikeCount
from tests.nets import own_neurons
from tests.nets.alike import accelerated
from tests.nets.invariant import asked_after_each_function

OPTIONS = {"step_mode": "m", "v_threshold": 0.5}
#: kinds of kept tensors [4, 3, 6, 6] of a norm's output ``y`` and an input ``h``
KINDS = {
    "spikes": lambda net, y, h: net.lif(h),
    "counts": lambda net, y, h: net.counts(3 * h),
    "a norm's output": lambda net, y, h: y,
    "a sum": lambda net, y, h: y + h,
}
ORDERS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


class Net(nn.Module):
    """A tensor of one kind and order, from ``x``."""

    def __init__(self, kind, order="contiguous"):
        super().__init__()
        self.norm, self.kind, self.order = nn.BatchNorm2d(3), kind, order
        self.lif = neuron.LIFNode(surrogate_function=surrogate.ATan(), **OPTIONS)
        fires = MultiLevelSpikeCount(4, grad_window=(-90.0, 90.0))
        self.counts = sj_taid.ALIFNode(surrogate_function=fires, v_reset=None, **OPTIONS)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        nn.init.uniform_(self.norm.bias, -0.2, 0.8)

    def forward(self, x):
        self.lif.reset()
        self.counts.reset()
        h = 1.5 * x.contiguous(memory_format=ORDERS[self.order])
        return KINDS[self.kind](self, self.norm(h), h)


def draw_x():
    return 2 * torch.rand(4, 3, 6, 6)


# ---- every function ----

BACK = torch.tensor([3, 1, 0, 2])
WEIGHT, MATRIX = torch.linspace(-1, 1, 54).view(2, 3, 3, 3), torch.linspace(-1, 1, 36).view(6, 6)
#: indices of all kinds
INDICES = [
    BACK,
    BACK.tolist(),
    BACK.numpy(),
    torch.tensor([1, 1, 0, 2]),
    torch.tensor(2),
    torch.ones(4, dtype=torch.bool),
    torch.arange(432).view(4, 3, 6, 6) % 5 > 1,
    (None, BACK),
    (slice(1, None), torch.tensor([2, 0, 1])),
    (..., torch.arange(6).flip(0)),
    (..., *torch.meshgrid(*[torch.arange(6)] * 2, indexing="xy")),  # in another memory order
    slice(None, None, 2),
    (slice(0, 3), None, 1, ..., [0, 2]),
]


def rows(s):
    """``s`` as a matrix."""
    return s.flatten(1)


def batch(s):
    """``s`` as three matrices."""
    return s.flatten(2).transpose(0, 1)


def squares(s):
    """``s`` as matrices that may be multiplied by each other."""
    return s.flatten(0, 1)


def pools(axes):
    """The names of all pools of so many axes."""
    return " ".join(name for name in vars(F) if f"pool{axes}d" in name)


#: arguments of an optimizer's fused step
SGD = {"lr": 0.3, "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False}
SGD |= {"maximize": False, "is_first_step": True}
#: calls ``f(s, ...)`` of functions that take more than ``s``, by their names
CALLS = {
    "T mT H mH t adjoint": [lambda f, s: f(rows(s))],
    "size stride": [lambda f, s: f(s), lambda f, s: f(s, 1)],
    "type": [lambda f, s: f(s), lambda f, s: f(s, s.dtype), lambda f, s: f(s, torch.float64)],
    "is_set_to is_same_size view_as reshape_as": [
        lambda f, s: f(s, s),
        lambda f, s: f(s, torch.empty(4, 3, 36)),
        lambda f, s: f(torch.ones(4, 108), s),
    ],
    "requires_grad.__set__": [lambda f, s: f(s.detach(), True)],
    "grad.__set__": [lambda f, s: f(s, torch.ones_like(s)), lambda f, s: f(s.detach(), s.detach())],
    "data.__set__": [lambda f, s: f(s, torch.ones_like(s)), lambda f, s: f(s.detach(), s.detach())],
    "clone contiguous": [
        lambda f, s: f(s),
        lambda f, s: f(s.mT),
        lambda f, s: f(s[1:]),
        lambda f, s: f(s + s + s + s),
        lambda f, s: f(s, memory_format=torch.channels_last),
        lambda f, s: f(s, memory_format=torch.contiguous_format),
    ],
    "float half bfloat16": [lambda f, s: f(s), lambda f, s: f(s.mT), lambda f, s: f(s.double())],
    "to": [
        lambda f, s: f(s, torch.float32),
        lambda f, s: f(s, torch.float64),
        lambda f, s: f(s, torch.bfloat16),
        lambda f, s: f(s, torch.int64),
        lambda f, s: f(s + s + s, torch.float8_e8m0fnu),
        lambda f, s: f(s + s + s + s, torch.float64),  # more than 15
        lambda f, s: f(s, "cpu", copy=True),
        lambda f, s: f(s.mT, torch.float32, copy=True),
        lambda f, s: f(s, torch.float64, memory_format=torch.channels_last),
        lambda f, s: f(s, memory_format=torch.channels_last),
        lambda f, s: f(s, memory_format=torch.contiguous_format),
    ],
    "view reshape": [
        lambda f, s: f(s, (4, 3, 36)),
        lambda f, s: [f(s, (steps, 3, -1, 6)) for steps in map(torch.tensor(0).fill_, (4, 2))],
        lambda f, s: f(s.mT, (4, 3, 6, 6)),
        lambda f, s: f(s.mT[:, :1], (2, 2, 6, 6)),
        lambda f, s: f(s.transpose(0, 1), (3, 4, 6, 6)),
    ],
    "view": [lambda f, s: f(s, torch.int32), lambda f, s: f(s, torch.float16)],
    "flatten": [
        lambda f, s: f(s),
        lambda f, s: f(s.mT, 2),
        lambda f, s: f(s.transpose(0, 1), 0, 1),
    ],
    "unflatten": [lambda f, s: f(s, 0, (2, 2)), lambda f, s: f(s.mT, 2, (3, 2))],
    "transpose swapaxes swapdims movedim moveaxis": [
        lambda f, s: f(s, 2, 3),
        lambda f, s: f(s, 0, 1),
        lambda f, s: f(s[:, :, :1], 2, 3),
    ],
    "permute": [lambda f, s: f(s, (0, 1, 3, 2)), lambda f, s: f(s, (3, 0, 1, 2))],
    "squeeze": [lambda f, s: f(s[:1]), lambda f, s: f(s, 0)],
    "unsqueeze": [lambda f, s: f(s, 0)],
    "narrow": [lambda f, s: f(s, 0, 1, 2), lambda f, s: f(s, 1, torch.tensor(1), 2)],
    "select": [lambda f, s: f(s, 0, 1), lambda f, s: f(s[:, :1], 1, 0)],
    "chunk": [lambda f, s: f(s, 2, 1), lambda f, s: f(s, 1)],
    "split": [lambda f, s: f(s, 2), lambda f, s: f(s, [1, 2], 1), lambda f, s: f(s, 4)],
    "tensor_split": [
        lambda f, s: f(s, 3),
        lambda f, s: f(s, (0, 4)),
    ],
    "unbind": [lambda f, s: f(s), lambda f, s: f(s, 1), lambda f, s: f(s[:1])],
    "__getitem__": [lambda f, s, i=i: [z := f(s, i), z + z, z + f(2 * s, i)] for i in INDICES],
    "share_memory_": [lambda f, s: f(s.clone().detach())],
    "numpy __array__": [lambda f, s: f(s.detach()).fill(0.3)],
    "untyped_storage": [lambda f, s: f(s).fill_(62)],
    "__dlpack__": [lambda f, s: torch.from_dlpack(s.detach()).fill_(0.3)],
    "apply_": [lambda f, s: f(s.detach(), lambda value: 0.3)],
    "map_": [lambda f, s: f(s.detach(), s.detach(), lambda a, b: 0.3)],
    "map2_": [lambda f, s: f(s.detach(), s.detach(), s.detach(), lambda a, b, c: 0.3)],
    "_fused_sgd_": [lambda f, s: f([s.detach()], [torch.ones_like(s)], [], **SGD)],
    "__format__": [lambda f, s: f(s[0, 0, 0, 0], ".1f")],
    "__reduce_ex__": [lambda f, s: copy.copy(s.detach()), lambda f, s: pickle.dumps(s.detach())],
    "__deepcopy__": [lambda f, s: f(s.detach(), {})],
    "register_hook": [lambda f, s: f(s, lambda grad: grad)],
    "torch.autograd.grad": [lambda f, s: f(s.square().sum(), s)],
    "backward": [lambda f, s: f(s, torch.ones_like(s)), lambda f, s: f(s.sum(), inputs=[s])],
    "cat concat stack": [lambda f, s: f([s, s]), lambda f, s: f([s, 2 * s, s.detach()], dim=1)],
    "__rsub__": [lambda f, s: f(s, 1), lambda f, s: f(s, 2)],
    "mul multiply __mul__ __rmul__ div divide __truediv__": [
        lambda f, s: f(s, 0.3),
        lambda f, s: f(s.mT, 2),
        lambda f, s: f(s, s),
        lambda f, s: f(s[1:], 0.3),
        lambda f, s: f(s, s[:1]),
        lambda f, s: f(s, 1 + 0j),
    ],
    "mul_ __imul__ div_ __itruediv__ __idiv__ add_ __iadd__": [
        lambda f, s: f(s, 3),
        lambda f, s: f(s.mT, 0.3),
        lambda f, s: f(s[1:], 0.3),
        lambda f, s: f(s, s.detach()),
        lambda f, s: f(s[:1], s[1:2]),
        lambda f, s: f(torch.ones(4, 3, 6, 6), s),
    ],
    "add __add__ __radd__": [
        lambda f, s: f(s, 1),
        lambda f, s: f(s, s),
        lambda f, s: f(s, s.mT),
        lambda f, s: f(s[1:], s[:-1]),
        lambda f, s: f(s, (s * 1.5).sin()),
        lambda f, s: f(s, s[:1]),
        lambda f, s: f(s.mT, s.detach().mT),
    ],
    "add": [lambda f, s: f(s, s, alpha=2)],
    pools(1): [lambda f, s: f(s.flatten(2), 3)],
    pools(2): [lambda f, s: f(s, 2), lambda f, s: f(s, 6)],
    pools(3): [lambda f, s: f(s.unsqueeze(1), 2)],
    "max_pool2d avg_pool2d": [lambda f, s: f(s, 3, 1, 1)],
    "max_pool2d": [
        lambda f, s: f(s, 2, dilation=2, padding=1),
        lambda f, s: f(s, 6, return_indices=True),
    ],
    "addmm": [lambda f, s: f(rows(s), rows(s)[:, :4], rows(s))],
    "baddbmm": [lambda f, s: f(batch(s), batch(s)[..., :4], batch(s))],
    "conv1d": [lambda f, s: f(s.flatten(2), WEIGHT.flatten(2))],
    "conv2d": [lambda f, s: f(s, WEIGHT), lambda f, s: f(s[1:], s[:1])],
    "conv3d": [lambda f, s: f(s.unsqueeze(2), WEIGHT.unsqueeze(2))],
    "conv_transpose1d": [lambda f, s: f(s.flatten(2), WEIGHT.flatten(2).transpose(0, 1))],
    "conv_transpose2d": [lambda f, s: f(s, WEIGHT.transpose(0, 1))],
    "conv_transpose3d": [lambda f, s: f(s.unsqueeze(2), WEIGHT.transpose(0, 1).unsqueeze(2))],
    "matmul __matmul__": [
        lambda f, s: f(s, s.mT),
        lambda f, s: f(s, MATRIX),
        lambda f, s: f(s, s[0]),
    ],
    "bmm": [lambda f, s: f(squares(s), squares(s))],
    "mm": [lambda f, s: f(rows(s), rows(s).T)],
    "linear": [lambda f, s: f(s, MATRIX), lambda f, s: f(s.mT, MATRIX, MATRIX[0])],
}

#: what no handler knows: an operation, whatever it shows
OTHERS = {
    "flip": lambda s: s.flip(0),
    "sort": lambda s: s.sort(0),
    "clamp": lambda s: s.clamp(max=1),
    "expand": lambda s: s[:1].expand(4, 3, 6, 6),
    "unfold": lambda s: s.unfold(3, 2, 2),
    "diagonal": lambda s: s.diagonal(0, 2, 3),
    "as_strided": lambda s: s.as_strided((4, 3, 6, 6), (1, 4, 12, 72)),
    "einsum of a view": lambda s: torch.einsum("nchw->whcn", s),
    "einsum of a product": lambda s: torch.einsum("nchw,ndhw->ncd", s, s),
    "einsum of a gate": lambda s: torch.einsum("nchw,c->nchw", s, WEIGHT[0, :, 0, 0]),
    "dropout in place": lambda s: F.dropout(s, 0.5, inplace=True),
    "unsafe_chunk": lambda s: s.unsafe_chunk(2),
    "hsplit": lambda s: s.hsplit(3),
    "empty_like and copy_": lambda s: torch.empty_like(s).copy_(s),
    "a view by name": lambda s: torch.transpose(input=s, dim0=2, dim1=3).detach().numpy().fill(0.3),
    "a copy by name": lambda s: torch.clone(input=s),
    "out": lambda s: torch.neg(s[0].detach(), out=s.detach()[1]),
    "whole numbers": lambda s: s.detach().view(torch.int32).fill_(1050253722),
    "other signs": lambda s: torch._neg_view(s),
    "complex": lambda s: torch.view_as_complex(s.contiguous().unflatten(-1, (-1, 2))),
    "transpose_": lambda s: s.transpose_(2, 3),
    "resize_": lambda s: s.detach().resize_(3, 4, 6, 6),
    "set_": lambda s: s.detach().set_(torch.ones(4, 3, 6, 6)),
    "detach_": lambda s: s.detach_(),
    "__setitem__": lambda s: s.__setitem__(0, s[1]),
    "copy_": lambda s: s.copy_(s.flip(0)),
    "foreach in place": lambda s: torch._foreach_add_([s.detach()], 0.3),
    "a parameter": lambda s: nn.Parameter(s.detach()).data.fill_(0.3),
    "save": lambda s: torch.save(s.detach(), io.BytesIO()),
}

#: what has no value of a tensor in ordinary memory
RAISES = {"grad_dtype.__get__", "imag.__get__", "__cuda_array_interface__.__get__"}
RAISES |= {"_has_grad_dtype_override.__get__"}  # torch 2.15's, for leaves alone
POOLS = {value: name for name, value in vars(F).items() if "pool" in name and callable(value)}


def name_of(function):
    """What a function that has a handler is called."""
    if function is torch.autograd.grad:
        return "torch.autograd.grad"
    if function.__name__ in ("__get__", "__set__"):
        owner = getattr(function.__self__, "__name__", "__cuda_array_interface__")
        return f"{owner}.{function.__name__}"
    return POOLS.get(function, function.__name__)


def is_number(t):
    return isinstance(t, Tensor) and t.is_floating_point() and t.itemsize > 1


def calls_of(function):
    """The calls of a function that has a handler: one that takes a tensor alone needs no row."""
    name = name_of(function)
    names = name, name.removesuffix(".__get__")
    found = [call for key in CALLS if {*names} & {*key.split()} for call in CALLS[key]]
    return [partial(call, function) for call in found] or [function]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of attributes that nobody should ask for
@pytest.mark.parametrize(
    ("kind", "order"),
    [
        *(("spikes", "channels last"), ("counts", "contiguous")),
        *itertools.product(("a norm's output", "a sum"), ORDERS),
    ],
)
def test_every_function(kind, order):
    # Optimizers' other steps take long lists of arguments, and have the handler of SGD's.
    known = [f for f in HANDLERS if not name_of(f).startswith(("_fused_a", "_amp_"))]
    calls = [(name_of(function), call) for function in known for call in calls_of(function)]
    calls += OTHERS.items()
    net, ran, wrong = accelerated(Net(kind, order)), set(), []
    x = draw_x().requires_grad_()
    for name, call in calls:
        s = net(x)
        assert s.recipe() is not None
        also_there = s.detach(), s.mT, s[1:]
        try:
            with asked_after_each_function():
                result = call(s)
                ran.add(name)
                with suppress(RuntimeError), torch.no_grad():  # as of an expanded tensor
                    torch._foreach_mul_([t for t in tree_leaves(result) if is_number(t)], 0.5)
                assert [*map(torch.sum, also_there)]
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
        except Exception as error:
            with pytest.raises(type(error)):  # as of a plain tensor
                call(leave(net(x)).clone())
    assert not wrong, "\n".join(wrong)
    missing = {name for name, _ in calls} - ran - RAISES
    assert not missing, f"no call of {', '.join(sorted(missing))} succeeds: add one to CALLS"


#: functions of which autocast computes some in half precision
CAST = {name: [call] for name, call in OTHERS.items() if "einsum" in name}
CAST |= {
    name_of(function): calls_of(function)
    for function in HANDLERS
    if name_of(function).startswith(("conv", "linear", "addmm", "baddbmm", "matmul", "bmm", "mm"))
}


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_casts_what_it_casts_of_plain_tensors(kind):
    s = accelerated(Net(kind))(draw_x().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        for call in (call for calls in CAST.values() for call in calls):
            torch.testing.assert_close(call(s) + 0, call(leave(s)), rtol=0, atol=0)


# ---- counts of what is no number ----


class Rounded(own_neurons.Own):
    """Its output is a count up to ``most``, or NaN."""

    most = 1

    def step(self, x, v):
        v = v * 0.5 + x
        count = Round.apply(v.clamp(0, self.most))
        return count, v - count


class Round(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.round())
    backward = staticmethod(lambda ctx, grad: grad)


@pytest.mark.parametrize("most", [1, 4, 14])
@pytest.mark.parametrize("kind", ["ALIF", "own"])
def test_counts_are_made_again_with_nan(kind, most):
    if kind == "own":
        node = type("Own", (Rounded,), {"most": most})()
    else:
        fires = MultiLevelSpikeCount(most)
        node = sj_taid.ALIFNode(surrogate_function=fires, v_reset=None, **OPTIONS)
    x = most * draw_x()
    x.view(-1)[::7] = torch.nan
    with asked_after_each_function():
        s = accelerated(node)(x.requires_grad_())
        assert s.isnan().any() and s.recipe() is not None
        for call in (torch.stack, torch.cat):
            call([s, s])
        made = [s + s, s * s, 2.0 * s, 1 - s, s.half(), F.max_pool2d(s.flatten(0, 1), 2)]
        assert [*map(torch.sum, made)]
