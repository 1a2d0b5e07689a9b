"""The fused CPU loops against the definition: spikes and voltages equal, every gradient by name."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from spikingjelly.activation_based import surrogate

from sj_taid.ops import backends
from sj_taid.ops.step import compiled, reference
from sj_taid.ops.surrogate import MultiLevelSpikeCount
from tests.helpers import (
    Case,
    assert_close,
    assert_equal,
    default_dtype,
    norm_of,
    results,
    tensors,
)
from tests.ops.step.conformance import (
    COUNT_OPTIONS,
    OPTIONS,
    compare,
    make_case,
    make_reading,
    pairwise,
)
from tests.ops.step.norm import with_norm

pytest.importorskip("numba", reason="needs numba: pip install numba")
import numba

from sj_taid.ops.step import cpu
from sj_taid.ops.step.cpu import loops, threads

FLOATS = cpu.operators.DTYPES
# Two parts at least, and cheap: with GRAIN lowered to 1 it is worth any number of threads.
WIDE = Case(shape=(2, 9001, 3), channels=3)


@pytest.fixture
def eager_threads(monkeypatch):
    """Threads even for little work."""
    monkeypatch.setattr(threads, "GRAIN", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_conforms(case, leaves=None):
    leaves = leaves or tensors(case)
    got, expected = (results(f, case, leaves) for f in (cpu.multi_step, reference.multi_step))
    assert_close(got, expected, case, leaves)
    for name in {"v", "v_seq"} & expected.keys():
        assert torch.equal(got[name], expected[name]), name


# One surrogate, since numba compiles each again.
SOME = OPTIONS | {"surrogate": ("ATan",), "dtype": FLOATS}
ROWS = [*pairwise(SOME), *pairwise(COUNT_OPTIONS | {"dtype": FLOATS})]


@pytest.mark.conforms
@pytest.mark.parametrize("case", [make_case(row) for row in ROWS], ids=str)
def test_conforms(case):
    assert not compare(case, cpu.multi_step)


LAYOUTS = {
    "channels_last": lambda x: x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    "neurons_transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "time_inside": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "slice": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "every_other_step": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded_over_time": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [None, 5], ids=["scalar", "channels"])
def test_layouts(layout, channels):
    case = Case(shape=(4, 3, 5, 7, 3), channels=channels, v_reset=None)
    leaves = tensors(case)
    leaves["x"] = LAYOUTS[layout](leaves["x"].detach()).requires_grad_()
    assert_conforms(case, leaves)
    if layout in ("channels_last", "neurons_transposed"):  # dense ones are not copied
        got = results(cpu.multi_step, case, leaves)
        assert all(got[n].stride() == leaves["x"].stride() for n in ("spike_seq", "grad_x"))


def run(leaves, case=Case(), multi_step=cpu.multi_step):
    if case.norm:
        multi_step = with_norm(multi_step, norm_of(case, leaves))
    operands = (leaves[name] for name in ("x", "v0", "w", "v_threshold"))
    return multi_step(*operands, store_v_seq=True, **case.options())


@pytest.mark.parametrize("name", ["x", "v0", "w", "weight"])
@pytest.mark.parametrize("reduce", [torch.sum, torch.norm])
def test_second_derivatives_are_refused(name, reduce):
    """Whether or not the incoming gradient depends on the leaf."""
    case = Case(through=("spike_seq",), norm="batch" if name == "weight" else None)
    leaves = {key: leaf.requires_grad_(key == name) for key, leaf in tensors(case).items()}
    spikes = run(leaves, case)[0]
    (once,) = torch.autograd.grad(reduce(spikes), leaves[name], retain_graph=True)
    (grad,) = torch.autograd.grad(reduce(spikes), leaves[name], create_graph=True)
    assert torch.equal(grad, once)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*use backend='torch'"):
        grad.sum().backward()


#: ways to the gradients of a batch of gradients
BATCHED = {
    "is_grads_batched": lambda y, leaves, grads: torch.autograd.grad(
        y, leaves, grads, is_grads_batched=True, retain_graph=True
    ),
    "torch.func.vmap over the last axis": lambda y, leaves, grads: torch.func.vmap(
        lambda grad: torch.autograd.grad(y, leaves, grad, retain_graph=True), -1
    )(grads.movedim(0, -1)),
}


@pytest.mark.parametrize("how", BATCHED)
@pytest.mark.parametrize("case", [Case(axes=(0, 2, 1)), Case(channels=5, norm="batch")])
def test_gradients_in_batches_are_those_one_by_one(case, how):
    leaves = {key: leaf.requires_grad_() for key, leaf in tensors(case).items()}
    for y in run(leaves, case):
        grads = torch.randn(3, *y.shape)
        given = [leaf for leaf in leaves.values() if leaf is not None]
        one_by_one = [torch.autograd.grad(y, given, grad, retain_graph=True) for grad in grads]
        expected = [torch.stack(each) for each in zip(*one_by_one, strict=True)]
        found = BATCHED[how](y, given, grads)
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_transforms_take_the_definition():
    smooth = Case(surrogate_function=surrogate.Sigmoid(spiking=False))  # the loops would fire
    leaves = {name: leaf.detach() for name, leaf in tensors(smooth).items()}

    def gradients(multi_step):
        def loss(x):
            return run(leaves | {"x": x}, smooth, multi_step)[0].square().sum()

        return torch.func.vmap(torch.func.grad(loss))(torch.stack([leaves["x"], -leaves["x"]]))

    found = gradients(cpu.multi_step)
    assert found.any() and torch.equal(found, gradients(reference.multi_step))


@pytest.mark.parametrize("name", ["x", "v0", "w"])
def test_a_change_in_place_before_backward_names_remedies_that_work(name):
    def backward(multi_step, in_place=True):
        leaves = tensors(Case())
        inputs = {**leaves, name: leaves[name] * 1.0}  # like the output of a layer
        spikes = run(inputs, multi_step=multi_step)[0]
        if in_place:
            inputs[name] += 1.0
        else:
            inputs[name] = inputs[name] + 1.0
        (spikes.sum() + inputs[name].sum()).backward()
        return {key: leaf.grad for key, leaf in leaves.items()}

    with pytest.raises(RuntimeError, match=r"in place.*h = h \+ o.*backend='torch'") as info:
        backward(cpu.multi_step)
    assert "inplace operation" in str(info.value.__cause__)
    expected = backward(reference.multi_step)
    for key, gradient in backward(cpu.multi_step, in_place=False).items():
        torch.testing.assert_close(gradient, expected[key])


def test_tensors_large_enough_for_huge_pages():
    assert_conforms(Case(shape=(2, 1, threads.HUGE // 4 + 5)))


@pytest.fixture(params=["torch's", "own"])
def team(request, monkeypatch):
    """Both kinds of threads: of torch's OpenMP team, where there is one, and of a pool."""
    if request.param == "own":
        monkeypatch.setattr(threads, "_gomp", lambda: None)
    elif threads._gomp() is None:
        pytest.skip("this torch brings no GNU OpenMP along")


