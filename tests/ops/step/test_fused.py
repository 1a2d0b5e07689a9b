"""What both fused backends do: the loops of the CPU, and the kernels, built for the host."""

import inspect
import itertools
import math

import pytest
import torch
from spikingjelly.activation_based import surrogate

from sj_taid.ops import bits
from sj_taid.ops.step import fused as function_of_alif
from sj_taid.ops.step import reference
from sj_taid.ops.step.program import NotRead
from sj_taid.ops.surrogate import MultiLevelSpikeCount
from tests.helpers import (
    TOLERANCE,
    Case,
    assert_close,
    assert_counts_at_their_edges,
    assert_equal,
    assert_not_finite_alike,
    assert_spikes_at_their_edges,
    results,
    tensors,
)
from tests.ops.step.conformance import SURROGATES, compare, pairwise
from tests.ops.step.host import GXX, shifted

COUNTS = MultiLevelSpikeCount(4)


@pytest.fixture(params=["numba", "cupy"])
def fused(request):
    """A backend's module, for tensors on the CPU."""
    if request.param == "numba":
        return pytest.importorskip("sj_taid.ops.step.cpu", reason="needs numba: pip install numba")
    if GXX is None:
        pytest.skip("needs g++ to compile kernels.cu as C++")
    return request.getfixturevalue("launcher").cuda


@pytest.fixture
def compiled(request, fused):
    """``compiled(run)`` compiles what ``run()`` launches together, which is faster than singly."""
    if "launcher" not in request.fixturenames:
        return lambda run: None
    launcher = request.getfixturevalue("launcher")
    return lambda run: launcher.build(launcher.collect(run))


