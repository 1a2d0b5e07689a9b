"""What is compiled of a step computes what the step computes, or the step is not read."""

import copy
import math
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn
from torch.utils import _python_dispatch

pytest.importorskip("numba", reason="needs numba: pip install numba")
from sj_taid import accelerate
from sj_taid._internal import compat
from sj_taid.ops.step import cpu
from sj_taid.ops.step.code import is_plain
from sj_taid.ops.step.program import NotRead
from sj_taid.ops.step.read import read
from sj_taid.ops.step.readings import NAMES, plain_value, read_neuron
from sj_taid.ops.step.verify import run_plan
from tests.nets import own_neurons
from tests.ops.step import program

#: ``[N, *]``: images, rows of features, one channel, one neuron, a batch of one
SHAPES = [(3, 4, 2, 5), (2, 4, 3), (5, 4), (1, 1), (1, 4, 1), (4, 1, 3), (2, 1, 2, 2), (1, 4, 3, 2)]
SMOOTH = [
    *(torch.tanh, torch.sigmoid, torch.sin, torch.cos, torch.atan, torch.erf),
    *(lambda a: (a * a + 1).log(), lambda a: a.clamp(max=2).exp(), lambda a: (a * a + 1).sqrt()),
    lambda a: (a.abs() + 1) ** -1.5,
]
BRANCHES = [
    *(torch.relu, torch.abs, lambda a: a.clamp(-1, 1), lambda a: (a * 3).round() / 3),
    *(lambda a: surrogate.ATan()(a - 0.3), own_neurons.Triangle()),
    lambda a: a.masked_fill(a > 1, 0.3),
    *(lambda a: (a >= 0.1).to(a), lambda a: torch.where(a < 0, -0.5, a), torch.sign, torch.floor),
    lambda a: torch.where((a > 0) & ~(a > 1), a, a.detach()),
]  # fmt: skip
SAME = [
    *(torch.neg, torch.Tensor.detach, torch.clone, lambda a: a * 0.3 + 1, lambda a: 1 - a),
    *(lambda a: a.reshape(a.shape), lambda a: a.unsqueeze(0).squeeze(0), lambda a: a[:]),
    *(lambda a: torch.stack([a])[0], lambda a: a + torch.zeros_like(a).fill_(0.2), lambda a: a / 3),
]
PAIRS = [
    *(torch.add, torch.sub, torch.mul, lambda a, b: torch.add(a, b, alpha=2)),
    *(lambda a, b: a / (b * b + 1), lambda a, b: a.clone().mul_(b).add_(0.5)),
]


def put(a, b):
    a = a + b
    a[b > 0] = 0.25
    a[a <= b] *= 0.5
    return a


#: of a value and a parameter
LEARNED = [
    *(lambda a, p: a * p, lambda a, p: a + p.tanh() * 0.5),
    lambda a, p: a / (1 + p.detach() ** 2),
]


def with_item(z, value):
    z = z.clone()
    z[:1] = value
    return z


BRANCHES_OF_PAIRS = [torch.minimum, torch.maximum, put, lambda a, b: torch.where(a > b, a, b * 0.5)]
#: what must be seen for what it is: not pointwise, random, of a shape, or known at the call alone
POISON = [
    *(lambda a: a.flip(0), lambda a: a.cumsum(0), lambda a: a.softmax(-1)),
    *(lambda a: a - a.amax(1, True), lambda a: a.sort(0).values, lambda a: a + torch.rand(1)),
    *(lambda a: a + torch.as_tensor(a.tolist()), lambda a: a + torch.ones_like(a).cumsum(0)),
    *(lambda a: with_item(a, 1), lambda a: a + torch.zeros_like(a).cauchy_()),
    *(lambda a: a + torch.cat([a[:1] * 0, torch.ones_like(a[1:])]), lambda a: a.double() * 2),
    *(lambda a: (a > 0) + (a > 1) + 0 * a, lambda a: a.half().float()),
    *(lambda a: a + torch.empty_like(a), lambda a: a.view(-1).view(a.shape), lambda a: a.t().t()),
    *(lambda a: a + torch.arange(a.shape[-1]), lambda a: torch.where(a > 0, a > 1, a > -1) * a),
    *(lambda a: a * torch.ones(a.shape[1]).sum(), lambda a: a + torch.eye(1).sum() * a.dim()),
    *(lambda a: torch.from_numpy(a.detach().numpy()) + a, lambda a: a + next(COUNTER)),
    *(lambda a: a * torch.arange(2, 3), lambda a: a * torch.tensor(1.0).add_(1)),
]  # fmt: skip
COUNTER = iter(range(10**9))


