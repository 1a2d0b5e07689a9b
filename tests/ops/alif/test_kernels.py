"""The kernels' own text, compiled as C++, against the definition in float64."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sj_taid.ops.alif import kernels
from tests.ops.alif.conformance import OPTIONS, Conformance, pairwise
from tests.ops.alif.host import GXX, Host, needs_gxx

pytestmark = needs_gxx


@pytest.fixture(autouse=True)
def _poison():
    # PyTorch then fills what it allocates with NaN: a value that a kernel leaves out shows.
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(host, conformance):
    cuda = host.cuda
    assert not conformance.differences(cuda.multi_step, launches=cuda.launches)


@pytest.fixture(scope="module")
def built(request, host):
    """``host`` with the kernels of all selected cases, compiled together: faster than singly."""
    with host.patched():
        host.build(
            {
                name
                for item in request.session.items
                if (case := getattr(item, "callspec", None)) and "conformance" in case.params
                for name in host.kernels(case.params["conformance"])
            }
        )


@pytest.mark.parametrize("conformance", [Conformance(row) for row in pairwise(OPTIONS)], ids=str)
def test_every_pair_of_options(built, launcher, conformance):
    check(launcher, conformance)


def every(options, T):
    """Every combination that compiles to different code at ``T``, some options in turns."""
    turns = ("surrogate", "v_init", "through", "frozen", "norm", "pack")
    cycles = {name: itertools.cycle(options[name]) for name in turns}
    fixed = {name: values for name, values in options.items() if name not in (*turns, "T")}
    for i, values in enumerate(itertools.product(*fixed.values())):
        # Lengths with a common factor would pair the same values every time.
        for name in turns[: 1 + i % len(turns)]:
            next(cycles[name])
        row = dict(zip(fixed, values, strict=True)) | {n: next(c) for n, c in cycles.items()}
        yield {name: row.get(name, T) for name in options}


@pytest.mark.kernels
@pytest.mark.parametrize("T", OPTIONS["T"])
def test_every_combination(launcher, T):
    conformances = [Conformance(row) for row in every(OPTIONS, T)]
    launcher.build({name for case in conformances for name in launcher.kernels(case)})
    for conformance in conformances:
        try:
            check(launcher, conformance)
        except AssertionError as error:
            raise AssertionError(f"{conformance}: {error}") from error


# One line of the kernels broken at a time, and a case that runs it. Each still trains.
SOFT, HARD = {"v_reset": None}, {"v_reset": -0.25}
NORM = HARD | {"norm": "batch"}
MUTATIONS = {
    "no gradient through the soft reset's threshold": (
        SOFT | {"detach_reset": True},
        "sums.v_threshold[lane] -= (fired ? 1.0f : 0.0f) * grad_v[i];",
        ";",
    ),
    "no gradient through the reset": (
        HARD,
        "fmaf(grad_v[i], reset_by_spike, grad_s)",
        "grad_s",
    ),
    "gradient passes a hard reset": (
        HARD,
        "(RESET == SOFT || !fired ? 1.0f : 0.0f) * grad_v[i]",
        "grad_v[i]",
    ),
    "no decay of the carried gradient": (HARD, "fmaf(-q, grad_h, grad_h)", "grad_h"),
    "rounding of the charge": (HARD, "v + (x - above_reset) * q[lane(i)]", "v + x * q[lane(i)]"),
    "a step's gradient of v_seq left out": (SOFT, "if (GRAD_V_SEQ) grad_v[i] += grad_v_t[i];", ""),
    "the last voltage not written": (HARD, "    store(v, v_last + at);", ""),
    "a segment from another's checkpoint": (
        HARD | {"T": 24},
        "load(checkpoint + (segment - 1) * size + at, v);",
        "load(checkpoint + at, v);",
    ),
    "the channel of another neuron": (
        HARD | {"per_channel": True},
        "channel = first + i",
        "channel = first",
    ),
    "only the first of a thread's neurons": (
        HARD | {"layout": "images"},
        "at += threads * VEC",
        "at += size",
    ),
    "the norm left out in backward": (
        NORM,
        "neuron.charge(neuron.input(to_float(x_t[t].lane[i]), i), v, i)",
        "neuron.charge(to_float(x_t[t].lane[i]), v, i)",
    ),
    "the norm's offset of another channel": (NORM, "norm[2 * channels + channel]", "norm[channel]"),
    "the other steps' share of x's gradient left out": (NORM, "ab ? ab[channel] : 0.0f", "0.0f"),
    "its second part left out": (NORM, "ab ? ab[channels + channel] : 0.0f", "0.0f"),
    "the norm's gain left out of x's gradient": (
        NORM,
        "fmaf(neuron.gain[lane], grad_y, -coupled)",
        "grad_y - coupled",
    ),
    "the same with running statistics": (
        NORM | {"norm": "fixed"},
        "neuron.gain[lane] * grad_y",
        "grad_y",
    ),
    "the gain's gradient by x as it is": (
        NORM,
        "sums.y_x[lane] = fmaf(grad_y, centred,",
        "sums.y_x[lane] = fmaf(grad_y, centred + 1.0f,",
    ),
    "statistics of a part of the sequence": (
        NORM | {"T": 24},
        "for (; at < size; at += apart)",
        "for (; at < 0; at += apart)",
    ),
    "deviations within a group left out": (
        NORM | {"T": 24},
        "deviation + (double)total",
        "(double)total",
    ),
    "one bit a byte": (HARD | {"pack": True}, "1u << t % 8", "1u"),
    "the second byte over the first": (
        HARD | {"pack": True, "T": 16},
        "bits + byte_here + t / 8 * size",
        "bits + byte_here",
    ),
    "a segment's byte in another's place": (
        HARD | {"pack": True, "T": 24},
        "segment * BYTES * size + at",
        "at",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_breaking_one_line_turns_conformance_red(tmp_path, name):
    options, line, broken = MUTATIONS[name]
    source = kernels.source()
    assert line in source
    row = {option: values[0] for option, values in OPTIONS.items()}
    row |= {"T": 4, "layout": "features", "decay_input": True, "v_init": True} | options
    with (
        Host(tmp_path, source.replace(line, broken)).patched() as host,
        pytest.raises(AssertionError),
    ):
        check(host, Conformance(row))


def test_the_case_of_the_mutations_is_green_unbroken(launcher):
    row = {option: values[0] for option, values in OPTIONS.items()}
    row |= {"T": 4, "layout": "features", "decay_input": True, "v_init": True}
    for options, _, _ in MUTATIONS.values():
        check(launcher, Conformance(row | options))


def test_the_kernels_take_their_constants_from_python(tmp_path, monkeypatch):
    row = {option: values[0] for option, values in OPTIONS.items()}
    monkeypatch.setattr(kernels, "SEGMENT", 4)
    monkeypatch.setattr(kernels, "LONGEST_SWEEP", 8)
    with Host(tmp_path, kernels.source.__wrapped__()).patched() as host:
        check(host, Conformance(row | {"T": 13}))


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True], ids=["as it is", "one neuron too far"])
def test_no_address_or_undefined_behaviour_error(tmp_path, broken):
    """In a process that watches every access to memory: see sanitized.py."""
    libraries = [
        subprocess.check_output([GXX, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.alif.sanitized", tmp_path, *["--broken"] * broken],
        env=os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    if broken:
        assert "heap-buffer-overflow" in result.stderr
    else:
        assert result.returncode == 0, result.stdout + result.stderr
