"""Any input that the neuron takes, against their equations in float64, written in numpy.

A spike may go either way where the voltage meets the threshold to rounding, and from there on two
right results part. So each step is computed from the voltage that the step before really left, and
is held to its own rounding; so is each gradient, from the spikes that really were.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import nn

from sj_taid import ALIFNode, functional
from sj_taid.ops import backends

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
st = hypothesis.strategies

BACKENDS = [name for name in backends.BACKENDS if backends.why_not(name) is None]
SURROGATES = {
    surrogate.Sigmoid: lambda u, a: a / (2 + 2 * np.cosh(np.clip(a * u, -700, 700))),
    surrogate.ATan: lambda u, a: a / 2 / (1 + (np.pi / 2 * a * u) ** 2),
}
quiet = partial(np.errstate, all="ignore")


# ---- inputs ----

moderate = st.floats(-3, 3, width=32)
anything = st.floats(width=32) | st.sampled_from([1e-40, -1e-45, 3e38, -3e38, 65504.0, 0.0, -0.0])


@st.composite
def tensors(draw, shape, dtype, values=moderate | anything):
    """Few different values at random places, in any layout."""
    palette = np.array(draw(st.lists(values, min_size=1, max_size=6)), dtype=np.float64)
    places = np.random.default_rng(draw(st.integers(0, 99))).integers(len(palette), size=shape)
    t = torch.from_numpy(palette[places]).to(dtype)
    layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded", "offset"]))
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return t.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded" and t.numel():
        axis = draw(st.integers(0, t.dim() - 1))
        return t.narrow(axis, 0, 1).expand_as(t)
    return torch.cat([t[:1], t])[1:] if layout == "offset" else t


@st.composite
def calls(draw, backend):
    """The arguments of ``alif_multi_step``."""
    more = [torch.float16, torch.float64] if backend == "torch" else []
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, *more]))
    state = torch.promote_types(dtype, torch.float32)
    T = draw(st.integers(1, 6) | st.sampled_from([17, 300]))
    step = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    values = draw(st.sampled_from([moderate, moderate | anything]))
    per_channel = len(step) > 1 and draw(st.booleans())

    def parameter(values):
        many = st.lists(values, min_size=step[1], max_size=step[1]) if per_channel else values
        return torch.tensor(draw(many)).to(state)

    return {
        "x_seq": draw(tensors((T, *step), dtype, values)),
        "v": draw(values.filter(math.isfinite) | tensors(tuple(step), state, values)),
        "w": parameter(st.floats(-120, 120, width=32) | values),
        "v_threshold": parameter(values),
        "decay_input": draw(st.booleans()),
        "v_reset": draw(st.none() | st.floats(-2, 2, width=32)),
        "surrogate_function": draw(st.sampled_from([*SURROGATES]))(),
        "detach_reset": draw(st.booleans()),
        "backend": backend,
    }


# ---- ALIF ----


def numbers(call):
    """In float64: x, the voltage before the first step, q, threshold; and eps, tiny."""
    x = call["x_seq"].double().numpy()
    v = torch.as_tensor(call["v"], dtype=torch.float64).numpy()
    shape = (-1, *[1] * (x.ndim - 3)) if call["w"].dim() else ()
    w, threshold = (call[n].detach().double().numpy().reshape(shape) for n in ("w", "v_threshold"))
    with quiet():
        q = 1 / (1 + np.exp(-w))
    precision = torch.finfo(torch.promote_types(call["x_seq"].dtype, torch.float32))
    return x, np.broadcast_to(v, x.shape[1:]), q, threshold, precision.eps, precision.tiny


def charged(call, v_seq):
    """H of each step, from the voltages that the library left; its rounding; where it is open."""
    x, v, q, threshold, eps, tiny = numbers(call)
    before = np.concatenate([v[None], v_seq[:-1]])
    rest = call["v_reset"] or 0.0
    with quiet():
        if call["decay_input"]:
            h = before + (x - (before - rest)) * q
        else:
            h = before - (before - rest) * q + x
        size = np.abs(before) + np.abs(x) + abs(rest)
        error = 8 * eps * (size * q + np.abs(before) + (not call["decay_input"]) * np.abs(x))
        error = error + size * tiny + 4 * tiny
        total = size + np.abs(threshold)
        # Beyond the largest number, or infinity times what may underflow to zero.
        huge = torch.finfo(torch.float64 if eps < 1e-10 else torch.float32).max / 8
        open_ = ((total > huge) & np.isfinite(total)) | ((q < tiny) & ~np.isfinite(size))
    return before, h, error, open_


def by_node(call, step_mode, cut):
    """The same by a node, step by step or as a sequence cut in two."""
    options = {n: call[n] for n in call if n not in ("x_seq", "v", "w", "v_threshold")}
    node = ALIFNode(step_mode=step_mode, **options)
    node.w, node.v_threshold = nn.Parameter(call["w"]), nn.Parameter(call["v_threshold"])
    x, node.v = call["x_seq"], call["v"]
    if step_mode == "s":
        return torch.stack([node(step) for step in x]), node.v
    return torch.cat([node(part) for part in (x[:cut], x[cut:]) if len(part)]), node.v


def check_alif(call, step_mode, cut):
    spikes, v, v_seq = functional.alif_multi_step(**call, store_v_seq=True)
    by_functions = functional.alif_multi_step(**call)
    for same in (by_functions[:2], by_node(call, step_mode, cut), (spikes, v_seq[-1])):
        for got, want in zip(same, (spikes, v), strict=True):
            assert torch.equal(got.nan_to_num(123), want.nan_to_num(123))
    assert by_functions[2] is None and spikes.shape == v_seq.shape == call["x_seq"].shape
    assert spikes.dtype == call["x_seq"].dtype and v.dtype == call["w"].dtype
    s, v_seq = spikes.double().numpy(), v_seq.double().numpy()
    assert np.isin(s, (0, 1)).all()
    x, _, q, threshold, eps, tiny = numbers(call)
    before, h, error, open_ = charged(call, v_seq)
    with quiet():
        rounding = error + 2 * eps * (np.abs(h) + np.abs(threshold))
        near = np.abs(h - threshold) <= rounding
        assert ((s == (h - threshold >= 0)) | near | open_).all()
        if call["v_reset"] is None:
            expected = h - s * threshold
        else:
            expected = (1 - s) * h + s * call["v_reset"]
        reset = np.where(s, np.abs(threshold), 0)  # without a spike not even NaN matters
        close = np.abs(v_seq - expected) <= error + 2 * eps * (np.abs(h) + reset)
        same = (v_seq == expected) | (np.isnan(v_seq) & np.isnan(expected))
        assert (close | same | open_).all()
    check_gradients(call, s, before, h, x, q, threshold, eps, tiny)


def check_gradients(call, s, before, h, x, q, threshold, eps, tiny):
    leaves = {"x_seq": call["x_seq"], "w": call["w"], "v_threshold": call["v_threshold"]}
    if isinstance(call["v"], torch.Tensor):
        leaves["v"] = call["v"]
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    spikes, v, _ = functional.alif_multi_step(**call | leaves)
    g = torch.Generator().manual_seed(0)
    onto = [torch.randint(-2, 3, t.shape, generator=g).to(t) for t in (spikes, v)]
    with quiet():  # numba's last product is numpy's
        grads = torch.autograd.grad([spikes, v], [*leaves.values()], onto, materialize_grads=True)
    got = dict(zip(leaves, grads, strict=True))
    for name, leaf in leaves.items():
        assert got[name].shape == leaf.shape and got[name].dtype == leaf.dtype, name
    finite = all(np.isfinite(a).all() and (np.abs(a) < 10).all() for a in (x, before, threshold, h))
    if not finite or len(s) > 20 or s.size == 0:
        return
    # The derivation by hand, and next to it the same in magnitudes: what rounding is relative to.
    share = 32 * len(s) * eps
    q_size = q + tiny / share  # a sigmoid below tiny may be 0
    fires, alpha = call["surrogate_function"], call["surrogate_function"].alpha
    u = SURROGATES[type(fires)](h - threshold, alpha)
    u_size = u + alpha**2 * (np.abs(h) + np.abs(threshold))
    hard = call["v_reset"] is not None
    rest = call["v_reset"] or 0.0
    g_spikes, g_v = (t.double().numpy() for t in onto)
    size_v, terms, grads_x = np.abs(g_v), [], [None] * len(s)
    for t in reversed(range(len(s))):
        by_reset = (rest - h[t] if hard else -threshold) * (not call["detach_reset"])
        g_s, size_s = g_spikes[t] + g_v * by_reset, np.abs(g_spikes[t]) + size_v * np.abs(by_reset)
        g_h, size_h = u[t] * g_s + g_v * (1 - s[t] * hard), u_size[t] * size_s + size_v
        along = (x[t] if call["decay_input"] else 0.0) - (before[t] - rest)
        far = np.abs(x[t]) + np.abs(before[t]) + abs(rest)
        g_th = -u[t] * g_s - (0 if hard else s[t] * g_v)
        terms.append((q * (1 - q) * along * g_h, q_size * far * size_h, g_th, size_h))
        grads_x[t] = (g_h * q, size_h * q_size) if call["decay_input"] else (g_h, size_h)
        g_v, size_v = (1 - q) * g_h, size_h
    w, w_size, th, th_size = (np.stack(term) for term in zip(*terms, strict=True))
    axes = tuple(axis for axis in range(x.ndim) if axis != 2 or not call["w"].dim())
    expected = {
        "x_seq": tuple(map(np.stack, zip(*grads_x, strict=True))),
        "v": (g_v, size_v),
        "w": (w.sum(axes), w_size.sum(axes)),
        "v_threshold": (th.sum(axes), th_size.sum(axes)),
    }
    for name, grad in got.items():
        value, size = expected[name]
        rounding = torch.finfo(grad.dtype)
        bound = share * size + rounding.eps * np.abs(value) + rounding.tiny
        assert (np.abs(grad.double().numpy() - value) <= bound).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "examples",
    [pytest.param(30, id="some"), pytest.param(2000, id="many", marks=pytest.mark.fuzz)],
)
def test_alif_equals_its_equations(backend, examples):
    everything, options = hypothesis.HealthCheck, {"deadline": None, "database": None}
    given = hypothesis.given(calls(backend), st.sampled_from("sm"), st.integers(0, 6))(check_alif)
    options |= {"derandomize": examples < 1000, "max_examples": examples}
    hypothesis.settings(suppress_health_check=everything, **options)(given)()
