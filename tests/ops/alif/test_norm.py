"""Batch norm and neuron as one operator: every output and gradient by name, as the definition."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from sj_taid import functional
from sj_taid.ops.alif import reference
from sj_taid.ops.alif.norm import Norm, batch_norm
from tests.helpers import (
    HALF,
    TOLERANCE,
    Case,
    assert_close,
    assert_equals_a_float32_copys,
    grid,
    results,
    tensors,
)

pytest.importorskip("numba", reason="needs numba: pip install numba")
from sj_taid.ops.alif import cpu
from sj_taid.ops.alif.cpu import threads

IMAGES = Case(shape=(6, 3, 5, 2, 3))


def leaves_of(case, affine=True, **changes):
    leaves = tensors(case) | {k: v.requires_grad_() for k, v in changes.items()}
    g = torch.Generator().manual_seed(case.seed + 2)
    if affine:
        dtype = torch.promote_types(case.dtype, torch.float32)
        for name, low in (("weight", 0.5), ("bias", -0.2)):
            drawn = torch.rand(case.shape[2], generator=g, dtype=torch.float64) + low
            leaves[name] = drawn.to(dtype).requires_grad_()
    return leaves


def normalised(multi_step, leaves, norm):
    """``multi_step`` with the norm whose parameters are leaves, for ``results``."""
    norm = norm._replace(weight=leaves.get("weight"), bias=leaves.get("bias"))
    return lambda *args, **options: multi_step(*args, norm=norm, **options)


def running(case, training, dtype=torch.float32):
    g = torch.Generator().manual_seed(case.seed + 3)
    mean = torch.randn(case.shape[2], generator=g, dtype=torch.float64).to(dtype)
    var = (torch.rand(case.shape[2], generator=g, dtype=torch.float64) + 0.5).to(dtype)
    return Norm(None, None, mean, var, training, 0.3, 1e-5)


def assert_conforms(case, leaves=None, training=True, **options):
    leaves = leaves or leaves_of(case)
    got, expected = [], []
    for multi_step, found in ((cpu.multi_step, got), (reference.multi_step, expected)):
        norm = running(case, training)
        found.append(results(normalised(multi_step, leaves, norm), case, leaves, **options))
        found.append({"mean": norm.running_mean, "var": norm.running_var})
    sums = {"grad_weight", "grad_bias", "grad_w", "grad_v_threshold"}
    scale = expected[0]["spike_seq"].numel()
    assert_close(
        *({k: v for k, v in f[0].items() if k not in sums - {"grad_w", "grad_v_threshold"}}
          for f in (got, expected)),
        case.dtype, scale=scale,
    )  # fmt: skip
    for name in sums & expected[0].keys():
        bound = TOLERANCE[torch.float32]["sum"] * scale
        assert (got[0][name] - expected[0][name]).abs().max() <= bound, name
    for name, want in expected[1].items():
        torch.testing.assert_close(got[1][name], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", list(grid(base=IMAGES)), ids=str)
def test_conforms(case):
    assert_conforms(case)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 3, 5), (1, 2, 3, 2), (4, 700, 3), (2, 2, 130, 40)], ids=str)
def test_conforms_for_shapes_statistics_and_parameters(shape, affine, training):
    case = Case(shape=shape, channels=shape[2])
    assert_conforms(case, leaves_of(case, affine), training)


@pytest.mark.parametrize("training", [True, False])
def test_conforms_channels_last(training):
    case = IMAGES.with_(channels=5)
    x = tensors(case)["x"].detach().permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    leaves = leaves_of(case, x=x)
    assert leaves["x"].stride(2) == 1
    assert_conforms(case, leaves, training)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("frozen", [None, "x", "w"])
def test_half_precision_equals_a_float32_copy(frozen, channels_last, training, dtype):
    case = Case(shape=(3, 2, 5, 33, 19), dtype=dtype)
    x = tensors(case)["x"].detach()
    x[x > 2] = torch.finfo(dtype).smallest_normal / 4
    if channels_last:
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    leaves = leaves_of(case, x=x)
    if frozen:
        leaves[frozen].requires_grad_(False)

    def multi_step(*args, **options):
        return normalised(cpu.multi_step, leaves, running(case, training))(*args, **options)

    assert_equals_a_float32_copys(multi_step, case, leaves)
    statistics = torch.ops.sj_taid.cpu_statistics
    assert torch.equal(statistics(x.detach()), statistics(x.detach().float()))


def test_norm_shares_statistics_in_training_alone(monkeypatch):
    """As torch's, which reduces nothing in eval mode, with running statistics or without."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for tracked in (True, False):
        group = object()
        module = torch.nn.SyncBatchNorm(3, track_running_stats=tracked, process_group=group)
        assert Norm.of(module).group is group and Norm.of(module.eval()).group is None


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("normalises", [True, False])
def test_half_precision_allocates_no_float32(normalises, dtype):
    case = Case(shape=(8, 4, 16, 16, 16), dtype=dtype, v_init=False)
    leaves = leaves_of(case, affine=normalises)
    norm = running(case, True)
    multi_step = normalised(cpu.multi_step, leaves, norm) if normalises else cpu.multi_step
    g = torch.ones(case.shape, dtype=dtype)

    def step():
        spike_seq, _, _ = multi_step(
            leaves["x"], 0.0, leaves["w"], leaves["v_threshold"], store_v_seq=False,
            **case.options(),
        )  # fmt: skip
        return torch.autograd.grad(spike_seq, leaves["x"], g)

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    assert max(sizes) == leaves["x"].nbytes, "the profiler saw the spikes, and nothing larger"


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "w", "v_threshold"])
def test_conforms_with_frozen_leaves(frozen):
    leaves = leaves_of(IMAGES)
    leaves[frozen].requires_grad_(False)
    assert_conforms(IMAGES, leaves)