@pytest.mark.usefixtures("eager_threads", "team")
@pytest.mark.parametrize(
    "case",
    [WIDE.with_(channels=None), Case(shape=(3, 50, 40, 7), channels=40, norm="batch")],
    ids=str,
)
def test_threads_change_no_bit(case):
    torch.set_num_threads(1)
    expected = results(cpu.multi_step, case)
    torch.set_num_threads(3)
    assert_equal(results(cpu.multi_step, case), expected)


@pytest.mark.usefixtures("eager_threads", "team")
def test_python_threads_call_at_once():
    cases = [WIDE.with_(seed=seed) for seed in range(4)]
    expected = [results(cpu.multi_step, case) for case in cases]

    def work(case):
        torch.set_num_threads(2)
        return [results(cpu.multi_step, case) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for several, one in zip(pool.map(work, cases), expected, strict=True):
            for result in several:
                assert_equal(result, one)


def run_forked(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(timeout=300)
    process.kill()
    assert process.exitcode == 0


needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")


@pytest.mark.slow
@needs_fork
@pytest.mark.usefixtures("eager_threads", "team")
def test_a_forked_child_makes_its_own_threads():
    torch.set_num_threads(2)
    leaves = {name: leaf.detach() for name, leaf in tensors(WIDE).items()}
    expected = run(leaves, WIDE)[0]
    pool = threads._pool()
    assert pool._threads or threads._gomp(), "the parent used its threads"

    def child():
        assert threads._pool() is not pool
        # numpy compares: torch's own threads do not survive a fork
        assert (run(leaves, WIDE)[0].numpy() == expected.numpy()).all()

    run_forked(child)


COMPILED = [
    WIDE.with_(dtype=torch.bfloat16, v_reset=None),
    Case(None, surrogate_function=MultiLevelSpikeCount(4), stateless=True),
]


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_the_operator_of_a_compiled_graph(case):
    """Schema, no aliasing, gradients, and fake outputs of the right shapes, dtypes and strides."""
    leaves = tensors(case)
    parameters = [leaves[n] for n in ("w", "v_threshold") if not (n == "w" and case.stateless)]
    key = compiled.key_of(make_reading(case))
    for states, store_v_seq in (([leaves["v0"]], True), ([], False)):
        about = [bool(states)], [0.0], parameters, key, store_v_seq
        torch.library.opcheck(torch.ops.sj_taid.neuron, (leaves["x"], states, *about))


@pytest.mark.parametrize(
    ("dtype", "device", "reason"),
    [
        (torch.float16, "cpu", "float16, expected one of.*convert it"),
        (torch.float32, "meta", "on meta"),
    ],
)
def test_what_it_cannot_take_is_refused_with_the_reason(dtype, device, reason):
    x = torch.zeros(2, 3, dtype=dtype, device=device)
    with pytest.raises(backends.BackendUnavailableError, match=reason):
        backends.resolve("numba", x)


@pytest.mark.filterwarnings("error")
def test_auto_takes_the_loops_but_for_float64():
    for dtype, taken in ((torch.float32, cpu), (torch.float64, reference)):
        x = torch.zeros(2, 3, dtype=dtype)
        backend = backends.resolve("auto", x)
        assert backend.multi_step is taken.multi_step


@pytest.mark.slow
def test_auto_runs_where_numba_cannot_compile():
    use = "import torch, sj_taid; sj_taid.ALIFNode(step_mode='m')(torch.rand(4, 2, 3))"
    script = [sys.executable, "-c", use]
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    run = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and "NUMBA_DISABLE_JIT is set" in run.stderr, run.stderr


def test_loops_compile_where_numba_finds_no_folder(monkeypatch):
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    with pytest.warns(RuntimeWarning, match="compile again in every process"):
        compiled = loops.compile_function.__wrapped__(loops.move_bits)
    assert compiled.address and not compiled.cache_hits


def test_scratch_memory_does_not_follow_the_default_dtype():
    """A half default dtype once gave the kernels half the memory they write."""
    case = Case(shape=(16, 4, 25_000))
    expected = results(cpu.multi_step, case)
    with default_dtype(torch.bfloat16):
        assert_equal(results(cpu.multi_step, case), expected)
