"""The cupy backend on a GPU: all that the build for the host cannot show."""

from functools import partial

import pytest
import torch
from torch import nn

from sj_taid import ALIFNode
from sj_taid.functional import alif_multi_step
from sj_taid.nets.neurons import as_read
from sj_taid.ops import bits
from sj_taid.ops.step import reference
from sj_taid.ops.step.record import Notes
from tests.helpers import (
    Case,
    assert_close,
    assert_counts_at_their_edges,
    assert_equal,
    assert_spikes_at_their_edges,
    results,
    tensors,
)
from tests.ops.step.conformance import (
    COMPACT,
    COUNT_OPTIONS,
    compare,
    make_case,
    pairwise,
    use_large_kernels,
)
from tests.ops.step.test_neurons import MAKERS
from tests.ops.step.test_neurons import ROWS as NEURON_ROWS
from tests.ops.step.test_neurons import check as check_neuron

pytestmark = pytest.mark.gpu

CASE = Case(shape=(8, 16, 32, 6))
on_gpu = partial(alif_multi_step, backend="cupy")


@pytest.fixture
def cuda():
    from sj_taid.ops.step import cuda

    cuda.launches.clear()
    return cuda


def assert_gives(got, case, leaves, multi_step=reference.multi_step):
    assert_close(got, results(multi_step, case, leaves), case, leaves)


def check(case, leaves):
    assert_gives(results(on_gpu, case, leaves), case, leaves)


ROWS = [*pairwise(COMPACT), *pairwise(COUNT_OPTIONS)]
#: that no LIF is: of one to three states, some that learn; the installed version may lack one
OTHERS = [
    name
    for name in ("KLIFNode", "QIFNode", "ComplementaryLIFNode", "IzhikevichNode", "ThreeStates")
    if name in MAKERS
]


@pytest.mark.conforms
@pytest.mark.parametrize("case", [make_case(row) for row in ROWS], ids=str)
def test_conforms(cuda, case):
    with use_large_kernels(cuda):
        assert not compare(case, cuda.multi_step, "cuda", cuda.launches)


