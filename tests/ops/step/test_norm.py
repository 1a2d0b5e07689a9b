"""Batch norm and neuron as one operator: every output and gradient by name, as the definition."""

import pytest
import torch
from torch.nn import functional as F

from sj_taid.ops.step.plan import find_plan
from tests.helpers import Case, results, tensors
from tests.ops.step.conformance import compare
from tests.ops.step.norm import BatchNorm, batch_norm

pytest.importorskip("numba", reason="needs numba: pip install numba")
from sj_taid.ops.step import cpu
from sj_taid.ops.step.cpu import threads

IMAGES = Case(shape=(6, 3, 5, 2, 3), norm="batch")
SHAPES = [
    *((6, 3, 5), (1, 2, 3, 2), (4, 700, 3)),  # all channels are a part
    *((2, 2, 130, 40), (3, 2, 70, 5, 5), (2, 5, 641)),  # a run of several, the last part of fewer
    (3, 2, 3, 37, 41),  # a channel is cut into blocks that differ in size
    (150, 2, 9, 40),  # and a run of several channels
]


@pytest.mark.conforms
@pytest.mark.parametrize("norm", ["batch", "fixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("whole", [0, threads.WHOLE])
def test_conforms(shape, norm, whole, monkeypatch):
    monkeypatch.setattr(threads, "WHOLE", whole)
    find_plan.cache_clear()
    assert not compare(Case(shape=shape, channels=shape[2], norm=norm), cpu.multi_step)


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t.repeat_interleave(2)[::2]])
def test_parameters_of_another_dtype_or_layout(change):
    case, leaves = IMAGES.with_(through=("spike_seq",)), tensors(IMAGES)
    given = {n: change(leaves[n].detach()).requires_grad_() for n in ("weight", "bias")}
    got = results(cpu.multi_step, case, leaves | given)
    for name, want in results(cpu.multi_step, case, leaves).items():
        assert torch.equal(got[name], want.to(got[name].dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # of parameters
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_torchs(affine, training, dtype):
    x = torch.randn(4, 3, 5, 2, 2)
    mean, var, weight, bias = torch.rand(4, 5, dtype=dtype)
    weight, bias = (weight, bias) if affine else (None, None)
    want = [t if t is None else t.float() for t in (mean, var, weight, bias)]
    y = F.batch_norm(x.flatten(0, 1), *want, training, 0.3)
    norm = BatchNorm(weight, bias, mean, var, training, 0.3, 1e-5)
    got, used_mean, rstd = batch_norm(x, norm)
    assert torch.equal(got, y.unflatten(0, (4, 3)))
    assert torch.equal(mean.float(), want[0]) and torch.equal(var.float(), want[1])
    # What is handed on computes the same norm.
    shape = (5, 1, 1)
    again = (x - used_mean.view(shape)) * rstd.view(shape)
    again = again * weight.view(shape).float() + bias.view(shape).float() if affine else again
    torch.testing.assert_close(again, got)
