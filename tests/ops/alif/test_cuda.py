"""The launcher's logic, with the driver's calls replaced: see host.py."""

import threading
from types import SimpleNamespace

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch.utils._python_dispatch import TorchDispatchMode

from sj_taid.ops.alif import autograd, kernels, reference
from sj_taid.ops.alif.kernels import BLOCK, NEED_NORM, NEED_V_THRESHOLD, NEED_W, NEED_X
from tests.helpers import (
    Case,
    assert_close,
    assert_not_finite_alike,
    assert_statistics_of_a_mean_far_from_zero,
    results,
    tensors,
)
from tests.ops.alif.host import CompileError, needs_gxx

CASE = Case(shape=(4, 3, 8, 2))
NORM = Case(shape=(4, 3, 4, 4, 4), norm="batch")
ALL = NEED_X | NEED_W | NEED_V_THRESHOLD


def run(launcher, case=CASE, leaves=None):
    return results(launcher.cuda.multi_step, case, leaves or tensors(case))


def fire(launcher, x_seq, **options):
    """``multi_step`` of ``x_seq`` from rest, with one tau and threshold."""
    parameters = (torch.zeros(()), torch.ones(()))
    options = {"store_v_seq": False} | CASE.options() | options
    return launcher.cuda.multi_step(x_seq, 0.0, *parameters, **options)


def count_saved_bytes(call):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call()
    return sum(t.nbytes for t in saved)


# ---- what is launched ----


@needs_gxx
@pytest.mark.parametrize(
    ("norm", "frozen", "needs"),
    [
        (None, ("w",), [ALL & ~NEED_W]),
        (None, ("v_threshold",), [ALL & ~NEED_V_THRESHOLD]),
        (None, ("x",), [ALL & ~NEED_X]),
        (None, ("w", "v_threshold", "v0"), [NEED_X]),
        ("batch", (), [NEED_NORM, ALL]),  # the norm's sums first, if x needs them
        ("batch", ("x",), [NEED_NORM | ALL & ~NEED_X]),
        ("fixed", (), [NEED_NORM | ALL]),
    ],
)
def test_backward_computes_only_what_is_needed(launcher, norm, frozen, needs):
    got = run(launcher, (NORM if norm else CASE).with_(norm=norm, frozen=frozen))
    assert {f"grad_{name}" for name in frozen}.isdisjoint(got)
    names = [launch.name for launch in launcher.launches]
    backward = [name.split(",") for name in names if name.startswith("alif_backward")]
    assert [int(name[-2]) for name in backward] == needs


@needs_gxx
@pytest.mark.parametrize("shape", [(3, 2, 4, 33, 33), (2, 64, 8)], ids=str)
@pytest.mark.parametrize(("outlier", "bound"), [(0.0, 1e-6), (10.0, 1e-4)])
def test_statistics_of_a_mean_far_from_zero(launcher, shape, outlier, bound):
    assert_statistics_of_a_mean_far_from_zero(launcher.cuda.statistics, shape, outlier, bound)


@needs_gxx
def test_statistics_take_half_of_the_threads_that_run_at_a_time(launcher):
    launcher.capacity = 4 * BLOCK
    launcher.cuda.statistics(torch.rand(4, 64, 8))
    assert [launch.grid for launch in launcher.launches] == [(2,)]


def test_grid_reduces_partial_sums_in_one_launch():
    class Computing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not function.is_view:
                computing.append(str(function))
            return function(*args, **kwargs or {})

    computing = []
    grid = kernels.grid(torch.zeros(4, 3, 8, 4), 8, 4, True, 64, lambda *_: 64)
    partial_sums = torch.rand(2, grid.threads * grid.lanes)
    with Computing():
        grid.reduce(partial_sums)
    assert computing == ["aten.sum.dim_IntList"]