@pytest.mark.conforms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_other_neurons(cuda, name, dtype):
    who, _ = as_read(MAKERS[name]())
    with use_large_kernels(cuda):
        for row in NEURON_ROWS[OTHERS.index(name) :: 5]:
            reading = who.read(row["shape"], Notes())
            check_neuron(cuda.ENGINE, who, row | {"dtype": dtype}, reading, "cuda")
    assert cuda.launches["neuron_forward"] and cuda.launches["neuron_backward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_length(dtype):
    for T in range(1, 129):
        case = CASE.with_(shape=(T, 4, 8, 4), dtype=dtype)
        # By the torch loop in float32: the same spikes bit for bit, near the threshold too.
        check(case, tensors(case, "cuda"))


def test_equals_the_torch_loop_bit_for_bit():
    case = CASE.with_(shape=(8, 100003, 8))
    leaves = {name: t.detach() for name, t in tensors(case, "cuda").items()}
    arguments = (leaves["x"], leaves["v0"], leaves["w"], leaves["v_threshold"])
    got = on_gpu(*arguments, store_v_seq=True, **case.options())
    expected = reference.multi_step(*arguments, store_v_seq=True, **case.options())
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.conforms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v_reset", [0.0, -0.25, None])
def test_at_the_threshold_and_next_to_it(v_reset, dtype):
    edges = {"device": "cuda", "dtype": dtype, "v_reset": v_reset}
    assert_spikes_at_their_edges(on_gpu, reference.multi_step, **edges)
    if v_reset is None:
        assert_counts_at_their_edges(on_gpu, reference.multi_step, **edges)


def test_on_a_side_stream():
    """The work is queued behind what the side stream is still busy with."""
    leaves = tensors(CASE, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = {name: torch.full_like(t, torch.nan) for name, t in leaves.items()}
        torch.cuda._sleep(100_000_000)
        late = {n: late[n].copy_(t.detach()).requires_grad_() for n, t in leaves.items()}
        got = results(on_gpu, CASE, late)
    torch.cuda.current_stream().wait_stream(stream)
    assert_gives(got, CASE, leaves)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_second_device_while_the_first_is_current():
    with torch.cuda.device(0):
        check(CASE, tensors(CASE, "cuda:1"))


def test_cuda_graph_replays_with_current_parameters():
    leaves = tensors(CASE, "cuda")
    x_seq, w, threshold = (leaves[n] for n in ("x", "w", "v_threshold"))

    def step():
        spikes, *_ = on_gpu(x_seq, 0.0, w, threshold, **CASE.options())
        return (spikes.detach(), *torch.autograd.grad(spikes.sum(), (x_seq, w, threshold)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles and loads
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x_seq.copy_(torch.randn_like(x_seq))
        w.add_(0.3)
        threshold.mul_(0.8)
    graph.replay()
    expected = step()
    assert all(torch.equal(c, e) for c, e in zip(captured, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast(cuda, dtype):
    net = nn.Sequential(
        nn.Linear(16, 32), ALIFNode(step_mode="m", backend="cupy"), nn.Linear(32, 4)
    ).cuda()
    with torch.autocast("cuda", dtype):
        out = net(torch.randn(8, 4, 16, device="cuda"))
    assert out.dtype == dtype and net[1].v.dtype == torch.float32
    out.float().square().sum().backward()
    assert net[1].w.grad.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert cuda.launches == {"neuron_forward": 1, "neuron_backward": 1, "parameter_gradients": 1}


@pytest.mark.parametrize("T", [4, 24])
def test_compiles_without_graph_breaks(T):
    case = CASE.with_(shape=(T, 4, 8, 4))
    leaves = tensors(case, "cuda")
    compiled = torch.compile(on_gpu, fullgraph=True)
    assert_gives(results(compiled, case, leaves), case, leaves, on_gpu)


@pytest.mark.parametrize("channels", [None, 32])
def test_same_numbers_in_two_runs(channels):
    case = CASE.with_(shape=(8, 256, 32, 49), channels=channels)
    leaves = tensors(case, "cuda")
    assert_equal(results(on_gpu, case, leaves), results(on_gpu, case, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bits_are_packed_and_unpacked(cuda, dtype):
    spikes = torch.randint(0, 2, (13, 4096), device="cuda").to(dtype)
    packed, back = cuda.ENGINE.pack(spikes), torch.full_like(spikes, 7.0)
    cuda.ENGINE.unpack_into(packed, back)
    assert torch.equal(packed, bits.pack(spikes)) and torch.equal(back, spikes)


def test_more_than_2_to_the_31_elements():
    T, neurons = 4, 2**29 + 64
    needed = T * neurons * 2 * 2 + neurons * 4
    free, _ = torch.cuda.mem_get_info()
    if free < 1.2 * needed:
        pytest.skip(f"needs {1.2 * needed / 2**30:.0f} GiB free, there are {free / 2**30:.0f}")
    x_seq = torch.zeros(T, neurons, dtype=torch.float16, device="cuda")
    x_seq[:, -64:] = 4.0
    w, threshold = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
    spikes, v, _ = on_gpu(x_seq, 0.0, w, threshold)
    assert spikes[:, -64:].all() and spikes.count_nonzero() == T * 64
    assert v.count_nonzero() == 0


def test_cupy_passes_an_address_as_it_is(cuda):
    """As the host's stand-in does; CuPy 13 passed that of the Python number."""
    assert cuda._Address(2**40 + 8).ptr == 2**40 + 8


def test_auto_takes_the_kernels(cuda):
    alif_multi_step(torch.randn(4, 8, device="cuda"), 0.0, *torch.ones(2, device="cuda"))
    assert cuda.launches == {"neuron_forward": 1}