@pytest.mark.parametrize("through", [("spike_seq",), ("v",), ("v_seq",)])
def test_conforms_through_one_output(through):
    assert_conforms(IMAGES, through=through, store_v_seq="v_seq" in through)


@pytest.mark.parametrize("size", [(8, 16, 3, 6, 6), (3, 2, 4, 33, 33)])
@pytest.mark.parametrize(("outlier", "bound"), [(0.0, 1e-6), (10.0, 1e-4)])
def test_statistics_of_a_mean_far_from_zero(size, outlier, bound):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(size, generator=g, dtype=torch.float64) * 1e-2 + 1e3).float()
    x[0, 0, :, 0, 0] += outlier  # the first value, which the others are taken relative to
    exact = x.double()
    axes = (0, 1, 3, 4)
    mean, var = torch.ops.sj_taid.cpu_statistics(x)
    assert (mean - exact.mean(axes)).abs().max() <= 1e-9 * 1e3
    assert ((var / exact.var(axes, correction=0)) - 1).abs().max() <= bound


def test_norm_of_a_mean_far_from_zero():
    case = IMAGES.with_(v_init=False)
    x = tensors(case)["x"].detach() * 1e-2 + 1e3
    leaves = leaves_of(case, x=x)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    got = results(normalised(cpu.multi_step, leaves, running(case, True)), case, leaves)
    norm = running(case, True, torch.float64)
    want = results(normalised(reference.multi_step, exact, norm), case, exact)
    assert torch.equal(got["spike_seq"], want["spike_seq"].float())
    for name in ("v_seq", "grad_x"):
        # The rounding of x itself is out of the comparison: both see the same float32 numbers.
        bound = 10 * TOLERANCE[torch.float32]["value"] * float(want[name].abs().max())
        assert (got[name] - want[name]).abs().max() <= bound, name


def test_second_derivatives_are_refused():
    leaves = leaves_of(IMAGES)
    spike_seq, _, _ = normalised(cpu.multi_step, leaves, running(IMAGES, True))(
        leaves["x"], 0.0, leaves["w"], leaves["v_threshold"], store_v_seq=False, **IMAGES.options()
    )
    for name in ("x", "weight"):
        (g,) = torch.autograd.grad(
            spike_seq.sum(), leaves[name], create_graph=True, retain_graph=True
        )
        with pytest.raises(RuntimeError, match="no second derivatives"):
            g.square().sum().backward(retain_graph=True)


def test_results_do_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(threads, "GRAIN", 1)
    case = Case(shape=(3, 50, 40, 7), channels=40)
    leaves = leaves_of(case)
    before = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        multi_step = normalised(cpu.multi_step, leaves, running(case, True))
        found.append(results(multi_step, case, leaves))
    torch.set_num_threads(before)
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(other[name], value), name


def test_batch_norm_is_torchs():
    x = torch.randn(4, 3, 5, 2, 2)
    norm = Norm(torch.rand(5), torch.rand(5), None, None, True, 0.1, 1e-5)
    want = F.batch_norm(x.flatten(0, 1), None, None, norm.weight, norm.bias, True)
    assert torch.equal(batch_norm(x, norm), want.unflatten(0, (4, 3)))