SHAPES = [
    (1, 1),  # one step of one neuron
    (5, 3),  # no channel axis
    (3, 5, 0, 2),  # nothing at all
    (3, 2, 1, 7),  # one channel
    (4, 3, 5, 7, 3),  # nothing divides a vector
    (192, 2, 3),  # long: the narrowest blocks
    (2, 70, 131),  # several blocks, cut inside a channel
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(fused, compiled, shape):
    norm = None
    if len(shape) > 2 and shape[2]:
        norm = "batch" if math.prod(shape) else "fixed"
    cases = (
        Case(shape=shape),
        Case(shape=shape, v_init=False, through=("spike_seq", "v")),
        Case(shape=shape, v_init=False, channels=shape[2] if len(shape) > 2 else None, norm=norm),
        Case(None, shape=shape, surrogate_function=COUNTS),
    )
    compiled(lambda: [results(fused.multi_step, case) for case in cases])
    for case in cases:
        assert not compare(case, fused.multi_step)


NOT_FINITE = {
    "v_reset": (0.0, -0.25, None),
    "detach_reset": (False, True),
    "decay_input": (False, True),
    "channels": (None, 5),
    "norm": (None, "fixed"),
}
CASES = [Case(**row, shape=(6, 40, 5)) for row in pairwise(NOT_FINITE)]
CASES += [
    Case(None, stateless=stateless, dtype=dtype, shape=(6, 40, 5), surrogate_function=COUNTS)
    for stateless, dtype in ((False, torch.float32), (True, torch.bfloat16))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_infinities_and_nan(fused, compiled, case):
    compiled(lambda: results(fused.multi_step, case))
    assert_not_finite_alike(fused.multi_step, reference.multi_step, case)


# Parameters other than the defaults, by the name of the constructor's argument. alpha is a float32
# number, to which 0.0.0.0.14's LogTailedReLU rounds it.
OTHER: dict[str, object] = {"alpha": 2.75, "beta": 0.4, "w": 0.75, "c": 0.2, "leak": 0.1, "k": 1.5}
OTHER |= {"grad_window": (-0.5, 3.25)}


def modules():
    kinds = *SURROGATES.values(), MultiLevelSpikeCount
    for kind, changed in itertools.product(kinds, (False, True)):
        arguments = {k: v for k, v in OTHER.items() if k in inspect.signature(kind).parameters}
        needed = {"max_spike_count": 4} if kind is MultiLevelSpikeCount else {}
        yield kind(**needed | arguments) if changed else kind(**needed)


def points(module):
    """A grid that holds zero, every edge of a piecewise derivative and its two neighbours."""
    numbers = [float(v) for n, v in vars(module).items() if n in {*OTHER, "grad_min", "grad_max"}]
    edges = [0.0, 1.0, *numbers, *(f / n for f, n in itertools.product((0.5, 1), numbers) if n)]
    edges = torch.tensor(edges)
    edges = torch.cat([edges, 0.0 - edges])  # never -0.0, which no H - V_th is
    inf = torch.tensor(math.inf)
    near = [edges, torch.nextafter(edges, inf), torch.nextafter(edges, -inf)]
    # Outside of its support SpikingJelly sets 0 even where what comes in is NaN.
    others = [] if isinstance(module, surrogate.PiecewiseQuadratic) else [inf, -inf, torch.nan]
    return torch.cat([torch.linspace(-4, 4, 801), *near, torch.tensor(others)])


@pytest.mark.parametrize(
    "module", [*modules()], ids=lambda m: f"{type(m).__name__}({m.extra_repr()})"
)
def test_derivative_equals_spikingjellys(fused, compiled, module):
    counts = isinstance(module, MultiLevelSpikeCount)
    x = points(module)
    leaf = x[None, None].clone().requires_grad_()
    # From rest H = X, and H - V_th is X, or H / V_th for counts.
    about = {"v_reset": None if counts else 0.0, "detach_reset": True, "store_v_seq": False}
    about |= {"decay_input": False, "surrogate_function": module}
    threshold = torch.tensor(float(counts))

    def gradient():
        spikes = fused.multi_step(leaf, 0.0, torch.tensor(0.0), threshold, **about)[0]
        return torch.autograd.grad(spikes.sum(), leaf)[0][0, 0]

    compiled(gradient)
    found = gradient()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    tolerance = TOLERANCE[torch.float32]["value"]
    about = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(found, expected, **about)


@pytest.mark.parametrize("changes", [{}, {"stateless": True}, {"dtype": torch.bfloat16}], ids=str)
def test_counts_at_their_edges(fused, changes):
    assert_counts_at_their_edges(fused.multi_step, reference.multi_step, **changes)


@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_spikes_at_their_edges(fused, v_reset, dtype):
    changes = {"v_reset": v_reset, "dtype": dtype}
    assert_spikes_at_their_edges(fused.multi_step, reference.multi_step, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("most", [0, 1, 14])  # 0: of silence, as counts
@pytest.mark.parametrize(("T", "neurons"), [(1, 1), (13, 3), (24, 2080), (8, 0)])
def test_whole_numbers_are_packed_and_unpacked(fused, T, neurons, most, dtype):
    values = torch.arange(T * neurons).remainder(most + 1).view(T, neurons).to(dtype)
    if most > 1:
        values.view(-1)[::5] = torch.nan
    want, engine = bits.pack(values, most), fused.ENGINE
    assert want.shape == bits.packed_shape(most, T, neurons)
    for given in (values, shifted(values)):
        assert torch.equal(engine.pack(given, most), want)
        for unpack_into in (engine.unpack_into, bits.unpack_into):
            for back in (torch.full_like(values, 7.0), shifted(torch.full_like(values, 7.0))):
                unpack_into(want, back)
                torch.testing.assert_close(back, values, rtol=0, atol=0, equal_nan=True)


def test_one_parameter_may_be_per_layer_and_the_other_per_channel(fused):
    case = Case(shape=(4, 3, 8, 2))
    leaves = tensors(case) | {"v_threshold": torch.linspace(0.6, 1.3, 8).requires_grad_()}
    got, want = (results(f, case, leaves) for f in (fused.multi_step, reference.multi_step))
    assert_close(got, want, case, leaves)


def test_a_call_like_one_before_reads_no_step_again(fused, monkeypatch):
    case = Case(shape=(4, 3, 5))
    want = results(fused.multi_step, case)
    monkeypatch.setattr(function_of_alif, "read_alif", None)
    assert_equal(results(fused.multi_step, case), want)


@pytest.mark.parametrize(
    "other",
    [{"v_reset": -0.25}, {"decay_input": False}, {"detach_reset": True}, {"alpha": 2}],
    ids=str,
)
def test_calls_with_other_options_are_others(fused, other):
    fires = surrogate.ATan(3.5)
    case = Case(shape=(4, 3, 5), surrogate_function=fires)
    for changes in ({}, other, {}):
        fires.alpha = changes.get("alpha", 3.5)
        changed = case.with_(**{name: value for name, value in changes.items() if name != "alpha"})
        got, want = (results(f, changed) for f in (fused.multi_step, reference.multi_step))
        assert_close(got, want, changed, tensors(changed))


def test_a_surrogate_with_a_hook_is_refused_after_calls_without(fused):
    fires = surrogate.ATan()
    case = Case(shape=(4, 3, 5), surrogate_function=fires)
    results(fused.multi_step, case)
    fires.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(NotRead, match="hooks"):
        results(fused.multi_step, case)
