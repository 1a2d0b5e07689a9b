"""The kernels' text for neurons of any class, built for the host, against steps in float64."""

import itertools
from contextlib import nullcontext
from functools import partial
from inspect import signature

import pytest
import torch
from spikingjelly.activation_based import neuron

from sj_taid.nets.neurons import as_read
from sj_taid.ops.step.autograd import apply_fused
from sj_taid.ops.step.plan import spec_of
from sj_taid.ops.step.record import Notes
from sj_taid.ops.step.verify import verify
from tests.helpers import HALF
from tests.nets import own_neurons
from tests.ops.step.as_on_cuda import AsOnCuda
from tests.ops.step.conformance import pairwise
from tests.ops.step.host import needs_gxx
from tests.ops.step.norm import BatchNorm, batch_norm

pytestmark = needs_gxx

TAUS = (3.0, 1.1, 4 / 3, 1.5)  # none of which has an exact reciprocal
MAKERS = {kind.__name__: kind for kind in own_neurons.OWN}
for _name in (
    *("IFNode", "ILIFNode", "LIFNode", "KLIFNode", "QIFNode", "EIFNode", "ComplementaryLIFNode"),
    *("TernaryLIFNode", "IzhikevichNode", "ParametricLIFNode"),
):
    if hasattr(neuron, _name):
        _kind, _tau = getattr(neuron, _name), TAUS[len(MAKERS) % len(TAUS)]
        _taus = {n: _tau for n in ("tau", "init_tau") if n in signature(_kind).parameters}
        MAKERS[_name] = partial(_kind, **_taus)
OPTIONS = {
    "T": (1, 4, 7, 8, 9, 16, 17, 33),
    "dtype": (torch.float32, *HALF),
    "norm": (None, "batch", "fixed"),
    "shape": ((2, 4, 4, 4), (3, 4), (3, 4, 5)),
    "starts": ("numbers", "tensors"),
    "through": ("all", "output"),
    "frozen": (False, True),
}
ROWS = [*pairwise(OPTIONS)]


def draw(who, row, seed):
    """The input, states and tensors of a call, a norm's, and gradients of what it gives."""
    g = torch.Generator().manual_seed(seed)
    shape = row["T"], *row["shape"]
    x = torch.randn(shape, generator=g).add_(0.2).to(row["dtype"])
    states = [0.3 * torch.randn(shape[1:], generator=g) for _ in who.states]
    norm = [torch.randn(4, generator=g).mul_(0.2).add_(1 - i) for i in range(2)] * bool(row["norm"])
    upstream = [torch.randn(shape, generator=g).to(x.dtype)]
    upstream += [torch.randn(shape[1:], generator=g) for _ in who.states]
    tensors = [t.detach().clone() for t in who.tensors.values()]
    return x, states, tensors, norm, upstream


def normalized(x, norm, row):
    """The output of a norm, with the mean and rstd that it used."""
    mean, rstd = torch.linspace(-0.2, 0.3, 4).to(x), torch.linspace(0.8, 1.2, 4).to(x)
    moments = (mean, rstd.pow(-2) - 1e-5, row["norm"] == "batch", 0.0, 1e-5)
    return batch_norm(x, BatchNorm(*norm, *moments))


def results(run, row, given, dtype, device="cpu"):
    """Outputs, states and gradients by name, of leaves of this dtype on a device."""
    x, states, tensors, norm, upstream = given
    learn = row["starts"] == "tensors"
    leaves = {"x": x.to(dtype or x.dtype)}
    leaves |= {f"state {k}": s.to(dtype or s.dtype) for k, s in enumerate(states) if learn}
    leaves |= {f"parameter {k}": t.to(dtype or t.dtype) for k, t in enumerate(tensors)}
    leaves |= {f"norm {k}": t.to(dtype or t.dtype) for k, t in enumerate(norm)}
    for name, leaf in leaves.items():
        leaf = leaves[name] = leaf.detach().to(device, copy=True)
        leaf.requires_grad_(not (row["frozen"] and name[0] == "p"))
    ends = run(leaves, len(states), len(tensors), norm)
    used = ends if row["through"] == "all" else ends[:1]
    pairs = [(e, g.to(e)) for e, g in zip(used, upstream, strict=False) if e.requires_grad]
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    roots, cotangents = zip(*pairs, strict=True)
    grads = torch.autograd.grad(roots, wanted, cotangents, allow_unused=True)
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    found = {f"end {k}": e.detach() for k, e in enumerate(ends)}
    found |= {f"grad of {n}": g for n, g in zip(names, grads, strict=True)}
    return {name: t if t is None else t.cpu() for name, t in found.items()}


