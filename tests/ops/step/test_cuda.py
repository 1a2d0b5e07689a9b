"""The launcher's logic, with the driver's calls replaced: see host.py."""

import copy
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sj_taid
from sj_taid.ops import backends
from sj_taid.ops.step import compiled, kernels
from sj_taid.ops.step.plan import ENGINES
from tests.helpers import Case, assert_equal, results, tensors
from tests.ops.step.conformance import make_reading, make_spec
from tests.ops.step.host import CompileError, needs_gxx, shifted

pytestmark = needs_gxx

CASE = Case(shape=(4, 3, 8, 2))
NORM = Case(shape=(4, 3, 4, 4, 4), norm="batch")


def plan_of(launcher, case):
    """The plan of a case, and its operands."""
    leaves = {name: leaf.detach() for name, leaf in tensors(case).items()}
    spec, parameters = make_spec(case), [leaves["w"], leaves["v_threshold"]]
    norm = [None] * 4
    if case.norm:
        mean = torch.linspace(-0.3, 0.9, case.shape[2])
        norm = [mean, 1 / (1 + mean), leaves["weight"], leaves["bias"]]
    return launcher.cuda.ENGINE.plan(spec), (leaves["x"], leaves["v0"], *parameters, *norm)


def run(launcher, case=CASE, leaves=None):
    return results(launcher.cuda.multi_step, case, leaves or tensors(case))


# ---- what is launched ----


@pytest.mark.parametrize("case", [CASE, NORM], ids=str)
def test_torch_computes_of_parameters_alone(launcher, case):
    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if not function.overloadpacket.__name__.startswith("empty"):
                sizes.append(result.numel())
            return result

    sizes, (plan, operands) = [], plan_of(launcher, case)
    for _ in range(2):  # the first prepares
        sizes.clear()
        with Operators():
            outputs = plan.forward((0.0,), *operands)
            plan.backward((True,) * 4 + (case.norm is not None,), (0.0,), outputs[:4], operands)
    assert max(sizes) == 1 and len(sizes) <= 10


