"""The kernels as NVIDIA's compiler sees them: registers, spills, the width of accesses."""

import math
import re

import pytest
import torch

from sj_taid.ops.alif import kernels
from sj_taid.ops.alif.kernels import NEED_NORM, NEED_V_THRESHOLD, NEED_W, NEED_X
from tests.helpers import Case
from tests.ops.alif import nvrtc
from tests.ops.alif.conformance import COUNTS, SURROGATES, make_spec, pairwise

try:
    nvrtc.library()
    WHY_NOT = None
except OSError as error:
    WHY_NOT = str(error)

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"needs NVRTC: {WHY_NOT}")

OTHERS = [pytest.param(arch, marks=pytest.mark.kernels) for arch in ("sm_80", "sm_100")]
ALL = NEED_X | NEED_W | NEED_V_THRESHOLD

# What decides the registers of a thread: the greediest surrogates, the longest single sweep of half
# precision and that of float32, segments with a rest.
OPTIONS = {
    "T": (4, 8, 16, 23),
    "dtype": tuple(kernels.SCALARS),
    "v_reset": (0.0, -0.25, None, "counts"),
    "per_lane": (False, True),
    "v_seq": (False, True),
    "detach_reset": (False, True),
    "charge": ("decay", "no decay", "no leak", "no state"),
    "surrogate": ("Sigmoid", "S2NN", "QPseudoSpike"),
    "needs": ("no norm", NEED_NORM | ALL & ~NEED_X, NEED_NORM, ALL, NEED_NORM | ALL),
    "pack": (False, True),
}


def make(dtype, steps, v_reset=0.0, **options):
    """The spec of a call, and the names of kernels for as many neurons a thread as they take."""
    changes = {"steps": steps} | {n: options.pop(n) for n in ("norm", "pack") if n in options}
    case = Case(v_reset, **options, dtype=dtype, shape=(1, 1, 1), through=("spike_seq",))
    return make_spec(case, **changes)


def widest(kernel, per_lane=False):
    return kernel.name(kernel.vec, kernel.vec if per_lane else 1)


def names():
    for row in pairwise(OPTIONS):
        norm = row["needs"] != "no norm"
        counts = row["v_reset"] == "counts" or row["charge"] == "no state"
        spec = make(
            row["dtype"],
            row["T"],
            None if counts else row["v_reset"],
            detach_reset=row["detach_reset"],
            decay_input=row["charge"] != "no decay",
            surrogate_function=(COUNTS["counts"] if counts else SURROGATES[row["surrogate"]])(),
            norm=norm,
            pack=row["pack"],
        )
        if row["charge"] in ("no leak", "no state"):
            w = -math.inf if row["charge"] == "no leak" else math.inf
            spec = spec._replace(dynamics=spec.dynamics._replace(w=w))
        needs, v_seq = row["needs"] if norm else ALL, row["v_seq"]
        yield widest(kernels.forward(spec._replace(store_v_seq=v_seq)), row["per_lane"])
        yield widest(kernels.backward(spec, needs, v_seq), row["per_lane"])
    yield from ("norm_gradients<float>", "parameter_gradients<float>")
    for dtype, scalar in kernels.SCALARS.items():
        statistics, vec = kernels.statistics(dtype), kernels.ALIGNMENT // dtype.itemsize
        yield from (widest(statistics), widest(statistics, per_lane=True))
        yield from (f"norm_numbers<{scalar},{fixed}>" for fixed in (0, 1))
        for what in ("pack_bits", "unpack_bits", "pack_counts", "unpack_counts"):
            yield from (f"{what}<{scalar},{n}>" for n in (1, vec))


NAMES = tuple(dict.fromkeys(names()))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", *OTHERS])
def test_16_bytes_are_spilled_at_most_and_none_up_to_16_values(arch):
    found = nvrtc.resources(kernels.source(), NAMES, arch)
    assert found.keys() == set(NAMES)
    spilling = {name: r for name, r in found.items() if r.stack or r.spill_stores}
    for name, r in spilling.items():
        few = arch in ("sm_80", "sm_90") and values(name) <= 16
        assert r.spill_stores <= (0 if few else 16), name
        # An array in local memory would be more than spilled registers, rounded up to 8 bytes.
        assert r.stack < r.spill_stores + 8, name