class Random:
    """A random step of states and parameters, as a list of operations on what is there."""

    def __init__(self, seed, poison=None):
        rng = random.Random(seed)
        self.states, self.shape = rng.choice([1, 1, 2, 3]), rng.choice(SHAPES)
        self.steps = rng.choice([1, 3, 5])
        channels = self.shape[1], *[1] * (len(self.shape) - 2)
        of_each = [torch.Size(()), torch.Size(channels), torch.Size((1, *channels))]
        self.sizes = [rng.choice(of_each) for _ in range(rng.randrange(4))]
        ones = SAME + (SMOOTH if seed % 2 else BRANCHES)
        twos = PAIRS + ([] if seed % 2 else BRANCHES_OF_PAIRS)
        many, self.lines = 1 + self.states, []
        for k in range(rng.randrange(4, 9)):
            kind, first = rng.random(), rng.randrange(many)
            if kind < 0.45 or k == len(self.sizes) == 0:
                line = rng.choice(twos), first, "value", rng.randrange(many)
            elif kind < 0.7 and self.sizes:
                line = rng.choice(LEARNED), first, "parameter", rng.randrange(len(self.sizes))
            else:
                line = rng.choice(ones), first, None, None
            self.lines.append(line)
            many += 1
        if poison:
            self.lines.insert(0, (poison, rng.randrange(1 + self.states), None, None))
            self.lines.append((torch.add, many, "value", 1 + self.states))

    def __call__(self, x, states, parameters):
        values = [x, *states]
        homes = {"value": values, "parameter": parameters}
        for function, first, home, second in self.lines:
            more = [] if home is None else [homes[home][second]]
            values.append(function(values[first], *more))
        ends = [
            (v * 0.9 + s * 0.25 + x * 0.3).clamp(-2, 2)
            for v, s in zip(values[-self.states :], states, strict=False)
        ]
        return values[-1] + 0.1 * values[1], ends


def leaves_of(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    sizes = [(step.steps, *step.shape), *[step.shape] * step.states, *step.sizes]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in sizes]


def by_torch(step, x_seq, states, parameters):
    outputs = []
    for x in x_seq:
        output, states = step(x, states, parameters)
        outputs.append(output)
    return [torch.stack(outputs), *states]


def results(run, step, leaves):
    """Outputs, last states, and the gradient of each leaf."""
    split = 1 + step.states
    ends = run(leaves[0], leaves[1:split], leaves[split:])
    generator = torch.Generator().manual_seed(2)
    lost = [(end.double() * torch.randn(end.shape, generator=generator)).sum() for end in ends]
    loss = sum(lost)
    grads = (
        torch.autograd.grad(loss, leaves, allow_unused=True)
        if loss.requires_grad
        else [None] * len(leaves)
    )
    return [t if t is None else t.detach() for t in (*ends, *grads)]


def check(step):
    """Whether a step is read; if so, all that is compiled of it must be equal."""
    leaves = leaves_of(step)
    try:
        reading = read(step, step.states, leaves[1 + step.states :], step.shape)
    except NotRead:
        return False
    got = results(partial(run_plan, cpu.ENGINE, reading, [0.0] * step.states), step, leaves)
    want = results(partial(by_torch, step), step, leaves)
    exact = results(partial(by_torch, step), step, leaves_of(step, torch.float64))
    ends = 1 + step.states
    has_branches = any(
        op in ("ge", "gt", "le", "lt", "round", "sign", "floor") for op, _ in reading.program.lines
    )
    for k, (a, b, best) in enumerate(zip(got, want, exact, strict=True)):
        assert (a is None) == (b is None), f"gradient {k - ends}: {a}, expected {b}"
        if a is None:
            continue
        assert a.shape == b.shape and a.dtype == b.dtype
        if reading.exact and k < ends:
            assert torch.equal(a, b), f"output {k}"
        best = b.double() if has_branches else best  # in float64 a branch may be the other one
        size = float(best.abs().max())
        bound = 20 * float((b.double() - best).abs().max()) + 1e-5 * max(
            size, 1e-3 * a.numel() ** 0.5
        )
        assert float((a.double() - best).abs().max()) <= bound, (
            f"result {k} of {ends} and gradients"
        )
    return True