@needs_gxx
def test_launch_uses_the_tensors_device_and_the_threads_current_stream(launcher, monkeypatch):
    """PyTorch runs backward in a thread of its own, with the stream of the forward made current."""
    stream = threading.local()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    stream.cuda_stream = 1
    spikes, *_ = fire(launcher, tensors(CASE)["x"])

    def in_another_thread():
        stream.cuda_stream = 2
        spikes.sum().backward()

    thread = threading.Thread(target=in_another_thread)
    thread.start()
    thread.join()
    assert [launch.stream for launch in launcher.launches] == [(0, 1), (0, 2)]
    assert {launch.device for launch in launcher.launches} == {torch.device("cpu")}


@needs_gxx
def test_function_is_loaded_once_per_device_and_kernel(launcher, monkeypatch):
    loaded, module = [], launcher.cuda.cupy.RawModule

    def load(**arguments):
        loaded.append(arguments)
        return module(**arguments)

    monkeypatch.setattr(launcher.cuda.cupy, "RawModule", load)
    function = launcher.cuda._function
    assert function(0, "a") is function(0, "a")
    assert function(0, "a") is not function(1, "a") and function(0, "b") is not function(0, "a")
    assert [arguments["name_expressions"] for arguments in loaded] == [("a",), ("a",), ("b",)]
    assert all(arguments["code"] == kernels.source() for arguments in loaded)
    assert all("--fmad=false" in arguments["options"] for arguments in loaded)


def test_resident_threads_are_read_from_the_loaded_kernel(launcher, monkeypatch):
    cuda, device = launcher.cuda, torch.device("cuda:0")
    monkeypatch.setattr(cuda, "_function", lambda index, name: SimpleNamespace(num_regs=82))
    monkeypatch.setattr(cuda, "_processors", lambda device: (3, 2048))
    assert launcher.real.resident(device, "a") == 3 * 5 * BLOCK
    assert launcher.real.capacity(device) == 3 * 2048


# ---- what is saved, computed and copied ----


@needs_gxx
@pytest.mark.parametrize("dtype", kernels.SCALARS, ids=str)
@pytest.mark.parametrize(("T", "v_init"), [(4, False), (16, True), (24, True)])
def test_forward_saves_the_input_the_parameters_and_checkpoints(launcher, dtype, T, v_init):
    case = CASE.with_(shape=(T, 3, 8, 2), dtype=dtype, v_init=v_init)
    neurons = 3 * 8 * 2
    expected = T * neurons * dtype.itemsize + 2 * 4  # x, w, v_threshold
    expected += neurons * 4 * (v_init + kernels.checkpoints(T, dtype))
    assert count_saved_bytes(lambda: run(launcher, case)) == expected


@needs_gxx
@pytest.mark.parametrize("T", [4, 17])
def test_norm_saves_the_input_and_numbers_per_channel(launcher, T):
    case = NORM.with_(shape=(T, *NORM.shape[1:]), v_init=False)
    neurons, channels = 3 * 4 * 4 * 4, 4
    expected = 4 * (T + kernels.checkpoints(T, torch.float32)) * neurons
    expected += 2 * 4 + channels * (5 * 4 + 2 * 8)
    assert count_saved_bytes(lambda: run(launcher, case)) == expected


def test_a_float_start_allocates_nothing(launcher):
    """A float for v is an argument of the kernel: no tensor of it is made."""
    x_seq = torch.rand(4, 3, 8)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        launcher.collect(lambda: fire(launcher, x_seq))
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    parameters = 2 * 4
    assert allocated - parameters == x_seq.nbytes + x_seq[0].nbytes  # spikes and last voltage


@needs_gxx
def test_without_any_gradient_nothing_is_saved(launcher):
    spikes, v, _ = fire(launcher, torch.rand(24, 3, 8, 2))
    assert spikes.grad_fn is None and v.grad_fn is None
    assert launcher.cuda.launches == {"forward": 1}


