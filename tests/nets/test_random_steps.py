"""Random steps: whatever a loss uses, accelerated gradients are plain's, ``None`` included."""

import copy
import random
import warnings

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn

pytest.importorskip("numba", reason="needs numba: pip install numba")
import sj_taid
from sj_taid.fused_neuron import Accelerated
from tests.nets import own_neurons
from tests.nets.test_any_neuron import MAKERS

#: of a tensor, two more of the step's values and numbers
LINES = (
    """
-{a}; {a}.abs(); torch.relu({a}); {a}.clamp(min={c}); {a}.clamp({c}, {d}); {a} ** 2; {a} ** 3
{a}.pow(-1); {a}.abs() ** 0.5; {a}.round(); {a}.floor(); {a}.sign(); torch.exp({a}); torch.tanh({a})
torch.sigmoid({a}); F.softplus({a}); F.leaky_relu({a}); F.hardtanh({a}); {a}.detach(); {a}.sqrt()
({a} * {a}).sqrt(); {a}.log(); {c} - {a}; {c} / {a}; {a} / {c}; {a} * {c}; ({a} > {c}).to(x) * {d}
({a} >= {c}) * {b}; {a}.masked_fill({b} <= {c}, 0.0); {a}.nan_to_num({c}); torch.zeros_like({a})
torch.where({a} > {c}, {a}, {d}); torch.where({a} > {b}, {b}, {e}); torch.lerp({a}, {b}, {e})
torch.sub({a}, {b}, alpha={c}); torch.addcmul({a}, {b}, {e}); {a}.clamp(min={b}); {a} + {b}
{a} - {b}; {a} * {b}; {a} / {b}; torch.minimum({a}, {b}); torch.maximum({a}, {b})
{a} + ({b} - {a}) * {c}
""".replace("\n", "; ")
    .strip("; ")
    .split("; ")
)
NUMBERS = ("0", "1", "0.5", "-0.5", "2.0", "0.25", "1.5", "-1.0", "3", "-0.0", "0.7")
OF_PARAMETER = ("self.w", "self.w.sigmoid()", "(self.w * 2)", "self.w.exp()", "(1 - self.w)")
FIRE = "self.surrogate_function({h} - "
SPIKES = (f"{FIRE}0.5)", f"{FIRE}self.w)", "{h}", "{any}")
AFTER = ("{h} - spike", "{h} * (1 - spike)", "{h} * (1 - spike.detach())", "0.9 * {s} + spike")
AFTER += ("{h}", "{any}", "{s}")


class Random(own_neurons.Own):
    """A neuron of a step that is drawn: one to three states, up to one parameter."""

    def __init__(self, states, shape):
        self.states = states
        super().__init__()
        self.w = nn.Parameter(torch.full(shape, 0.3))


def draw(seed):
    """A neuron, and the text of its step."""
    rng = random.Random(seed)
    states = ("a", "b")[: rng.randint(0, 2)]
    names, lines = ["x", "v", *states], []
    for k in range(rng.randint(2, 6)):
        a, b, e = (rng.choice([names[-1], *names]) for _ in range(3))
        b = rng.choice(OF_PARAMETER) if rng.random() < 0.15 else b
        c, d = rng.choices(NUMBERS, k=2)
        lines.append(f"t{k} = {rng.choice(LINES).format(a=a, b=b, c=c, d=d, e=e)}")
        names.append(f"t{k}")
    of = {"h": names[-1], "any": rng.choice(names)}
    lines.append(f"spike = {rng.choice(SPIKES).format(**of)}")
    after = [rng.choice(AFTER).format(s=s, **of) for s in ("v", *states)]
    head = f"def step({', '.join(['self', 'x', 'v', *states])}):"
    text = "\n    ".join([head, *lines, f"return spike, {', '.join(after)}"])
    space = {"torch": torch, "F": nn.functional}
    exec(text, space)
    kind = type("Random", (Random,), {"step": space["step"]})
    return kind(states, rng.choice([(), (4, 1, 1)])), text


def gradients(node, used, given, upstream):
    """Of the input, the states before the first step and parameters, from what is used."""
    functional.reset_net(node)
    names = node._states()
    x, *states = leaves = [t.clone().requires_grad_() for t in given]
    for name, state in zip(names, states, strict=True):
        setattr(node, name, state)
    ends = [node(x), *(getattr(node, name) for name in names)]
    leaves += [p for p in node.parameters() if p.requires_grad]
    pairs = [(e, g) for e, g, u in zip(ends, upstream, used, strict=True) if u and e.requires_grad]
    if not pairs:
        return [None] * len(leaves)
    roots, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(roots, leaves, grads, allow_unused=True)


def assert_gradients(plain, fast, used, steps):
    """Halves, where many a derivative is infinite."""
    generator = torch.Generator().manual_seed(steps)
    draws = [(steps, 2, 4, 2, 3), *[(2, 4, 2, 3)] * len(plain._states())]
    given = [torch.randint(-4, 5, size, generator=generator) / 2 for size in draws]
    upstream = [torch.randn(size, generator=generator) for size in draws]
    pairs = zip(*(gradients(n, used, given, upstream) for n in (plain, fast)), strict=True)
    for want, got in pairs:
        assert (want is None) == (got is None), (want, got)
        if want is not None:
            far = 1e-4 * float(want.nan_to_num(0, 0, 0).abs().max())
            torch.testing.assert_close(got, want, rtol=1e-3, atol=far, equal_nan=True)


def subsets(node, seed):
    """The usual one, the last states alone, and a random one."""
    size, rng = len(node._states()), random.Random(seed)
    return [
        [True] + [False] * size,
        [False] + [True] * size,
        [rng.random() < 0.5 for _ in range(1 + size)],
    ]


@pytest.mark.parametrize("name", [kind.__name__ for kind in own_neurons.OWN])
def test_gradients_are_plains_whatever_is_used(name):
    plain = MAKERS[name]()
    fast = copy.deepcopy(plain)
    sj_taid.accelerate(nn.Sequential(fast))
    for used in subsets(plain, name):
        for steps in (1, 3):
            assert_gradients(plain, fast, used, steps)
    assert isinstance(fast, Accelerated)


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 25, 50, 75])
def test_random_steps_have_plains_gradients(first):
    check(first, 25)


@pytest.mark.fuzz
def test_many_random_steps_have_plains_gradients():
    check(100, 1000)


def check(first, size):
    read = 0
    for seed in range(first, first + size):
        plain, text = draw(seed)
        fast = copy.deepcopy(plain)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            sj_taid.accelerate(nn.Sequential(fast))
            for k, used in enumerate(subsets(plain, seed)):
                try:
                    assert_gradients(plain, fast, used, 1 + 2 * k)
                except AssertionError as error:
                    raise AssertionError(f"seed {seed}, used {used}:\n{text}") from error
        found = [str(w.message) for w in seen]
        assert not any("report it" in w for w in found), f"seed {seed}:\n{text}\n{found}"
        read += not any("not fused" in w for w in found)
    assert read > size / 2