@pytest.mark.parametrize("seed", range(8))
def test_a_random_step_is_read_and_equal(seed):
    assert check(Random(seed))


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(1000, 1300))
def test_many_random_steps_are_equal(seed):
    check(Random(seed, random.Random(seed).choice([None, *POISON])))


@pytest.mark.parametrize("poison", POISON)
def test_what_is_not_pointwise_is_refused_or_equal(poison):
    for seed in range(2):
        check(Random(seed, poison))


class Plain(own_neurons.Own):
    """What the following differ from."""

    def step(self, x, v):
        v = v * 0.5 + x
        spike = self.surrogate_function(v - self.v_threshold)
        return spike, v * (1 - spike)


class Looks(Plain):
    """Its step reads more: ``look`` gives what x is multiplied by."""

    def __init__(self, look, **attributes):
        super().__init__()
        type(self).look = look
        for name, value in attributes.items():
            setattr(self, name, value)

    def step(self, x, v):
        return super().step(x * self.look(x, v), v)


def looking(look, kind=Looks, **attributes):
    """A neuron of a class of its own."""
    return type("Looking", (kind,), {})(look, **attributes)


def read_images(node):
    return read_neuron(node, (2, 4, 3, 5), compat.step_of(type(node)), cpu.ENGINE, "cpu")


def pair(plain, done=True):
    """A neuron, and an accelerated copy of it."""
    plain.step_mode = "m"
    fast = copy.deepcopy(plain)
    (row,) = accelerate(nn.Sequential(fast)).rows
    assert row.done or not done, row
    return plain, fast


def check_equal(*nodes, x=None, reset=True):
    """Call both, and compare what they give, their states and the gradient."""
    seen = []
    x = torch.randn(3, 2, 4, 2, 3) if x is None else x
    for node in nodes:
        if reset:
            functional.reset_net(node)
        leaf = x.clone().requires_grad_()
        try:
            y = node(leaf)
            y.backward(torch.ones_like(y))
            functional.detach_net(node)
        except (RuntimeError, TypeError, AttributeError) as error:
            seen.append(str(error))
        else:
            states = [torch.as_tensor(v) for n, v in node._memories.items() if n != "v_seq"]
            seen.append([y.detach(), leaf.grad, *states])
    assert type(seen[0]) is type(seen[1]), seen
    if isinstance(seen[0], list):
        torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-5, equal_nan=True)


GLOBAL = torch.tensor(0.5)
NUMBER = 2.0


def closure(value):
    return lambda self, x, v: value * 2


def sets(self, x, v):
    self.calls = getattr(self, "calls", 0) + 1
    return 1.0


def writes(self, x, v):
    object.__setattr__(self, "calls", 1)
    return 1.0


@torch.jit.script
def by_script(x):
    if x.size(0) > 64:
        return x * 2
    return x


class BySize(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x * 1)
    backward = staticmethod(lambda ctx, grad: grad * 2 if grad.shape[-1] > 64 else grad)


def by_first(x):
    try:
        return 2.0 if x.shape[0] > 64 else 1.0
    except Exception:
        return 3.0