def values(name):
    """Steps in registers times neurons a thread, from a kernel's name."""
    if not name.startswith("alif"):
        return 0
    steps, vec = map(int, name.split(",")[1:3])
    return (steps if steps <= kernels.LONGEST_SWEEP else kernels.SEGMENT) * vec


@pytest.mark.parametrize(
    ("dtype", "T", "bytes_forward", "bytes_backward"),
    [(torch.float32, 16, 16, 4), (torch.float32, 24, 16, 8), (torch.float16, 4, 8, 8)],
)
def test_every_byte_once_in_the_widest_accesses(dtype, T, bytes_forward, bytes_backward):
    """Counted in the compiled code: 8 + 12 bytes a neuron and step in float32, 4 + 6 in half."""
    spec = make(dtype, T)
    forward, backward = kernels.forward(spec), kernels.backward(spec, ALL, False)
    assert forward.vec * dtype.itemsize == bytes_forward
    assert backward.vec * dtype.itemsize == bytes_backward
    # w and the threshold are read once a thread, which writes a sum for each of them.
    assert_moved({widest(forward): (1, 1, 8, 0), widest(backward): (2, 1, 8, 8)}, spec)


@pytest.mark.parametrize(("dtype", "T"), [(torch.float32, 8), (torch.bfloat16, 24)])
def test_bytes_with_a_norm_and_bits(dtype, T):
    """4 + 8 + 20 a neuron and step in float32, half of it in half, and a byte for 8 steps."""
    spec = make(dtype, T, norm=True, pack=True)
    sums, only_x, single_pass = (
        widest(kernels.backward(spec, needs, False))
        for needs in (NEED_NORM | ALL & ~NEED_X, NEED_X, NEED_NORM | ALL)
    )
    forward = kernels.forward(spec)
    bits = forward.vec * -(-min(T, kernels.SEGMENT) // 8)
    table, ab, all_sums = 3 * 4, 2 * 4, 4 * 4
    moved = {
        widest(forward): (1, 1, 8 + table, bits),
        sums: (2, 0, 8 + table, all_sums),
        only_x: (2, 1, 8 + table + ab, 0),
        single_pass: (2, 1, 8 + table, all_sums),
    }
    assert_moved(moved, spec)


def test_statistics_read_the_sequence_once():
    dtype = torch.float32
    vec, name = kernels.statistics(dtype).vec, widest(kernels.statistics(dtype))
    text = nvrtc.ptx(kernels.source(), (name,), "compute_90")[name]
    # A group of 8 packs, one of a single pack, the pivot, and the counter of batches.
    assert sum(widths(text, "ld")) == (8 + 1) * vec * dtype.itemsize + dtype.itemsize + 8
    assert widths(text, "ld").count(vec * dtype.itemsize) == 9
    assert sum(widths(text, "st")) == 2 * 8 + 8


def assert_moved(moved, spec):
    """``moved``: sequences read and written by each kernel, and the bytes next to them.

    Next to those, forward reads a voltage and writes one, backward reads it and the last one's
    gradient, writes a gradient, and all of them move one at the segments' bounds.
    """
    dtype, T = spec.dtype, spec.steps
    texts = nvrtc.ptx(kernels.source(), tuple(moved), "compute_90")
    segmented = kernels.longest_sweep(dtype) < T
    steps = kernels.SEGMENT if segmented else T
    for name, (reads, writes, read_state, written_state) in moved.items():
        vec, forward = int(name.split(",")[2]), name.startswith("alif_forward")
        sequence, state, width = steps * vec * dtype.itemsize, vec * 4, vec * dtype.itemsize
        read, written = widths(texts[name], "ld"), widths(texts[name], "st")
        read_state += state * (1 if forward else 2 + segmented)
        written_state += state * (1 + segmented if forward else 1)
        assert sum(read) == reads * sequence + read_state, name
        assert sum(written) == writes * sequence + written_state, name
        assert read.count(width) >= reads * steps and written.count(width) >= writes * steps


def widths(text, direction):
    """Bytes of each access to global memory in a kernel's PTX."""
    pattern = rf"{direction}\.global(?:\.nc)?(?:\.v(\d))?\.[bufs](\d+)"
    return [int(n or 1) * int(bits) // 8 for n, bits in re.findall(pattern, text)]
