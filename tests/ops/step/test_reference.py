"""The definition of ALIF: a trace worked by hand, gradcheck, and gradients derived on paper."""

import math

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate

from sj_taid._internal import compat
from sj_taid.functional import alif_multi_step
from sj_taid.ops.step import reference
from sj_taid.ops.surrogate import MultiLevelSpikeCount, is_integer, levels_of
from tests.helpers import TOLERANCE, count_grid, grid, results, tensors

F64 = torch.float64


# w = 0 makes tau = 2, q = 1/2.
SPIKES = {"w": 0.0, "v_threshold": 0.7, "surrogate_function": surrogate.ATan()}
COUNTS = {"v_threshold": 0.5, "v_reset": None, "surrogate_function": MultiLevelSpikeCount(4)}
# tau = 4/3, of which a quarter of the voltage stays:
# H = 0.6, in thresholds 1.2: 1 | 0.1/4 + 1.3 = 1.325, 2.65: 3 | -0.175/4 + 6 = 5.95625: 4, and
# 3.95625 are left | 0.9890625 - 1 = -0.0109375: 0
STATEFUL = (0.0, [1, 3, 4, 0], [0.1, -0.175, 3.95625, -0.0109375])
# H = X, in thresholds 0.5: 0 | 1.5: 2 | 2.5: 2 | 3.5: 4 | 18: 4
STATELESS = (0.0, [0, 2, 2, 4, 4], [0.25, -0.25, 0.25, -0.25, 7.0])


@pytest.mark.parametrize(
    ("options", "x", "rest", "spikes", "v"),
    [
        # H = 0.5 | 0.5 + (1 - 0.5)/2 = 0.75 fires | 0.25 | 0.25 + (2 - 0.25)/2 = 1.125 fires
        (SPIKES, [1.0, 1.0, 0.5, 2.0], 0.0, [0, 1, 0, 1], [0.5, 0.0, 0.25, 0.0]),
        # H = 0.5 | 0.75 fires, V = 0.05 | 0.05 + 0.45/2 = 0.275 | 0.275 + 1.725/2 = 1.1375 fires
        (
            SPIKES | {"v_reset": None},
            [1.0, 1.0, 0.5, 2.0],
            0.0,
            [0, 1, 0, 1],
            [0.5, 0.05, 0.275, 0.4375],
        ),
        # From V = -0.25, whose distance to the reset voltage decays:
        # H = 0.25 | 0.25 - 0.5/2 + 0.5 = 0.5 | 0.5 - 0.75/2 + 0.6 = 0.725 fires | 0.25
        (
            SPIKES | {"v_reset": -0.25, "decay_input": False},
            [0.5, 0.5, 0.6, 0.5],
            -0.25,
            [0, 0, 1, 0],
            [0.25, 0.5, -0.25, 0.25],
        ),
        (SPIKES, [1.4], 0.0, [1], [0.0]),  # at the threshold
        (COUNTS | {"w": math.log(3.0), "decay_input": False}, [0.6, 1.3, 6.0, -1.0], *STATEFUL),
        # The same H, as the input is scaled by q = 3/4.
        (COUNTS | {"w": math.log(3.0)}, [0.8, 1.3 * 4 / 3, 8.0, -4 / 3], *STATEFUL),
        (COUNTS | {"w": None}, [0.25, 0.75, 1.25, 1.75, 9.0], *STATELESS),
    ],
)
def test_trace(options, x, rest, spikes, v):
    numbers = {"w": options["w"], "v_threshold": options["v_threshold"]}
    given = {n: k if k is None else torch.tensor(k, dtype=F64) for n, k in numbers.items()}
    x_seq = torch.tensor(x, dtype=F64).view(-1, 1)
    spike_seq, v_last, v_seq = alif_multi_step(
        x_seq, rest, **options | given, store_v_seq=True, backend="torch"
    )
    assert torch.equal(v_last, v_seq[-1]) and spike_seq.flatten().tolist() == spikes
    assert v_seq.flatten().tolist() == pytest.approx(v)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"v_reset": 0.0}, "soft reset.*but v_reset=0.0.*take v_reset=None"),
        ({"w": None, "surrogate_function": surrogate.ATan()}, "without state .* counts"),
    ],
)
def test_options_that_fit_no_counts_are_refused(options, expected):
    fits = {"w": torch.zeros(()), "v_reset": None, "surrogate_function": MultiLevelSpikeCount(4)}
    with pytest.raises(ValueError, match=expected):
        alif_multi_step(torch.ones(2, 3), 0.0, v_threshold=torch.ones(()), **fits | options)