#: what a step makes of sizes, which are others at the next call
BY_SIZES = [
    *(lambda x, v: x.shape[-1] > 64, lambda x, v: x.numel() > 1000, lambda x, v: len(x) > 64),
    *(lambda x, v: x.size(0) == 64, lambda x, v: 64 in x.shape, lambda x, v: x.nbytes > 64),
    *(lambda x, v: x.shape == (64, 4, 3, 5), lambda x, v: x.shape[2] == x.shape[3]),
    *(lambda x, v: list(range(x.shape[0]))[-1] > 64, lambda x, v: math.log(x.shape[0]) > 5),
    *(lambda x, v: float(np.array(x.shape).max()) > 64, lambda x, v: x * x.shape[0]),
    lambda x, v: torch.where(torch.tensor(x.shape[0]) > 64, 2.0, 1.0),
    lambda x, v: torch.where(torch.full_like(x, x.shape[0]) > 64, 2.0, 1.0),
    lambda x, v: torch.where(torch.full((), x.shape[0]) > 64, 2.0, 1.0),
    *(lambda x, v: 1 / x.shape[1], lambda x, v: [1.0] * x.shape[2], lambda x, v: BySize.apply(x)),
    *(lambda x, v: x.stride(-1) == 1, lambda x, v: x.stride()[0] > 64, lambda x, v: by_first(x)),
    *(lambda x, v: str(x.shape) == "", lambda x, v: x.is_contiguous(), lambda x, v: x._version),
    *(lambda x, v: x.untyped_storage().size() > 64, lambda x, v: bool(x.storage_offset())),
    *(lambda x, v: dict.fromkeys(x.shape, 2.0), lambda x, v: (v + x).flatten().shape[0] > 64),
]  # fmt: skip
#: what is the same at every call
BY_SHAPES = [
    lambda x, v: 2.0 if x.dim() == x.ndim == len(x.shape) == 4 else 1.0,
    *(lambda x, v: torch.zeros(x.shape) + torch.full(x.size(), 0.5), lambda x, v: v.view(x.shape)),
    lambda x, v: x.new_zeros(*x.shape) + torch.ones(x.shape[0], *x.shape[1:]),
    *(lambda x, v: 2.0 if x.shape == v.shape else 1.0, lambda x, v: torch.ones(1).expand(x.shape)),
    lambda x, v: torch.empty_strided(x.shape, x.stride()).zero_() if x.is_complex() else x,
    lambda x, v: x * 2 if x.is_floating_point() else x,
]
#: what is the same for every dtype of the input, and what is not
BY_DTYPES = [
    lambda x, v: torch.zeros(x.shape, dtype=x.dtype) + (x > 0).to(x.dtype),
    lambda x, v: torch.ones(1, dtype=v.dtype) * (x.float() if x.dtype == torch.int32 else x),
    lambda x, v: torch.full_like(x, 0.1, dtype=x.dtype) * torch.tensor(0.1, dtype=x.dtype) * 3,
    lambda x, v: torch.nn.functional.gelu(x) * (v.dtype == x.dtype),
]
BY_ONE_DTYPE = [
    *(lambda x, v: 2.0 if x.dtype == torch.float32 else 1.0, lambda x, v: torch.finfo(x.dtype).eps),
    *(lambda x, v: 2.0 if x.dtype == torch.bfloat16 else 1.0, lambda x, v: 1 / x.element_size()),
    *(lambda x, v: 2.0 if "Half" in x.type() else 1.0, lambda x, v: by_dtype(x)),
]


@torch.jit.script
def by_dtype(x):
    return x * 2 if x.dtype == torch.float16 else x


@pytest.mark.parametrize("look", BY_SIZES)
def test_a_step_that_asks_for_sizes_is_refused(look):
    found = read_images(looking(lambda self, x, v: look(x, v)))
    assert isinstance(found, str) and "report" not in found, found


@pytest.mark.parametrize("look", BY_SHAPES)
def test_a_step_that_gives_shapes_to_torch_is_read(look):
    found = read_images(looking(lambda self, x, v: look(x, v)))
    assert not isinstance(found, str), found


@pytest.mark.parametrize("look", BY_DTYPES)
def test_a_step_that_is_the_same_for_each_dtype_is_read(look):
    found = read_images(looking(lambda self, x, v: look(x, v)))
    assert not isinstance(found, str), found


@pytest.mark.parametrize("look", BY_ONE_DTYPE)
def test_a_step_that_decides_by_the_dtype_is_refused(look):
    found = read_images(looking(lambda self, x, v: look(x, v)))
    assert isinstance(found, str) and ("dtype" in found or "size" in found), found


def test_a_step_may_ask_whether_voltages_are_stored():
    nodes = pair(looking(lambda self, x, v: 2.0 if self.store_v_seq else 1.0))
    for stores in (False, True, False):
        for node in nodes:
            node.store_v_seq = stores
        check_equal(*nodes)


def test_a_parameters_sizes_are_known():
    def look(self, x, v):
        w = self.p.view(1, x.shape[1], *[1] * (x.dim() - 2))
        return w if self.p.shape[0] == x.shape[1] == 4 and self.p.numel() > 1 else 2.0

    found = read_images(looking(look, p=nn.Parameter(torch.ones(4))))
    assert not isinstance(found, str) and found.per_channel, found


def inner(read_width, **attributes):
    """A surrogate within, which reads a width of itself."""

    def forward(self, x):
        return own_neurons._Triangle.apply(x, read_width(self))

    return {"inner": type("Inner", (surrogate.ATan,), {"forward": forward} | attributes)()}


def by_inner(self, x, v):
    return self.inner(x)