@pytest.mark.parametrize("kind", [neuron.ParametricLIFNode, neuron.IzhikevichNode])
def test_an_accelerated_net_takes_the_kernels(launcher, monkeypatch, kind):
    cuda = launcher.cuda
    backend = backends.Backend(cuda.multi_step, lambda x_seq: None, cuda.ENGINE)
    monkeypatch.setitem(backends.BACKENDS, "numba", lambda: backend)  # for tensors on the CPU
    monkeypatch.setattr(backends, "engine_of", lambda device: cuda.ENGINE)
    plain = nn.Sequential(layer.BatchNorm2d(3), kind(), layer.Conv2d(3, 2, 3))
    functional.set_step_mode(plain, "m")
    accelerated, found = copy.deepcopy(plain), []
    sj_taid.accelerate(accelerated)
    x_seq = torch.randn(4, 2, 3, 6, 6, requires_grad=True)
    for net in (plain, accelerated):
        net(x_seq).square().sum().backward()
        found.append([*net.buffers(), *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    learns = {"parameter_gradients": 1} if [*plain[1].parameters()] else {}
    of_norm = {"neuron_forward": 1, "neuron_backward": 2, "norm_gradients": 1}
    assert cuda.launches == of_norm | learns | {"unpack": 1}


READ = ("x", "v0", "grad_spikes", "grad_v", "grad_v_seq", "checkpoint")  # in wide words


@pytest.mark.parametrize("which", READ)
def test_a_tensor_that_starts_between_16_bytes_has_the_same_results(launcher, which):
    check_starts(launcher, which)


def check_starts(host, which):
    """Found at the call, by the addresses: a plan knows of none."""
    case = NORM.with_(dtype=torch.float16)
    if which == "checkpoint":  # of long sequences; with v_seq's gradient a thread has one neuron
        case = case.with_(shape=(24, *NORM.shape[1:]), through=("spike_seq",))
    plan, (x, v0, *others) = plan_of(host, case)
    values = dict(zip(READ, (x, v0, *plan.forward((0.0,), x, v0, *others)[:4]), strict=True))
    found = []
    of_one_neuron = {"neuron_backward", *(["neuron_forward"] if which in ("x", "v0") else [])}
    for moved, expected in ((None, set()), (which, of_one_neuron)):
        host.launches.clear()
        x, v0, *given = (shifted(t) if name == moved else t for name, t in values.items())
        outputs = plan.forward((0.0,), x, v0, *others)
        outputs += plan.backward((True,) * 5, (0.0,), given, (x, v0, *others))
        found.append([t for t in outputs if t is not None])
        names = [launch.name for launch in host.launches if "neuron" in launch.name]
        assert {n.partition("<")[0] for n in names if n.split(",")[2] == "1"} == expected
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_values_are_packed_in_words_of_16_bytes_where_they_lie_so(launcher):
    spikes = torch.ones(8, 80, dtype=torch.float16)
    for given, vec in ((spikes, 8), (shifted(spikes), 1), (spikes[:, :3].clone(), 1)):
        launcher.cuda.ENGINE.pack(given)
        assert launcher.launches[-1].name == f"pack<float16,{vec},0>"


@pytest.mark.parametrize("dtype", kernels.SCALARS, ids=str)
def test_packing_reads_up_to_the_last_value(launcher, dtype):
    check_packing(launcher, dtype)


def check_packing(host, dtype=torch.float32):
    for shape, most in (((7, 80), 1), ((13, 3), 1), ((1, 1), 1), ((1, 45), 14), ((4, 80), 14)):
        values = torch.ones(shape, dtype=dtype)
        host.cuda.ENGINE.pack(values, most)
        assert host.launches[-1].read_to == values.data_ptr() + values.nbytes


# ---- where it is launched ----


def test_python_threads_share_a_plan_and_launch_on_their_streams(launcher):
    want = run(launcher, NORM)

    def work(stream):
        launcher.current.stream = stream
        for _ in range(10):
            assert_equal(run(launcher, NORM), want)

    launcher.launches.clear()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    # Backward runs in a thread of torch's.
    streams = [run.stream for run in launcher.launches if run.name.startswith("neuron_forward")]
    assert Counter(streams) == dict.fromkeys(range(4), 10)


def test_a_device_is_made_current_only_where_another_one_is(launcher):
    plan, operands = plan_of(launcher, CASE)
    plan.forward((0.0,), *operands)
    launcher.guarded.clear()
    plan.forward((0.0,), *operands)
    assert launcher.guarded == []
    launcher.current.device = 1  # the tensors' has no index: None
    plan.forward((0.0,), *operands)
    assert launcher.guarded == [None] and launcher.current.device == 1
    assert [launch.device for launch in launcher.launches] == [None] * 3
    launcher.current.device = None


def test_a_function_is_loaded_for_each_device_unfused(launcher, monkeypatch):
    loaded, module = [], launcher.cuda.cupy.RawModule

    def load(**arguments):
        loaded.append(arguments)
        return module(**arguments)

    monkeypatch.setattr(launcher.cuda.cupy, "RawModule", load)
    function = launcher.cuda._function
    assert function(0, "a") is function(0, "a") is not function(1, "a") is not function(1, "b")
    assert [arguments["name_expressions"] for arguments in loaded] == [("a",), ("a",), ("b",)]
    assert all("--fmad=false" in arguments["options"] for arguments in loaded)


# ---- what is saved, computed and copied ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("T", "v_init", "norm"), [(4, False, None), (16, True, "batch"), (24, True, None)]
)
def test_forward_saves_the_input_the_parameters_and_checkpoints(launcher, T, v_init, norm, dtype):
    case = NORM.with_(shape=(T, *NORM.shape[1:]), dtype=dtype, v_init=v_init, norm=norm)
    neurons, channels = 3 * 4 * 4 * 4, 4
    expected = T * neurons * dtype.itemsize + 2 * 4  # x, w, v_threshold
    expected += neurons * 4 * (v_init + kernels.checkpoints(T, dtype))
    expected += 4 * channels * 4 if norm else 0
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(launcher, case)
    assert sum(t.nbytes for t in saved) == expected


# ---- the grid ----


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
    ],
)
def test_grid_takes_every_neuron_once_and_keeps_threads_in_their_channel(
    shape, channels, order, capacity
):
    x_seq = torch.zeros(shape).permute(order or [*range(len(shape))])
    about = x_seq[0].numel(), x_seq.stride(2), channels
    g = kernels.grid(*about, 4, True, capacity, lambda vec, lanes: capacity)
    seen, (_, run, _) = [], g.partials
    for thread in range(g.threads):
        own = set()
        for at in range(thread * g.vec, g.size, g.threads * g.vec):
            seen += range(at, at + g.vec)
            own.add(tuple((at + i) // g.inner % g.channels for i in range(g.vec)))
        assert len(own) == 1
        assert g.lanes == g.vec or len(set(*own)) == 1
        slots = range(thread * g.lanes, (thread + 1) * g.lanes)  # of its sums
        assert tuple(slot // run % channels for slot in slots) == next(iter(own))[: g.lanes]
    assert sorted(seen) == list(range(g.size)) and math.prod(g.partials) == g.threads * g.lanes


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


@pytest.mark.parametrize("nvrtc", [(13, 1), (13, 3)])
def test_import_refuses_a_compiler_that_is_not_trusted(host, monkeypatch, nvrtc):
    with pytest.raises(ImportError, match=r"--target ~/nvrtc 'nvidia-cuda-nvrtc==13\.4"):
        load_with(host, monkeypatch, nvrtc, (9, 0), (12, 0))
    assert load_with(host, monkeypatch, nvrtc, (9, 0), (8, 6)).nvrtc_version == nvrtc
    for trusted in ((13, 0), (13, 4)):
        load_with(host, monkeypatch, trusted, (12, 0))


@pytest.mark.parametrize(
    ("nvrtc", "capability"),
    [
        ((13, 0), (7, 0)),
        ((12, 8), (10, 3)),  # between two that it knows
        ((13, 0), (13, 0)),  # its newest does not run there
    ],
)
def test_import_refuses_gpus_that_the_compiler_does_not_know(host, monkeypatch, nvrtc, capability):
    version, gpu = ("{}.{}".format(*pair) for pair in (nvrtc, capability))
    with pytest.raises(ImportError, match=f"NVRTC {version} cannot compile for .*ability {gpu}: "):
        load_with(host, monkeypatch, nvrtc, capability)
    load_with(host, monkeypatch, nvrtc, capability, (8, 0))  # torch runs on the second alone
    load_with(host, monkeypatch, (12, 8), (12, 1))  # runs what is compiled for 12.0
    load_with(host, monkeypatch, nvrtc)


def test_import_fails_where_kernels_would(host, monkeypatch):
    cupy = host.make_cupy()
    # That of CuPy 13 shows Python nothing of what it holds.
    cupy.cuda.function, cupy.__version__ = SimpleNamespace(CPointer=object), "13.6.0"
    with pytest.raises(ImportError, match=r"older than 14: expected 14.2 or later, found 13\.6\.0"):
        host.load_cuda(cupy)
    cupy.cuda.function = SimpleNamespace()
    with pytest.raises(AttributeError, match="CPointer"):
        host.load_cuda(cupy)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(ImportError, match="ROCm"):
        host.load_cuda(cupy)


def test_function_shows_the_compilers_log(launcher, monkeypatch):
    def fail(name):
        raise CompileError("kernels.cu(7): error: expected a ';'")

    module = SimpleNamespace(get_function=fail)
    monkeypatch.setattr(launcher.cuda.cupy, "RawModule", lambda **_: module)
    with pytest.raises(RuntimeError, match=r"(?s)neuron_forward.*expected a ';'") as info:
        launcher.cuda._function(0, "neuron_forward<...>")
    assert isinstance(info.value.__cause__, CompileError)


def test_function_is_not_loaded_while_a_graph_is_captured(launcher, monkeypatch):
    function, captured = launcher.cuda._function, [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured[0])
    with pytest.raises(RuntimeError, match="run one training step before capturing"):
        function(0, "neuron_forward<1>")
    captured[0] = False
    loaded = function(0, "neuron_forward<1>")  # an error is not kept
    captured[0] = True
    assert function(0, "neuron_forward<1>") is loaded


# ---- torch.compile ----


def test_the_operator_of_a_compiled_graph_makes_checkpoints_again(launcher, monkeypatch):
    monkeypatch.setitem(ENGINES, "cpu", launcher.cuda.ENGINE)
    case = CASE.with_(shape=(24, 3, 8, 2))

    key = compiled.key_of(make_reading(case))

    def operator(x_seq, v, w, v_threshold, store_v_seq, **options):
        return compiled.run(x_seq, [v], (0.0,), (w, v_threshold), key, store_v_seq)

    assert_equal(results(operator, case), run(launcher, case))
    assert launcher.cuda.launches["neuron_forward"] == 3  # two of the operator
