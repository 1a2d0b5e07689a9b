"""The definition of ALIF: traces worked by hand, gradients by equations, SpikingJelly's PLIF."""

import math

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate

from sj_taid._internal import compat
from sj_taid.functional import alif_multi_step
from sj_taid.ops.step import reference
from sj_taid.ops.surrogate import MultiLevelSpikeCount, is_integer, levels_of
from tests.helpers import TOLERANCE, assert_close, count_grid, grid, results, tensors

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


def test_spikes_without_state_are_refused():
    with pytest.raises(ValueError, match=r"without state.* gives counts alone"):
        alif_multi_step(torch.ones(2, 3), 0.0, None, torch.ones(()))


def by_equations(x_seq, v, w, v_th, *, surrogate_function, v_reset, decay_input, detach_reset, **_):
    """The equations in one place; what fires is a number that has the slope g.

    ATan's g is ``alpha/2 / (1 + (pi/2 alpha u)^2)`` of ``u = H - V_th``; of counts, whose u is
    ``H / V_th``, it is 1 in the window, else 0.
    """
    shape = (-1, *[1] * (x_seq.dim() - 3))
    q = 0.0 if w is None else 1 / (1 + torch.exp(-w)).view(shape)
    v_th, rest, spikes, voltages = v_th.view(shape), v_reset or 0.0, [], []
    for x in x_seq:
        h = v * (1 - q) + rest * q + (x * q if decay_input else x) if w is not None else x
        if is_integer(surrogate_function):
            u, window = h / v_th, (surrogate_function.grad_min, surrogate_function.grad_max)
            number = u.clamp(0, surrogate_function.max_spike_count).round()
            g = ((u >= window[0]) & (u <= window[1])).double()
        else:
            u, alpha = h - v_th, 2.0
            number, g = (u >= 0).double(), alpha / 2 / (1 + (math.pi / 2 * alpha * u) ** 2)
        s = number.detach() + g.detach() * (u - u.detach())
        spikes.append(s)
        s = s.detach() if detach_reset else s
        v = h - s * v_th if v_reset is None else (1 - s) * h + s * rest
        voltages.append(v)
    return torch.stack(spikes), v, torch.stack(voltages)


@pytest.mark.parametrize("case", grid((F64,)) + count_grid((F64,)), ids=str)
def test_every_gradient_equals_that_of_the_equations(case):
    case = case.with_(shape=(6, 3, 5, 4))
    leaves = tensors(case)
    got, want = (results(f, case, leaves) for f in (reference.multi_step, by_equations))
    assert 0.05 < got["spike_seq"].mean() / levels_of(case.surrogate_function) < 0.95
    assert_close(got, want, case, leaves)


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