def test_norm_saves_the_input_alone():
    case = Case(shape=(8, 4, 16, 8, 8), v_init=False)
    leaves = leaves_of(case)
    saved = []

    def note(tensor):
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        normalised(cpu.multi_step, leaves, running(case, True))(
            leaves["x"],
            0.0,
            leaves["w"],
            leaves["v_threshold"],
            store_v_seq=False,
            **case.options(),
        )
    large = [size for size in saved if size > 4096]
    assert large == [4 * leaves["x"].numel()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators(dtype):
    """Schema, no aliasing, and fake outputs of the right shapes, dtypes and strides."""
    case = Case(shape=(9, 3, 5, 2), dtype=dtype)
    x_seq, _, w, v_threshold = (leaf.detach() for leaf in tensors(case).values())
    table = torch.rand(3, 5)
    backward = (
        *(torch.ones_like(x_seq), None, None, x_seq, None, 0.0, w, v_threshold),
        *(x_seq.new_empty(0), True, 0.0, False, "ATan", 1.0, 3.0, True, False, True, True, table),
    )
    ops = torch.ops.sj_taid
    for operator, arguments in (
        (ops.cpu_statistics, (x_seq,)),
        (ops.cpu_forward, (x_seq, None, 0.0, w, v_threshold, True, 0.0, False, 0, table, True)),
        (ops.cpu_backward, backward),
        (ops.cpu_backward, (*backward, True)),
        (ops.cpu_backward, (*backward, True, True)),
        (
            ops.cpu_input_gradient,
            (torch.ones_like(x_seq).float(), *backward, True, False, torch.rand(2, 5)),
        ),
    ):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_step_is_a_sequence_of_one(backend):
    x = torch.randn(4, 5, 3, 3)
    norm = Norm(torch.rand(5), torch.rand(5), None, None, True, 0.1, 1e-5)
    arguments = (0.0, torch.tensor(0.2), torch.tensor(0.7))
    spike, v = functional.alif_step(x, *arguments, norm=norm, backend=backend)
    spike_seq, v_last, _ = functional.alif_multi_step(
        x[None], *arguments, norm=norm, backend=backend
    )
    assert torch.equal(spike, spike_seq[0]) and torch.equal(v, v_last)


WORLD = 2


def whole_batch():
    return leaves_of(Case(shape=(4, 6, 5, 3, 3), v_init=False))


def share(rank, leaves, sizes=(2, 4)):
    first = sum(sizes[:rank])
    x = leaves["x"].detach()[:, first : first + sizes[rank]].clone().requires_grad_()
    return leaves | {"x": x}


def run_shared(multi_step, leaves, norm, cotangent):
    norm = norm._replace(weight=leaves["weight"], bias=leaves["bias"])
    spike_seq, _, v_seq = multi_step(
        leaves["x"], 0.0, leaves["w"], leaves["v_threshold"], norm=norm, store_v_seq=True,
        **Case().options(),
    )  # fmt: skip
    wanted = {k: v for k, v in leaves.items() if k != "v0"}
    grads = torch.autograd.grad([spike_seq, v_seq], list(wanted.values()), [cotangent] * 2)
    return {"spike_seq": spike_seq.detach()} | dict(zip(wanted, grads, strict=True))


def cotangent_of(leaves):
    g = torch.Generator().manual_seed(9)
    return torch.randn(leaves["x"].shape, generator=g)


def worker(rank, folder):
    torch.set_num_threads(1)
    init = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=WORLD)
    leaves = share(rank, whole_batch())
    cotangent = share(rank, {"x": cotangent_of(whole_batch())})["x"].detach()
    found = {}
    for name, multi_step in (("numba", cpu.multi_step), ("torch", reference.multi_step)):
        norm = running(Case(shape=(4, 6, 5)), True)._replace(group=dist.group.WORLD)
        found[name] = run_shared(multi_step, leaves, norm, cotangent)
        found[name] |= {"mean": norm.running_mean, "var": norm.running_var}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_statistics_over_two_processes_equal_one(tmp_path):
    leaves = whole_batch()
    norm = running(Case(shape=(4, 6, 5)), True)
    want = run_shared(reference.multi_step, leaves, norm, cotangent_of(leaves))
    mp.start_processes(worker, args=(tmp_path,), nprocs=WORLD, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for backend in ("numba", "torch"):
        parts = [rank[backend] for rank in ranks]
        for name in ("spike_seq", "x"):
            whole = torch.cat([part[name] for part in parts], dim=1)
            torch.testing.assert_close(whole, want[name], rtol=0, atol=1e-5)
        for name in ("weight", "bias", "w", "v_threshold"):  # each process has its own share
            total = sum(part[name] for part in parts)
            torch.testing.assert_close(total, want[name], rtol=1e-5, atol=1e-4)
        for name, value in (("mean", norm.running_mean), ("var", norm.running_var)):
            torch.testing.assert_close(parts[0][name], value, rtol=1e-5, atol=1e-6)
            assert torch.equal(parts[0][name], parts[1][name])