@needs_gxx
@pytest.mark.parametrize("axes", [(0, 1, 3, 2), (0, 3, 2, 1)])
def test_a_dense_layout_is_not_copied(launcher, axes):
    x = torch.rand(4, 3, 8, 2).permute(axes)
    spikes, v, v_seq = fire(launcher, x, store_v_seq=True)
    assert spikes.stride() == x.stride() == v_seq.stride()
    assert v.stride() == x[0].stride()


@needs_gxx
@pytest.mark.parametrize(
    "view", [lambda x: x[:, ::2], lambda x: x.transpose(0, 1), lambda x: x[:, :1].expand(-1, 3, -1)]
)
def test_any_other_layout_is_made_contiguous_once(launcher, view):
    x_seq = view(torch.rand(4, 4, 8))
    with torch.profiler.profile() as profile:
        got = fire(launcher, x_seq, store_v_seq=True)
    copies = [event for event in profile.key_averages() if event.key == "aten::copy_"]
    assert sum(event.count for event in copies) == 1
    expected = reference.multi_step(
        x_seq, 0.0, torch.zeros(()), torch.ones(()), store_v_seq=True, **CASE.options()
    )
    names = ("spike_seq", "v", "v_seq")
    found = (dict(zip(names, outputs, strict=True)) for outputs in (got, expected))
    assert_close(*found, torch.float32)


