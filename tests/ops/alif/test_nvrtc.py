"""The kernels as NVIDIA's compiler sees them: registers, spills, the width of accesses."""

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from sj_taid.ops.alif import kernels, nvrtc
from sj_taid.ops.alif.kernels import NEED_V_THRESHOLD, NEED_W, NEED_X, Options
from tests.ops.alif.cases import pairwise

try:
    nvrtc.library()
    WHY_NOT = None
except OSError as error:
    WHY_NOT = str(error)

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"needs NVRTC: {WHY_NOT}")

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100")
ALL = NEED_X | NEED_W | NEED_V_THRESHOLD

# What decides the registers of a thread. The greediest surrogates, every length up to the longest
# single sweep, one length beyond for each kind of rest.
OPTIONS = {
    "T": (1, 2, 4, 6, 8, 12, 16, 23, 24),
    "dtype": tuple(kernels.SCALARS),
    "v_reset": (0.0, -0.25, None),
    "per_lane": (False, True),
    "v_seq": (False, True),
    "detach_reset": (False, True),
    "decay_input": (False, True),
    "surrogate": ("Sigmoid", "S2NN", "QPseudoSpike"),
}


def names():
    for row in pairwise(OPTIONS):
        options = Options(row["dtype"], row["T"], row["v_reset"], row["decay_input"], row["v_seq"])
        vec = options.forward_vec()
        yield options.forward_name(vec, vec if row["per_lane"] else 1)
        vec = options.backward_vec()
        lanes = vec if row["per_lane"] else 1
        yield options.backward_name(vec, lanes, row["detach_reset"], ALL, row["surrogate"])


NAMES = tuple(dict.fromkeys(names()))


@pytest.fixture(scope="module")
def reports():
    """Each kernel's resources by architecture, two compilations side by side."""
    with ThreadPoolExecutor(2) as pool:
        compiled = pool.map(partial(nvrtc.resources, kernels.source(), NAMES), ARCHITECTURES)
        return dict(zip(ARCHITECTURES, compiled, strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_at_most_16_bytes_a_thread_are_spilled(reports, arch):
    assert reports[arch].keys() == set(NAMES)
    spilled = {name: r.spill_stores for name, r in reports[arch].items() if r.spill_stores}
    assert all(size <= 16 for size in spilled.values()), spilled


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nothing_is_spilled_up_to_16_values_a_thread(reports, arch):
    spilled = {n: r for n, r in reports[arch].items() if r.spill_stores and values(n) <= 16}
    assert not spilled


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_array_lies_in_local_memory(reports, arch):
    """What is on the stack is spilled registers, rounded up to 8 bytes; an array would be more."""
    assert all(r.stack < r.spill_stores + 8 for r in reports[arch].values() if r.stack)


def values(name):
    """Steps in registers times neurons a thread, from a kernel's name."""
    steps, vec = map(int, name.split(",")[1:3])
    return (steps if steps <= kernels.LONGEST_SWEEP else kernels.SEGMENT) * vec


@pytest.mark.parametrize(
    ("dtype", "T", "bytes_forward", "bytes_backward"),
    [
        (torch.float32, 4, 16, 16),
        (torch.float32, 8, 16, 8),
        (torch.float32, 16, 16, 4),
        (torch.float16, 2, 16, 16),
        (torch.bfloat16, 2, 16, 16),
        (torch.float16, 4, 8, 8),
        (torch.float16, 16, 8, 4),
    ],
)
def test_every_byte_once_in_the_widest_accesses(dtype, T, bytes_forward, bytes_backward):
    """Counted in the compiled code: 8 + 12 bytes a neuron and step in float32, 4 + 6 in half."""
    options = Options(dtype, T, 0.0, True, False)
    forward = options.forward_name(options.forward_vec(), 1)
    backward = options.backward_name(options.backward_vec(), 1, False, ALL, "ATan")
    text = nvrtc.ptx(kernels.source(), (forward, backward), "compute_90")
    for name, vec, width, arrays_read, arrays_written, parameters in (
        # x | spikes; the parameters are read once a thread.
        (forward, options.forward_vec(), bytes_forward, 1, 1, 0),
        # x and the spikes' gradients | x's gradients; a thread writes a sum for each parameter.
        (backward, options.backward_vec(), bytes_backward, 2, 1, 2),
    ):
        sequence, once = T * vec * dtype.itemsize, vec * 4
        read, written = widths(text[name], "ld"), widths(text[name], "st")
        states_read = arrays_read  # v0 | v0 and the last voltage's gradient
        assert sum(read) == arrays_read * sequence + states_read * once + 2 * 4
        assert sum(written) == arrays_written * sequence + once + parameters * 4
        assert read.count(width) >= arrays_read * T and written.count(width) >= T


def widths(text, direction):
    """Bytes of each access to global memory in a kernel's PTX."""
    pattern = rf"{direction}\.global(?:\.nc)?(?:\.v(\d))?\.[bufs](\d+)"
    return [int(n or 1) * int(bits) // 8 for n, bits in re.findall(pattern, text)]


def test_a_failed_compilation_shows_the_compilers_log():
    with pytest.raises(RuntimeError, match=r"(?s)COMPILATION.*kernels.cu\(1\): error"):
        nvrtc.resources("__global__ void f() { x }", ("f",), "sm_90")