def derived_gradients(case, leaves, cotangents):
    """The backward recursion derived on paper, in numpy.

    With upstream gradients ``gs[t]`` of spikes and ``gv[t]`` of voltages, going back in time::

        dL/dH    = gs g + Gv dV/dH
        dV/dH    = hard: (1 - S) + (V_reset - H) g      soft: 1 - V_th g       (g terms: attached)
        dL/dV_th = -gs g + hard: -Gv (V_reset - H) g    soft: Gv (-S + V_th g)
        dL/dw    = q (1 - q) dL/dH * (decay_input ? X - (V - V_reset) : -(V - V_reset))
        Gv[t-1]  = gv[t-1] + dL/dH (1 - q)

    For counts g is 1 / V_th in the window, else 0, and stands for H / V_th g in dL/dV_th. Without
    state Gv[t-1] is gv[t-1].
    """
    most, counted = levels_of(case.surrogate_function), is_integer(case.surrogate_function)
    x, v0, w, v_th = (leaves[n].detach().numpy() for n in ("x", "v0", "w", "v_threshold"))
    if case.channels is not None:
        w, v_th = w[:, None], v_th[:, None]
    alpha = 2.0  # ATan's: g(u) = alpha/2 / (1 + (pi/2 alpha u)^2)
    q = 1 / (1 + np.exp(-w))
    rest = case.v_reset or 0.0
    v, before, charged, spikes = v0, [], [], []
    for x_t in x:
        before.append(v)
        h = v + (x_t - (v - rest)) * q if case.decay_input else v - (v - rest) * q + x_t
        h = x_t if case.stateless else h
        s = np.rint(np.clip(h / v_th, 0, most)) if counted else (h >= v_th).astype(float)
        v = h - s * v_th if case.v_reset is None else (1 - s) * h + s * rest
        charged.append(h)
        spikes.append(s)

    gs_seq, gv_last, gv_seq = cotangents
    carry = gv_last
    gx, gw, gth = np.zeros_like(x), np.zeros_like(v0), np.zeros_like(v0)
    for t in reversed(range(len(x))):
        gv = carry + gv_seq[t]
        h, s, v, gs = charged[t], spikes[t], before[t], gs_seq[t]
        g = alpha / 2 / (1 + (np.pi / 2 * alpha * (h - v_th)) ** 2)
        g_threshold = g
        if counted:
            window = case.surrogate_function.grad_min, case.surrogate_function.grad_max
            g = (h / v_th >= window[0]) * (h / v_th <= window[1]) / v_th
            g_threshold = h / v_th * g
        attached = 0.0 if case.detach_reset else 1.0
        if case.v_reset is None:
            dv_dh = 1 - attached * v_th * g
            gth += -gs * g_threshold + gv * (-s + attached * v_th * g_threshold)
        else:
            dv_dh = (1 - s) + attached * (rest - h) * g
            gth += -gs * g - attached * gv * (rest - h) * g
        gh = gs * g + gv * dv_dh
        gx[t] = gh * (q if case.decay_input and not case.stateless else 1.0)
        gw += q * (1 - q) * gh * ((x[t] if case.decay_input else 0.0) - (v - rest))
        carry = gh * (0.0 if case.stateless else 1 - q)
    axes = (0, 1, 2) if case.channels is None else (0, 2)
    gradients = {"grad_x": gx, "grad_v0": carry, "grad_v_threshold": gth.sum(axes)}
    return gradients if case.stateless else gradients | {"grad_w": gw.sum(axes)}


@pytest.mark.parametrize("case", grid((F64,)) + count_grid((F64,)), ids=str)
def test_every_gradient_equals_the_derivation(case):
    case = case.with_(shape=(6, 3, 5, 4))
    leaves = tensors(case)
    got = results(reference.multi_step, case, leaves)
    g = torch.Generator().manual_seed(case.seed + 1)
    cotangents = [
        torch.randn(got[name].shape, generator=g, dtype=F64).numpy()
        for name in ("spike_seq", "v", "v_seq")
    ]
    assert 0.05 < got["spike_seq"].mean() / levels_of(case.surrogate_function) < 0.95
    for name, want in derived_gradients(case, leaves, cotangents).items():
        error = np.abs(got[name].numpy() - want).max()
        assert error <= TOLERANCE[F64]["value"] * max(1.0, np.abs(want).max()), name


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("v_reset", [0.0, -0.25, None])
@pytest.mark.parametrize("decay_input", [False, True])
def test_equals_spikingjellys_plif_to_the_bit(dtype, v_reset, decay_input):
    plif = neuron.ParametricLIFNode(
        init_tau=3.0, decay_input=decay_input, v_threshold=0.8, v_reset=v_reset, step_mode="m"
    ).to(dtype)
    x_seq = torch.randn(8, 4, 33, dtype=dtype) + 0.5
    if decay_input:
        x_seq[3, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    got, v, _ = alif_multi_step(
        x_seq,
        v_reset or 0.0,
        plif.w,
        torch.tensor(0.8, dtype=dtype),
        decay_input=decay_input,
        v_reset=v_reset,
        backend="torch",
    )
    assert torch.equal(got, plif(x_seq))
    if compat.FUNCTIONAL_STATES or decay_input or v_reset:
        torch.testing.assert_close(v, plif.v, rtol=0, atol=0, equal_nan=True)
    else:  # 0.0.0.0.14 rounds v (1 - q) + x here, 2.x v - q v + x
        error = (v - plif.v).abs().max().item()
        assert 0.0 < error <= TOLERANCE[dtype]["value"] * plif.v.abs().max().item()
