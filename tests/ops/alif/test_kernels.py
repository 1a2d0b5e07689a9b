"""The kernels' own text, compiled as C++, against the definition in float64."""

import itertools
import os
import subprocess
import sys
from array import array
from collections import Counter
from pathlib import Path

import pytest
import torch

from sj_taid.ops.alif import kernels
from tests.ops.alif.conformance import (
    COUNT_OPTIONS,
    OPTIONS,
    compare,
    make_case,
    make_spec,
    pairwise,
)
from tests.ops.alif.host import GXX, Host, needs_gxx

pytestmark = needs_gxx


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


def test_other_launches_are_a_difference(launcher):
    (found,) = compare(make_case(ROW), launcher.cuda.multi_step, launches=Counter())
    assert found.startswith("launches {}, expected {'alif_forward': 1, 'alif_backward': 1")


# Options of a case, one line of the kernels that it runs, and what is put in its place: each still
# trains. The case must notice.
SOFT, HARD = {"v_reset": None}, {"v_reset": -0.25}
NORM, LONG = HARD | {"norm": "batch"}, {"T": 24}
PACK = HARD | {"pack": True}
COUNTS = SOFT | {"surrogate": "counts", "decay_input": False}
GROWS = {"surrogate": "DeterministicPass", "decay_input": False, "per_channel": True, "T": 24}
GROWS |= {"through": ("v_seq",), "v_reset": -0.25}
MUTATIONS = [
    # gradients of the neuron
    (SOFT | {"detach_reset": True}, "fmaf(taken, grad_v[i],", "fmaf(0, 0,"),
    (HARD, "fmaf(-grad_v[i], lost, gained)", "gained"),
    (HARD, "fmaf(grad_v[i], neuron.v_reset, grad_s)", "grad_s"),
    (HARD, "soft || !fired ? 1.0f : 0.0f", "1.0f"),
    (HARD, "fmaf(-q, grad_h, grad_h)", "grad_h"),
    (SOFT, "if (GRAD_V_SEQ) grad_v[i] += grad_v_t[i];", ""),
    # the same where they grow with every step, beyond half precision's largest number
    (GROWS | {"norm": "batch", "layout": "transposed"}, "v - neuron.v_reset", "v"),
    (GROWS | {"v_reset": 0.0, "layout": "images", "dtype": torch.float16}, "sums.w[i] * dw",
     "sums.w[i] * -dw"),
    # the same of counts
    (COUNTS, "v * (1.0f - q[lane(i)]) + x", "v * q[lane(i)] + x"),
    (COUNTS | {"surrogate": "one"}, "rintf(positive > levels ? levels : positive)",
     "rintf(positive)"),
    (COUNTS, "over < 0.0f ? 0.0f : over", "over"),
    (COUNTS, "h - output(h, i) * v_threshold[lane(i)]", "h"),
    (COUNTS, "through_spike *= neuron.inverse[lane];", ";"),
    (COUNTS, "RESET == COUNTS ? through_spike * over : through_spike", "through_spike"),
    (COUNTS, "-neuron.count(over) :", "0.0f :"),
    # the charge, the last voltage, segments, channels, the stride over neurons
    (HARD, "v + (x - above_reset) * q[lane(i)]", "v + x * q[lane(i)]"),
    (HARD, "    store(v, c.v_last + at);", ""),
    (HARD | LONG, "load(c.checkpoint + (segment - 1) * size + at, v);",
     "load(c.checkpoint + at, v);"),
    (HARD | {"per_channel": True}, "channel = first + i", "channel = first"),
    (HARD | {"layout": "images"}, "at += c.threads * VEC", "at += size"),
    # the norm: backward's input, the channel's numbers, the terms of x's gradient, the gain's
    (NORM, "neuron.charge(neuron.input(to_float(x_t[t].lane[i]), i), v, i)",
     "neuron.charge(to_float(x_t[t].lane[i]), v, i)"),
    (NORM, "norm.bias ? c.norm.bias[channel]", "norm.bias ? c.norm.mean[channel]"),
    (NORM, "weight ? weight[channel] * rstd[channel]", "weight ? rstd[channel]"),
    (NORM, "ab ? ab[channel] : 0.0f", "0.0f"),
    (NORM, "ab ? ab[c.channels + channel] : 0.0f", "0.0f"),
    (NORM, "fmaf(neuron.gain[lane], grad_y, -coupled)", "grad_y - coupled"),
    (NORM | {"norm": "fixed"}, "neuron.gain[lane] * grad_y", "grad_y"),
    (NORM, "sums.h_x[lane] = fmaf(grad_h, centred,", "sums.h_x[lane] = fmaf(grad_h, centred + 1,"),
    (NORM, "put(sums.h[i] * dy);", "put(sums.h[i]);"),
    # the norm's gradients, sums over threads, bits
    (NORM, "rstd * sums[1][0]", "sums[1][0]"),
    (NORM, "gain * to_bias / c.count", "0"),
    (NORM, "gain * rstd * to_weight / c.count", "gain * to_weight / c.count"),
    (HARD, "sums[k][thread] += sums[k][thread + half]", ""),
    (HARD | {"per_channel": True}, "blockIdx.x / c.channels", "0"),
    (NORM | {"norm": "fixed"}, "(c.before + turn)", "turn"),
    (PACK, "1u << t % 8", "1u"),
    (PACK | {"T": 16}, "bits + byte_here + t / 8 * c.size", "bits + byte_here"),
    (PACK | LONG, "segment * BYTES * size + at", "at"),
]  # fmt: skip
ROW = {option: values[0] for option, values in OPTIONS.items()}
ROW |= {"T": 4, "layout": "features", "decay_input": True, "v_init": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "line", "broken"), MUTATIONS, ids=lambda value: str(value)[:40]
)
def test_breaking_one_line_turns_conformance_red(launcher, tmp_path, options, line, broken):
    check(launcher, make_case(ROW | options))
    source = kernels.source()
    assert line in source
    host = Host(tmp_path, source.replace(line, broken))
    with host.patched(), pytest.raises(AssertionError):
        check(host, make_case(ROW | options))