def by_torch(who, row):
    def run(leaves, states, parameters, norm):
        x = leaves["x"]
        x = x if x.dtype == torch.float64 else x.float()
        if norm:
            x, *_ = normalized(x, [leaves["norm 0"], leaves["norm 1"]], row)
        given = [leaves.get(f"state {k}", who.starts(x)[k]) for k in range(states)]
        given = [s.to(x) if isinstance(s, torch.Tensor) else s for s in given]
        return who.run_sequence(x, given, [leaves[f"parameter {k}"] for k in range(parameters)])

    return run


def by_kernels(engine, who, reading, row):
    def run(leaves, states, parameters, norm):
        x = leaves["x"]
        of_norm = [None] * 4
        if norm:
            of_norm = [leaves["norm 0"], leaves["norm 1"]]
            _, *moments = normalized(x.detach().float(), [t.detach() for t in of_norm], row)
            of_norm = [*moments, *of_norm]
        starts = who.starts(x.float())  # as numbers of half precision they would be others
        given = [leaves.get(f"state {k}") for k in range(states)]
        for k, start in enumerate(starts):
            if given[k] is None and isinstance(start, torch.Tensor):
                given[k] = start.detach().float()
        v_init = tuple(0.0 if isinstance(s, torch.Tensor) else float(s) for s in starts)
        spec = spec_of(x, reading, bool(norm), row["norm"] == "fixed", saves=True)
        tensors = [leaves[f"parameter {k}"] for k in range(parameters)]
        plan = engine.plan(spec)
        return apply_fused(plan, v_init, "", x, *given, *tensors, *of_norm)[: 1 + states]

    return run


@pytest.mark.parametrize("name", MAKERS)
def test_the_kernels_compute_what_a_step_computes(launcher, name):
    engine = launcher.cuda.ENGINE
    who, _ = as_read(MAKERS[name]())
    rows = ROWS[list(MAKERS).index(name) % 8 :: 8]
    if any(t.dim() > 1 for t in who.tensors.values()):  # shaped for images
        rows = [row | {"shape": OPTIONS["shape"][0]} for row in rows]
    calls = [(row, who.read(row["shape"], Notes())) for row in rows]

    def run_all():
        for row, reading in calls:
            results(by_kernels(engine, who, reading, row), row, draw(who, row, 0), None)

    launcher.build(launcher.collect(run_all))  # together: faster than singly
    for row, reading in calls:
        check(engine, who, row, reading)


def test_the_check_of_a_gpu_takes_any_divisor(launcher):
    for tau in TAUS:
        who, _ = as_read(neuron.LIFNode(tau))
        reading = who.read((2, 64), Notes())
        with AsOnCuda():
            assert verify(who, reading, (2, 64), launcher.cuda.ENGINE, "cpu") is None


def check(engine, who, row, reading, device="cpu"):
    as_on_cuda = AsOnCuda if device == "cpu" else nullcontext
    for seed in itertools.count():
        given = draw(who, row, seed)
        exact = results(by_torch(who, row), row, given, torch.float64)
        with as_on_cuda():
            plain = results(by_torch(who, row), row, given, None, device)
        if all(
            t is None or (t.isfinite().all() and t.abs().max() < 1e4) for t in exact.values()
        ) and torch.equal(exact["end 0"].to(plain["end 0"]).round(), plain["end 0"].round()):
            break
    with as_on_cuda():
        got = results(by_kernels(engine, who, reading, row), row, given, None, device)
    assert got.keys() == exact.keys()
    for key, want in exact.items():
        have = got[key]
        if want is None or have is None:
            assert all(t is None or not t.any() for t in (want, have)), (key, row)
            continue
        if key.startswith("end") and reading.exact and not row["norm"]:
            assert torch.equal(have, plain[key].to(have)), (key, row)
            continue
        # Half precision rounds outputs and gradients of x; sums and steps add their terms' errors.
        unit = torch.finfo(have.dtype).eps
        scale = max(1.0, float(want.abs().max()))
        bound = (unit + 2e-5 * row["T"]) * scale
        if key[:12] in ("grad of para", "grad of norm"):
            bound = 3e-5 * row["T"] * max(scale, float(given[0].numel()) ** 0.5)
        assert float((have.double() - want).abs().max()) <= bound, (key, row, bound)