@needs_gxx
@pytest.mark.parametrize("norm", [None, "fixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("v_reset", [0.0, 0.25, None])
def test_infinities_and_nan(launcher, v_reset, dtype, norm):
    channels, detach_reset = None if norm else 5, dtype == torch.float16
    case = Case(v_reset, detach_reset, True, channels, dtype, (6, 40, 5), norm=norm)
    assert_not_finite_alike(launcher.cuda.multi_step, reference.multi_step, case)


@needs_gxx
def test_one_parameter_may_be_per_layer_and_the_other_per_channel(launcher):
    leaves = tensors(CASE)
    leaves["v_threshold"] = torch.linspace(0.6, 1.3, 8).requires_grad_()
    got = run(launcher, CASE, leaves)
    assert_close(got, results(reference.multi_step, CASE, leaves), torch.float32, scale=200)


@pytest.mark.parametrize("shape", [(4, 0, 8), (4, 3, 0)])
def test_no_neurons_no_launch(launcher, shape):
    got = run(launcher, CASE.with_(shape=shape))
    assert got["grad_w"] == 0 and not launcher.cuda.launches


# ---- the grid ----


def grid(shape, channels=1, vec=4, aligned=True, capacity=64, order=None, resident=None):
    x_seq = torch.zeros(shape)
    return kernels.grid(
        *(x_seq.permute(order) if order else x_seq, channels, vec, aligned, capacity),
        lambda vec, lanes: resident or capacity,
    )


@pytest.mark.parametrize("capacity", [1, 7, 64, 10**6])
@pytest.mark.parametrize(
    ("shape", "channels", "order"),
    [
        ((2, 3, 8), 1, None),
        ((2, 3, 8), 8, None),
        ((2, 5, 3), 3, None),
        ((2, 4, 6, 8), 6, None),
        ((2, 4, 6, 7), 6, None),
        ((2, 4, 3, 8), 8, (0, 1, 3, 2)),
        ((2, 1, 1, 1), 1, None),
    ],
)
def test_grid_takes_every_neuron_once_and_keeps_threads_in_their_channel(
    shape, channels, order, capacity
):
    g = grid(shape, channels, capacity=capacity, order=order)
    seen = []
    for thread in range(g.threads):
        own = set()
        for at in range(thread * g.vec, g.size, g.threads * g.vec):
            seen += range(at, at + g.vec)
            own.add(tuple((at + i) // g.inner % g.channels for i in range(g.vec)))
        assert len(own) == 1
        assert g.lanes == g.vec or len(set(*own)) == 1
    assert sorted(seen) == list(range(g.size))
    assert (g.blocks - 1) * BLOCK < g.threads <= g.blocks * BLOCK


@pytest.mark.parametrize(
    ("arguments", "vec", "lanes"),
    [
        ({"shape": (2, 64, 8)}, 4, 1),
        ({"shape": (2, 64, 8), "aligned": False}, 1, 1),
        ({"shape": (2, 63, 2)}, 2, 1),
        ({"shape": (2, 64, 8), "channels": 8}, 4, 4),
        ({"shape": (2, 64, 6), "channels": 6}, 2, 2),
        ({"shape": (2, 64, 3, 4), "channels": 3}, 4, 1),
        ({"shape": (2, 64, 3, 2), "channels": 3}, 2, 1),
        # What runs at a time does not count here, but how many threads the GPU could hold.
        ({"shape": (2, 64, 8), "resident": 8}, 4, 1),
        # One neuron per thread while the GPU would otherwise be half idle.
        ({"shape": (2, 8, 8), "capacity": 256}, 1, 1),
        ({"shape": (2, 8, 8), "capacity": 64}, 4, 1),
    ],
)
def test_grid_chooses_the_neurons_per_thread(arguments, vec, lanes):
    assert grid(**arguments)[3:5] == (vec, lanes)


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ({"shape": (2, 64, 8), "resident": 50}, 50),  # as many threads as run at a time
        ({"shape": (2, 10, 8), "resident": 50}, 20),
        # A period of 48 packs: one row of 64 threads would leave a quarter of them idle throughout.
        ({"shape": (2, 64, 24, 8), "channels": 24, "resident": 64}, 4),
        ({"shape": (2, 64, 24, 8), "channels": 24, "resident": 20}, 1),
    ],
)
def test_grid_has_as_many_threads_as_run_at_a_time(arguments, rows):
    assert grid(**arguments).rows == rows


def test_is_aligned_refuses_a_slice_that_starts_between_16_bytes():
    x_seq = torch.zeros(1 + 2 * 64)[1:].view(2, 64)
    assert not kernels.is_aligned(x_seq) and kernels.is_aligned(torch.zeros(64), None)


def test_grid_has_positions_beyond_32_bits():
    """Sizes reach the kernel as Python ints, which CuPy passes in 64 bits."""
    x_seq = torch.empty(1, device="meta").expand(2, 2**32)
    g = kernels.grid(x_seq, 1, 4, True, 2**17, lambda *_: 2**17)
    assert g.size == 2**32 and type(g.size) is int and g.vec == 4


# ---- what is refused ----


def load_with(host, monkeypatch, nvrtc, *capabilities):
    """Import ``cuda.py`` with this version of NVRTC and GPUs of these compute capabilities."""
    cupy = host.make_cupy()
    cupy.cuda.nvrtc.getVersion = lambda: nvrtc
    oldest = (75,) if nvrtc >= (13, 0) else (50, 60, 61, 70, 75)
    known = (*oldest, 80, 86, 89, 90, 100, *((103,) if nvrtc > (12, 8) else ()), 120)
    cupy.cuda.nvrtc.getSupportedArchs = lambda: known
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    return host.load_cuda(cupy)


@pytest.mark.parametrize("nvrtc", [(13, 1), (13, 2), (13, 3)])
@pytest.mark.parametrize("capability", [(10, 0), (10, 3), (12, 0), (12, 1)])
def test_import_refuses_a_compiler_that_is_not_trusted(host, monkeypatch, nvrtc, capability):
    with pytest.raises(ImportError, match=r"--target ~/nvrtc 'nvidia-cuda-nvrtc==13\.4"):
        load_with(host, monkeypatch, nvrtc, (9, 0), capability)
    assert load_with(host, monkeypatch, nvrtc, (9, 0), (8, 6)).nvrtc_version == nvrtc
    for trusted in ((12, 9), (13, 0), (13, 4)):
        assert load_with(host, monkeypatch, trusted, capability).nvrtc_version == trusted


@pytest.mark.parametrize(
    ("nvrtc", "capability"),
    [
        *(((13, 0), old) for old in ((5, 0), (6, 0), (6, 1), (7, 0))),
        ((12, 8), (10, 3)),  # between two that it knows
        *((nvrtc, (13, 0)) for nvrtc in ((12, 8), (13, 0))),  # its newest does not run there
    ],
)
def test_import_refuses_gpus_that_the_compiler_does_not_know(host, monkeypatch, nvrtc, capability):
    version, gpu = ("{}.{}".format(*pair) for pair in (nvrtc, capability))
    with pytest.raises(ImportError, match=f"NVRTC {version} cannot compile for .*ability {gpu}: "):
        load_with(host, monkeypatch, nvrtc, capability)
    load_with(host, monkeypatch, nvrtc, capability, (8, 0))  # torch runs on the second alone
    load_with(host, monkeypatch, (12, 8), (12, 1))  # runs what is compiled for 12.0
    load_with(host, monkeypatch, (12, 8), (6, 0))
    load_with(host, monkeypatch, nvrtc)


def test_import_fails_where_kernels_would(host, monkeypatch):
    cupy = host.make_cupy()
    cupy.cuda.Stream = SimpleNamespace()  # as before CuPy 14
    with pytest.raises(AttributeError, match="from_external"):
        host.load_cuda(cupy)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(ImportError, match="ROCm"):
        host.load_cuda(cupy)


def test_unsupported_says_why_not(launcher):
    unsupported = launcher.cuda.unsupported
    assert "on cpu" in unsupported(torch.zeros(2, 3), surrogate.ATan())

    class OnCuda:
        device = torch.device("cuda:0")
        dtype = torch.float64

    assert "torch.float64" in unsupported(OnCuda, surrogate.ATan())
    OnCuda.dtype = torch.float16
    assert "spiking=False" in unsupported(OnCuda, surrogate.ATan(spiking=False))
    assert unsupported(OnCuda, surrogate.ATan()) is None


def test_function_shows_the_compilers_log(launcher, monkeypatch):
    def fail(name):
        raise CompileError("kernels.cu(7): error: expected a ';'")

    module = SimpleNamespace(get_function=fail)
    monkeypatch.setattr(launcher.cuda.cupy, "RawModule", lambda **_: module)
    with pytest.raises(RuntimeError, match=r"(?s)alif_forward.*expected a ';'") as info:
        launcher.cuda._function(0, "alif_forward<...>")
    assert isinstance(info.value.__cause__, CompileError)


def test_function_is_not_loaded_while_a_graph_is_captured(launcher, monkeypatch):
    function, captured = launcher.cuda._function, [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured[0])
    with pytest.raises(RuntimeError, match="run one training step before capturing"):
        function(0, "alif_forward<1>")
    captured[0] = False
    loaded = function(0, "alif_forward<1>")  # an error is not kept
    captured[0] = True
    assert function(0, "alif_forward<1>") is loaded


# ---- torch.compile ----


@needs_gxx
def test_operators_pass_opcheck(launcher):
    on_cpu = autograd.register("cupy_on_host", "CPU", launcher.cuda.ENGINE)
    case = CASE.with_(shape=(24, 3, 8, 2), channels=8)
    x_seq, v0, w, threshold = (leaf.detach() for leaf in tensors(case).values())
    forward_arguments = (x_seq, v0, 0.0, w, threshold, True, None, True, 2)
    torch.library.opcheck(on_cpu.forward, forward_arguments)
    spikes, v, v_seq, checkpoint, *_ = on_cpu.forward(*forward_arguments)
    gradients = (torch.rand_like(spikes), torch.rand_like(v), torch.rand_like(v_seq))
    rest = (True, None, False, "ATan", 1.0, 3.14, True, True, True, True)
    torch.library.opcheck(
        on_cpu.backward, (*gradients, x_seq, v0, 0.0, w, threshold, checkpoint, *rest)
    )
