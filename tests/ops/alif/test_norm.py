"""Batch norm and neuron as one operator: every output and gradient by name, as the definition."""

import pytest
import torch
from torch.nn import functional as F

from sj_taid.ops.alif import reference
from sj_taid.ops.alif.norm import Norm, batch_norm
from sj_taid.ops.alif.plan import NormSpec, mean_and_rstd
from tests.helpers import (
    TOLERANCE,
    Case,
    assert_equals_a_float32_copys,
    assert_statistics_of_a_mean_far_from_zero,
    results,
    tensors,
)
from tests.ops.alif.conformance import compare

pytest.importorskip("numba", reason="needs numba: pip install numba")
from sj_taid.ops.alif import cpu
from sj_taid.ops.alif.cpu import threads

IMAGES = Case(shape=(6, 3, 5, 2, 3), norm="batch")
SHAPES = [(6, 3, 5), (1, 2, 3, 2), (4, 700, 3), (2, 2, 130, 40), (3, 2, 70, 5, 5)]


def call(multi_step, leaves, norm=None, **options):
    arguments = (leaves[name] for name in ("w", "v_threshold"))
    more = IMAGES.options() | {"store_v_seq": False, "norm": norm} | options
    return multi_step(leaves["x"], 0.0, *arguments, **more)


def norm_of(leaves, momentum=0.3, use_batch_statistics=True):
    """A norm of the leaves, with running statistics of its own."""
    g = torch.Generator().manual_seed(3)
    mean = torch.randn(leaves["x"].shape[2], generator=g)
    weight, bias = leaves.get("weight"), leaves.get("bias")
    return Norm(weight, bias, mean, mean.square() + 0.5, use_batch_statistics, momentum, 1e-5)


def statistics(x):
    """Each channel's mean and biased variance."""
    spec = NormSpec(x.dtype, x.device, x.numel(), x.shape[2], x.stride(2), False, 0.1, 0.0)
    mean, rstd = mean_and_rstd(cpu.ENGINE.norm(spec).numbers(x, None, None, None, None, None))
    return torch.stack([mean, rstd**-2])


@pytest.mark.parametrize("norm", ["batch", "fixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("whole", [0, threads.WHOLE])
def test_conforms(shape, norm, whole, monkeypatch):
    monkeypatch.setattr(threads, "WHOLE", whole)
    assert not compare(Case(shape=shape, channels=shape[2], norm=norm), cpu.multi_step)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_updates_statistics_with_and_without_parameters(shape, affine, training):
    leaves = tensors(Case(shape=shape, norm="batch" if affine else None))
    got, want = (norm_of(leaves, use_batch_statistics=training) for _ in range(2))
    found = call(cpu.multi_step, leaves, got)[1], call(reference.multi_step, leaves, want)[1]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["batch", "fixed"])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("frozen", [(), ("x",), ("w",)])
@pytest.mark.parametrize("whole", [0, threads.WHOLE])
def test_bfloat16_equals_a_float32_copy(whole, frozen, channels_last, norm, monkeypatch):
    monkeypatch.setattr(threads, "WHOLE", whole)
    axes, dtype = (0, 1, 3, 4, 2) if channels_last else None, torch.bfloat16
    case = Case(shape=(3, 2, 5, 33, 19), dtype=dtype, axes=axes, frozen=frozen, norm=norm)
    leaves = tensors(case)
    with torch.no_grad():
        leaves["x"][leaves["x"] > 2] = torch.finfo(dtype).smallest_normal / 4
    assert_equals_a_float32_copys(cpu.multi_step, case, leaves)
    x = leaves["x"].detach()
    assert torch.equal(statistics(x), statistics(x.float()))


@pytest.mark.parametrize("shape", [(8, 16, 3, 6, 6), (3, 2, 4, 33, 33)])
@pytest.mark.parametrize(("outlier", "bound"), [(0.0, 1e-6), (10.0, 1e-4)])
def test_statistics_of_a_mean_far_from_zero(shape, outlier, bound):
    assert_statistics_of_a_mean_far_from_zero(statistics, shape, outlier, bound)


@pytest.mark.filterwarnings("error")
def test_statistics_of_infinities_are_nan_without_a_warning():
    x = torch.ones(3, 2, 4, 5)
    x[1, 1, 2, 0] = torch.inf
    assert statistics(x)[1].isnan().tolist() == [False, False, True, False]


def test_norm_of_a_mean_far_from_zero():
    case = IMAGES.with_(v_init=False)
    leaves = tensors(case)
    leaves["x"] = (leaves["x"].detach() * 1e-2 + 1e3).requires_grad_()
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    got, want = results(cpu.multi_step, case, leaves), results(reference.multi_step, case, exact)
    assert torch.equal(got["spike_seq"], want["spike_seq"].float())
    for name in ("v_seq", "grad_x"):
        # The rounding of x itself is out of the comparison: both see the same float32 numbers.
        bound = 10 * TOLERANCE[torch.float32]["value"] * float(want[name].abs().max())
        assert (got[name] - want[name]).abs().max() <= bound, name


def test_second_derivatives_are_refused():
    leaves = tensors(IMAGES)
    spikes = call(cpu.multi_step, leaves, norm_of(leaves))[0].sum()
    for name in ("x", "weight"):
        (g,) = torch.autograd.grad(spikes, leaves[name], create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="no second derivatives"):
            g.square().sum().backward(retain_graph=True)


def test_batch_norm_is_torchs():
    x = torch.randn(4, 3, 5, 2, 2)
    norm = Norm(torch.rand(5), torch.rand(5), None, None, True, 0.1, 1e-5)
    want = F.batch_norm(x.flatten(0, 1), None, None, norm.weight, norm.bias, True)
    assert torch.equal(batch_norm(x, norm), want.unflatten(0, (4, 3)))