def hooked():
    module = surrogate.Sigmoid()
    module.register_forward_hook(lambda *args: None)
    return module


def swallows(self, x, v):
    try:
        return 2.0 if v.sum() > 0 else 3.0
    except Exception:
        return 4.0


class Clipped(torch.autograd.Function):
    """A gradient that is clipped at each step."""

    forward = staticmethod(lambda ctx, p: p * 1)
    backward = staticmethod(lambda ctx, grad: grad.clamp(-1, 1))


class Decayed(Clipped):
    backward = staticmethod(lambda ctx, grad: torch.ones_like(grad))


def a_parameter():
    return {"p": nn.Parameter(torch.ones(()))}


#: words of the reason -> what the step looks at, and the neuron's further attributes
REFUSED = {
    "has mm": (lambda self, x, v: x @ torch.ones(x.shape[1], x.shape[1]), {}),
    "random numbers": (lambda self, x, v: torch.rand_like(x), {}),
    "a value of a tensor": (lambda self, x, v: x.sum().item(), {}),
    "asks for a": (swallows, {}),
    "traced": (lambda self, x, v: float(x.detach().numpy().sum()), {}),
    "sets its attribute 'calls'": (sets, {"calls": 0}),
    "sets an attribute": (writes, {}),
    "reads a tensor that": (lambda self, x, v: GLOBAL, {}),
    "no parameter, buffer, state or": (closure(torch.ones(())), {}),
    "a partial": (lambda self, x, v: self.table(x), {"table": partial(torch.mul, other=2.0)}),
    "gives other values without gradients": (lambda self, x, v: 1.0 + torch.is_grad_enabled(), {}),
    "for 'requires_grad'": (lambda self, x, v: 1.0 + x.requires_grad, {}),
    "for '__dict__'": (lambda self, x, v: self.__dict__["gain"], {"gain": 2.0}),
    "for '_modules'": (lambda self, x, v: self._modules["surrogate_function"](x), {}),
    "'inner.width', a list": (by_inner, inner(lambda self: self.width[0], width=[2.0])),
    "or by its type": (lambda self, x, v: 1.0 + (type(self).__bases__ == (Looks,)), {}),
    "for 'none', which": (by_inner, inner(lambda self: getattr(self, "none", 1.0))),
    "other values": (lambda self, x, v: 2.0 if isinstance(x.shape, torch.Size) else 1.0, {}),
    "parameters or modules": (by_inner, {"inner": nn.Conv2d(4, 4, 1)}),
    "hooks": (by_inner, {"inner": hooked()}),
    "changes a module": (
        lambda self, x, v: setattr(self.inner, "alpha", 5.0) or 1.0,
        {"inner": surrogate.ATan()},
    ),
    "reads a tensor": (lambda self, x, v, t=torch.ones(()): t, {}),
    "computes in float64": (lambda self, x, v: x.double().cos().float(), {}),
    "mixes neurons": (lambda self, x, v: x.sum(), {}),
    "sums over some axes": (lambda self, x, v: x.sum(-1, keepdim=True), {}),
    "a list": (lambda self, x, v: self.table[0], {"table": [2.0]}),
    "scripted function that asks for 'size'": (lambda self, x, v: by_script(x), {}),
    "a part of a tensor": (lambda self, x, v: with_item(torch.zeros_like(x), 1), {}),
    "in place what it is given": (lambda self, x, v: v.detach().mul_(2), {}),
    "in place what it is given: write": (lambda self, x, v: x.mul_(2), {}),
    "at the size of its input": (lambda self, x, v: self.p.expand_as(x).sum(), a_parameter()),
    "not linear": (lambda self, x, v: Clipped.apply(self.p), a_parameter()),
    "not linear (a constant)": (lambda self, x, v: Decayed.apply(self.p), a_parameter()),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.filterwarnings("ignore:.*please report it")
def test_a_step_is_refused_with_its_reason(reason):
    look, attributes = REFUSED[reason]
    node = looking(look, **attributes)
    before = dict(vars(node))
    shape = (2, 4) if reason == "has mm" else (2, 4, 3, 5)
    found = read_neuron(node, shape, compat.step_of(type(node)), cpu.ENGINE, "cpu")
    assert isinstance(found, str) and reason in found, found
    assert vars(node) == before and type(node.surrogate_function) is surrogate.ATan


#: what differs from a class that is read
REFUSED_CLASSES = {
    "another shape": {"step": lambda self, x, v: (x.unsqueeze(-1), v)},
    "another dtype": {"step": lambda self, x, v: (x > 0, v)},
    "a sequence of its own": {"multi_step_forward": lambda self, x_seq: x_seq * 2},
    "the voltage before the sequence": {"step": lambda self, x, v: (x, v + x + self.v * 0)},
}


@pytest.mark.parametrize("why", REFUSED_CLASSES)
@pytest.mark.filterwarnings("ignore:.*please report it")
def test_a_neuron_that_is_refused_runs_as_its_class(why):
    if why == "the voltage before the sequence" and not compat.FUNCTIONAL_STATES:
        pytest.skip("needs SpikingJelly 2.x: steps of states that they are given")
    node = type("Refused", (Plain,), REFUSED_CLASSES[why])()
    kind = type(node)
    (row,) = accelerate(nn.Sequential(node)).rows
    assert type(node) is kind and row.note and not row.done


class Written:
    last = None


def counter():
    calls = 0.0

    def count(self, x, v):
        nonlocal calls
        calls += 1.0
        return calls

    return count


def writes_to_a_class(self, x, v):
    Written.last = x
    return 1.0


def writes_a_global(self, x, v):
    global NUMBER
    NUMBER = NUMBER + 1.0
    return 1.0


@pytest.mark.parametrize("look", [counter(), writes_to_a_class, writes_a_global])
def test_a_step_that_writes_outside_of_it_is_not_run_to_be_read(look):
    (row,) = accelerate(nn.Sequential(looking(look))).rows
    assert not row.done and "outside of it" in row.note, row
    assert Written.last is None and NUMBER == 2.0


class Thick(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x, width: (x >= width).to(x))
    backward = staticmethod(lambda ctx, grad: (grad * 0.5, None))

    @staticmethod
    def of(width):
        return lambda a: Thick.apply(a, width)


def test_a_closures_number_and_a_function_of_the_neurons_own_are_read():
    """Surrogates by a factory, which differ in numbers alone."""
    made = type("Made", (Looks,), {})
    for width in (0.5, 1.5, 0.5):
        for look in (closure(width), lambda self, x, v: self.table(x)):
            nodes = pair(made(look, table=lambda a, width=width: Thick.of(width)(a)))
            check_equal(*nodes)
            for node in nodes:
                node.table = Thick.of(3.0)
            check_equal(*nodes)


def signs(self, x, v):
    """1 / -0.0 is -inf."""
    spike = (x * self.v_reset * 0 + self.v_reset + self.pair[0]).reciprocal()
    return spike * (2.0 if isinstance(self.pair[0], bool) else 1.0), v * self.v_threshold + x


@pytest.mark.parametrize("name", ["v_reset", "v_threshold"])
def test_numbers_that_python_takes_for_equal_are_told_apart(name):
    """-0.0 and 0.0, whole numbers and truths: their signs come out, and their dtypes."""
    plain = type("Signs", (Plain,), {"step": signs})()
    plain.pair = 1.0, 2.0
    nodes = pair(plain)
    for value in (0.0, -0.0, 0, 1.0, True, 1, math.nan, False, np.float32(-0.0), -0.0):
        for node in nodes:
            node.__dict__[name], node.pair = value, (value, 2.0)
        check_equal(*nodes)


DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:.*is not fused", "ignore:.*Falling back")
def test_a_parameter_of_another_dtype_gives_the_plain_classs_dtypes(dtype):
    for kind in (own_neurons.PerChannel, own_neurons.TwoCompartments):
        for of_parameters in DTYPES:
            nodes = pair(kind().to(of_parameters), done=False)
            x = torch.randn(3, 2, 4, 2, 3).to(dtype)
            seen = [node(x).dtype for node in nodes]
            assert seen[0] == seen[1], (kind, of_parameters)
            if dtype not in (torch.bfloat16, torch.float16):
                check_equal(*nodes, x=x)


#: numbers of other dtypes, which are cut
CUT = [
    lambda x: x.new_full(x.shape, -1.5, dtype=torch.int32),
    lambda x: torch.scalar_tensor(2.7, dtype=torch.int32),
    lambda x: torch.zeros_like(x, dtype=torch.int32).fill_(2.7),
    lambda x: torch.full((), -1.5).to(torch.int32),
    lambda x: torch.ones_like(x, dtype=torch.bool) * 0.3,
    lambda x: torch.full_like(x, 7, dtype=torch.int64) / 2,
    lambda x: torch.full_like(x, 0.1, dtype=torch.float16).float(),
    lambda x: x.to(torch.int32),
]


@pytest.mark.parametrize("number", CUT)
@pytest.mark.filterwarnings("ignore:.*is not fused")
def test_numbers_of_other_dtypes_are_torchs(number):
    nodes = pair(looking(lambda self, x, v: number(x) + 0.25), done=False)
    check_equal(*nodes, x=torch.randn(3, 2, 4, 2, 3) * 3)


#: what 0.0.0.0.14's LIF gives no gradient without
NO_GRADIENT = () if compat.FUNCTIONAL_STATES else ("training",)


@pytest.mark.parametrize(
    "kind", [*own_neurons.OWN, "LIFNode", "KLIFNode", "EIFNode", "IzhikevichNode"]
)
def test_a_change_of_what_a_step_reads_is_seen(kind):
    """Every name that is noted, one after the other, next to the plain neuron."""
    nodes = pair(getattr(neuron, kind)() if isinstance(kind, str) else kind())
    names = [*NAMES[type(nodes[0])].numbers]
    assert {"v_threshold" in names, "surrogate_function.alpha" in names} != {False}
    for name in names:
        home, _, last = name.rpartition(".")
        value = attrgetter(name)(nodes[0])
        if (changed := other_than(value)) is None or name in ("step_mode", *NO_GRADIENT):
            continue
        owners = [attrgetter(home)(node) if home else node for node in nodes]
        for now in (changed, value):
            for owner in owners:
                setattr(owner, last, now)
            check_equal(*nodes)


def other_than(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value * 0.8 + 0.1
    if isinstance(value, int):
        return value + 1
    if isinstance(value, tuple):
        return tuple(map(other_than, value))
    return -0.25 if value is None else None


@pytest.mark.filterwarnings("ignore:.*is not fused")
def test_another_surrogate_a_tensor_for_a_number_and_a_hook_are_seen():
    nodes, calls = pair(Plain()), []
    for change in (
        lambda node: setattr(node, "surrogate_function", own_neurons.Triangle(0.7)),
        lambda node: setattr(node, "v_threshold", torch.tensor(0.3)),
        lambda node: setattr(node, "v_threshold", np.float32(0.4)),
        lambda node: node.eval(),
        lambda node: node.surrogate_function.register_forward_hook(lambda *a: calls.append(node)),
        lambda node: setattr(node, "surrogate_function", surrogate.Sigmoid(3.0)),
        # a number that was a tensor is no function
        lambda node: setattr(node.surrogate_function, "alpha", torch.tensor(2.0)),
        lambda node: setattr(node.surrogate_function, "alpha", 4.0),
    ):
        for node in nodes:
            change(node)
        check_equal(*nodes)
    assert calls == [nodes[0]] * 3 + [nodes[1]] * 3


class StartsAt(own_neurons.Own):
    """It makes a tensor of an attribute where its state is a number."""

    states = ("a",)

    def __init__(self, start):
        super().__init__()
        self.start = start

    def first(self, x, a):
        return a if isinstance(a, torch.Tensor) else torch.full_like(x, self.start)

    if compat.FUNCTIONAL_STATES:

        def single_step_functional_forward(self, inputs, states, *args, **kwargs):
            (x,), (v, a) = inputs, states
            a = self.first(x, a)
            return (self.surrogate_function(v + x - a),), (v * 0.5 + x, a * 0.5)

    else:

        def single_step_forward(self, x):
            v, a = self.v, self.first(x, self.a)
            self.v, self.a = v * 0.5 + x, a * 0.5
            return self.surrogate_function(v + x - a)


@pytest.mark.filterwarnings("ignore:.*please report it", "ignore:.*is not fused")
def test_what_a_step_makes_of_a_number_is_seen_for_each_value():
    for start in (0.0, 0.9):
        nodes = pair(StartsAt(start), done=False)
        for value in (start, 0.0, 0.5):
            for node in nodes:
                node.start = value
            check_equal(*nodes)


@pytest.mark.filterwarnings("ignore:.*is not fused")
def test_an_attribute_that_becomes_a_list_is_seen():
    nodes = pair(looking(lambda self, x, v: self.table[0], table=(2.0, 1.0)))
    for table in ((2.0, 1.0), [3.0], (4.0,), torch.tensor([0.5])):
        for node in nodes:
            node.table = table
        check_equal(*nodes)


#: of an input [3, 2, 4, 2, 3]
STATES = {
    "float64": lambda: torch.randn(2, 4, 2, 3).double(),
    "bfloat16": lambda: torch.randn(2, 4, 2, 3).bfloat16(),
    "whole numbers": lambda: torch.randint(0, 3, (2, 4, 2, 3)),
    "sliced": lambda: torch.randn(2, 4, 2, 6)[..., ::2],
    "expanded": lambda: torch.randn(1, 4, 1, 1).expand(2, 4, 2, 3),
    "a number": lambda: 1,
    "a number of numpy's": lambda: np.float32(0.3),
    "a truth": lambda: True,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.filterwarnings("ignore:.*is not fused")
def test_a_state_of_another_dtype_or_layout_is_as_in_the_plain_class(state):
    for name in ("v", "a"):
        nodes, value = pair(own_neurons.AdaptiveThreshold()), STATES[state]()
        for node in nodes:
            node._memories[name] = value
        check_equal(*nodes, reset=False)


@pytest.mark.parametrize("shape", [(), (1, 4, 2, 3), (4, 2, 3), (1, 2, 4, 2, 3)])
def test_a_state_of_another_shape_never_reaches_the_loops(shape):
    """They read as many values as a step has, and would read past its end."""
    node = own_neurons.AdaptiveThreshold()
    accelerate(nn.Sequential(node))
    node._memories["a"] = torch.zeros(shape)
    with pytest.raises(ValueError, match="has shape"):
        node(torch.randn(3, 2, 4, 2, 3))


def test_threads_that_read_at_once_leave_no_mode_behind():
    """A mode that is left would slow every later call, and torch.compile would fail."""

    def read_many(seed):
        for k in range(6):
            net = nn.Sequential(neuron.IFNode(v_threshold=seed + k / 8 + 1.5, step_mode="m"))
            accelerate(net)
            net(torch.randn(2, 2, 3))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read_many, range(4)))
    assert not _python_dispatch._is_in_torch_dispatch_mode


def test_a_reading_does_not_depend_on_how_many_neurons_a_mask_chooses():
    found = set()
    for k in range(20):

        def step(x, states, parameters, bound=0.9 + k / 200):  # in examples of 105 and 408
            y, chosen = torch.ones_like(x), x > bound
            y[chosen] = x[chosen] * 2
            return y, []

        found.add(read(step, 0, (), (2, 3, 4)).program)
    assert len(found) == 1


class Own(float):
    """A number that carries more."""


def test_a_key_tells_numbers_apart_that_look_alike():
    first, second = (np.array(value, np.float64) for value in (0.1, math.nextafter(0.1, 1)))
    assert repr(first) == repr(second)
    assert plain_value(first) != plain_value(second)
    with np.printoptions(precision=3):
        assert plain_value(first) == plain_value(first.copy()) != plain_value(np.array(0.1001))
    for value in (Own(0.1), (Own(0.1),), np.array(None)):
        assert not is_plain(value)


@pytest.mark.skipif(not compat.FUNCTIONAL_STATES, reason="states are given from 0.0.0.1.0 on")
@pytest.mark.parametrize("shape_is_right", [True, False])
def test_a_state_may_stay_a_number_and_an_output_may_not(shape_is_right):
    class Keeps(neuron.BaseNode):
        def __init__(self):
            super().__init__(step_mode="m")
            self.register_memory("level", 0.5)

        def single_step_functional_forward(self, inputs, states, **kwargs):
            (x,), (v, level) = inputs, states
            output = x + v if shape_is_right else torch.as_tensor(level * 2.0)
            return (output,), (v * 0.5 + x, level)

    found = read_neuron(Keeps(), (2, 4), compat.step_of(Keeps), cpu.ENGINE, "cpu")
    if shape_is_right:
        assert not isinstance(found, str), found
    else:
        assert found == "its step has an output of another shape where its states are numbers"


def test_tanh_keeps_the_sign_of_0():
    assert math.copysign(1, program.compute("tanh", np.float32([-0.0]))[0]) == -1


@pytest.mark.parametrize("name", ["gelu", "silu", "elu", "celu", "selu", "mish"])
def test_what_torch_takes_apart_is_read(name):
    function = getattr(nn.functional, name)
    kind = type("Composite", (Plain,), {"step": lambda self, x, v: (x + v, function(v + x))})
    check_equal(*pair(kind()))
