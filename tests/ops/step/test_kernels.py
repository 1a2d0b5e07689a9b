"""The kernels' own text, compiled as C++, against the definition in float64."""

import itertools
import os
import subprocess
import sys
from array import array
from collections import Counter
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from sj_taid.ops.step import kernels, reference
from sj_taid.ops.step.program import MOST_TOTALS
from tests.helpers import assert_spikes_at_their_edges
from tests.ops.step.conformance import (
    COUNT_OPTIONS,
    OPTIONS,
    compare,
    make_case,
    make_spec,
    pairwise,
)
from tests.ops.step.host import GXX, LAUNCHER, Host, needs_gxx
from tests.ops.step.test_cuda import check_packing, check_starts

pytestmark = needs_gxx
needs_ucontext = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no ucontext.h")


@pytest.fixture(autouse=True)
def _poison():
    # PyTorch then fills what it allocates with NaN: a value that a kernel leaves out shows.
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(host, case):
    host.build(host.kernels(case))  # together: faster than singly
    cuda = host.cuda
    assert not compare(case, cuda.multi_step, launches=cuda.launches)


CASES = [make_case(row) for row in (*pairwise(OPTIONS), *pairwise(COUNT_OPTIONS))]


@pytest.fixture(scope="module")
def built(request, host):
    """``host`` with the kernels of all selected cases, compiled together."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    cases = [call.params["case"] for call in calls if call and call.params.get("case") in CASES]
    with host.patched():
        host.build({name for case in cases for name in host.kernels(case)})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pair_of_options(built, launcher, case):
    check(launcher, case)


def combine(options, T):
    """Every combination that compiles to different code at ``T``; some options take turns."""
    turns = ("surrogate", "v_init", "through", "frozen", "norm", "pack")
    cycles = {name: itertools.cycle(options[name]) for name in turns}
    fixed = {name: values for name, values in options.items() if name not in (*turns, "T")}
    for i, values in enumerate(itertools.product(*fixed.values())):
        # Lengths with a common factor would pair the same values every time.
        for name in turns[: 1 + i % len(turns)]:
            next(cycles[name])
        yield dict(zip(fixed, values, strict=True)) | {n: next(c) for n, c in cycles.items()}


@pytest.mark.kernels
@pytest.mark.parametrize("T", OPTIONS["T"])
def test_every_combination(launcher, T):
    cases = [make_case(row | {"T": T}) for row in combine(OPTIONS, T)]
    launcher.build({name for case in cases for name in launcher.kernels(case)})
    failed = {str(case): compare(case, launcher.cuda.multi_step) for case in cases}
    assert not any(failed.values()), {name: found for name, found in failed.items() if found}


def check_sums(host, step=1, rows=99_999, run=1, channels=1):
    """Of small numbers, and of large ones that cancel, but neither in a thread nor in float32."""
    g = torch.Generator().manual_seed(0)
    small = torch.randint(1, 9, (2, channels, rows * run), generator=g)
    large = torch.randint(2**19, 2**20, (2, channels, rows * run // 2), generator=g)
    x = small.clone()
    for i, sign in enumerate((1, -1)):  # neighbours are of two threads
        x[..., i : 2 * large.shape[-1] : 2] += sign * large
    x = x.view(2, channels, rows, run).transpose(1, 2).float().contiguous()
    assert torch.equal(add_up(host, step, x), small.sum(-1).float())
    rounded = torch.rand(x.shape, generator=g)
    assert torch.equal(add_up(host, step, rounded), add_up(host, None, rounded))


def add_up(host, step, x):
    """Sums of ``x`` ``[2, rows, channels, run]``."""
    _, rows, channels, run = x.shape
    spec, name = make_spec(make_case(ROW)), "parameter_gradients<float>"
    sums = torch.full((2, channels), 0.0 if step else torch.nan)
    host = in_turns(host, step) if step else host
    with host.patched():
        first = array("q", range(MOST_TOTALS))
        totals = *sums, *[None] * (MOST_TOTALS - 2)
        host.cuda._prepare_adders(spec, name, (rows, run, channels), first, 2)(x, *totals)
    return sums


@cache
def in_turns(host, step):
    """A host on which a block's threads take turns, and add a sum to what is there: once."""
    line = "to[channel] = "
    assert kernels.source().count(line) == 1

    def edit(source):
        return host.edit(source).replace(line, "to[channel] += ")

    return Host(host.directory, edit, (f"-DSTEP={step}", "-D_XOPEN_SOURCE=700"))


def test_other_launches_are_a_difference(launcher):
    (found,) = compare(make_case(ROW), launcher.cuda.multi_step, launches=Counter())
    assert found.startswith("launches {}, expected {'neuron_forward': 1, 'neuron_backward': 1")


# A case's options or another check, one line of the kernels or of their launcher, and what is put
# in its place: each still trains. The check must notice.
SOFT, HARD = {"v_reset": None}, {"v_reset": -0.25}
NORM, LONG = HARD | {"norm": "batch"}, {"T": 24}
PACK = HARD | {"pack": True}
COUNTS = SOFT | {"surrogate": "counts", "decay_input": False}
TEXT = {"v_reset": None}


def check_edges(host):
    assert_spikes_at_their_edges(host.cuda.multi_step, reference.multi_step)