@pytest.mark.parametrize(
    ("rows", "run", "channels"),
    [
        (0, 1, 4),
        (1, 1, 1),
        (7, 3, 5),
        (600, 1, 4),
        (2, 512, 3),
        (2, 513, 3),
        (3, 5000, 2),
        (9999, 1, 1),
    ],
)
def test_sums_over_threads_are_of_every_thread_once_in_any_order(
    launcher, backwards, rows, run, channels
):
    x = torch.rand(2, rows * channels * run)
    want, found = x.view(2, rows, channels, run).double().sum((1, 3)).float(), []
    for host in (launcher, backwards):
        with host.patched():
            found.append(torch.full((2, channels), torch.nan))
            about = (make_spec(make_case(ROW)), "parameter_gradients<float>", (rows, run, channels))
            host.cuda._prepare_adders(*about, array("q", [0]), turns=2)(x, *found[-1])
    torch.testing.assert_close(found[0], want, rtol=1e-6, atol=0)
    assert torch.equal(*found)


@pytest.fixture(scope="module")
def backwards(tmp_path_factory):
    """A host on which the threads of a block run from the last to the first."""
    source = kernels.source()
    assert source.count("phase(thread);") == 1
    return Host(
        tmp_path_factory.mktemp("backwards"),
        source.replace("phase(thread);", "phase(ADDERS - 1 - thread);"),
    )


def test_kernels_take_their_constants_from_python(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "SEGMENT", 4)
    monkeypatch.setattr(kernels, "LONGEST_SWEEP", 8)
    with Host(tmp_path, kernels.source()).patched() as host:
        check(host, make_case(ROW | {"T": 13}))


@pytest.mark.slow
def test_kernels_run_clean_under_sanitizers(tmp_path):
    """In a process that checks every memory access: see sanitized.py."""
    libraries = [
        subprocess.check_output([GXX, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.alif.sanitized", tmp_path],
        env=os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert result.stdout.count("clean launches") == 1, result.stdout + result.stderr
    assert "heap-buffer-overflow" in result.stderr