MUTATIONS = [
    # the step's text, of the gradients and of what forward computes
    (SOFT, "grad[0][i] = ", "grad[0][i] = 0.0f * "),
    (HARD, "v[0][i] = ", "v[0][i] = 0.5f * "),
    (SOFT, "total[0][lane] += ", "total[0][lane] -= "),
    (SOFT, "total[1][lane] += ", "total[1][lane] = "),
    (COUNTS, "= quotient(", "= 0.5f * quotient("),
    (COUNTS, "> 0.0f ? exact : rough", "> 0.0f ? 1.001f * rough : rough"),
    (SOFT, "if (GRAD_V_SEQ) grad_v[0][i] += grad_v_t[i];", ""),
    # the last voltage, segments, channels, the stride over neurons
    (HARD, "    store_states(v, c.v_last, at);", ""),
    (HARD | LONG, "((segment - 1) * STATES + k) * size + at, to[k]", "at, to[k]"),
    (HARD | {"per_channel": True}, "channel = first + i", "channel = first"),
    (HARD | {"per_channel": True}, "channel * c.stride[k]", "0"),
    (HARD | {"layout": "images"}, "at += c.threads * VEC", "at += size"),
    # the norm: backward's input, the channel's numbers, the terms of x's gradient, the gain's
    (NORM, "step_backward<NEEDS>(neuron.input(x, i)", "step_backward<NEEDS>(x"),
    (NORM, "norm.bias ? c.norm.bias[channel]", "norm.bias ? c.norm.mean[channel]"),
    (NORM, "weight ? weight[channel] * rstd[channel]", "weight ? rstd[channel]"),
    (NORM, "ab ? ab[channel] : 0.0f", "0.0f"),
    (NORM, "ab ? ab[c.channels + channel] : 0.0f", "0.0f"),
    (NORM, "fmaf(neuron.gain[lane], grad_y, -coupled)", "grad_y - coupled"),
    (NORM | {"norm": "fixed"}, "neuron.gain[lane] * grad_y", "grad_y"),
    (NORM, "sums.y_x[lane] = fmaf(grad_y, centred,", "sums.y_x[lane] = fmaf(grad_y, centred + 1,"),
    # the norm's gradients, sums over threads, bits
    (NORM, "rstd * sums[1][0]", "sums[1][0]"),
    (NORM, "gain * to_bias / c.count", "0"),
    (NORM, "gain * rstd * to_weight / c.count", "gain * to_weight / c.count"),
    (HARD, "sums[k][thread] += sums[k][thread + half]", ""),
    (HARD | {"per_channel": True}, "blockIdx.x / c.channels", "0"),
    (NORM | {"norm": "fixed"}, "c.first[turn]", "turn"),
    (PACK, "1u << t % 8", "1u"),
    (PACK | {"T": 16}, "bits + byte_here + t / 8 * c.size", "bits + byte_here"),
    (PACK | LONG, "segment * BYTES * size + at", "at"),
    (check_packing, "if (k < own.rows) fetch(", "fetch("),
    # at the threshold; barriers, writes and totals of sums over threads
    (check_edges, " >= 0.0f;", " > 0.0f;"),
    (check_sums, "  __syncthreads();", ""),
    (check_sums, "if (thread == 0) finish(sums);", "finish(sums);"),
    (check_sums, "double", "float"),
    # the launcher: whose grid made the sums, what must start at 16 bytes
    (NORM, "(norm_grid or grid).partials", "grid.partials"),
    (partial(check_starts, which="v0"), "is_aligned(*operands[:first], *upstream)",
     "is_aligned(operands[0], *upstream)"),
    (partial(check_starts, which="grad_v"), "is_aligned(*operands[:first], *upstream)",
     "is_aligned(*operands[:first])"),
]  # fmt: skip
ROW = {option: values[0] for option, values in OPTIONS.items()}
ROW |= {"T": 4, "layout": "features", "decay_input": True, "v_init": True}


def _name(value):
    """An id without addresses, which differ between processes."""
    function = getattr(value, "func", value)
    return getattr(function, "__name__", str(value))[:40]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "line", "broken"), MUTATIONS, ids=_name)
def test_breaking_one_line_turns_conformance_red(launcher, tmp_path, how, line, broken):
    run = how if callable(how) else partial(check, case=make_case(ROW | how))
    run(launcher)
    text, launcher_text = kernels.source_of(make_spec(make_case(ROW | TEXT))), LAUNCHER.read_text()
    counts = kernels.source_of(make_spec(make_case(ROW | COUNTS)))
    assert (line in text + counts) != (line in launcher_text)
    path = tmp_path / LAUNCHER.name
    path.write_text(launcher_text.replace(line, broken))
    host = Host(tmp_path, lambda source: source.replace(line, broken), launcher=path)
    with host.patched(), pytest.raises(AssertionError):
        run(host)


# One thread of a block after another, or each up to the next barrier, the first or the last first.
@pytest.mark.parametrize("step", [None, *(pytest.param(k, marks=needs_ucontext) for k in (1, -1))])
@pytest.mark.parametrize(
    ("rows", "run", "channels"),
    [(0, 1, 4), (1, 1, 1), (7, 3, 5), (600, 1, 4), (2, 513, 3), (99_999, 1, 1)],
)
def test_sums_over_threads_are_exact_and_of_every_thread_once(launcher, step, rows, run, channels):
    check_sums(launcher, step, rows, run, channels)


def test_kernels_take_their_constants_from_python(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "SEGMENT", 4)
    monkeypatch.setattr(kernels, "LONGEST_SWEEP", 8)
    monkeypatch.setattr(kernels, "source", kernels.source.__wrapped__)
    with Host(tmp_path).patched() as host:
        check(host, make_case(ROW | {"T": 13}))


@pytest.mark.kernels
def test_kernels_run_clean_under_sanitizers(tmp_path):
    """In a process that checks every memory access: see sanitized.py."""
    libraries = [
        subprocess.check_output([GXX, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.step.sanitized", tmp_path],
        env=os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert result.stdout.count("clean launches") == 1, result.stdout + result.stderr
    assert "heap-buffer-overflow" in result.stderr
