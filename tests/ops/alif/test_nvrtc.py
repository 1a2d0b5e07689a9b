"""The kernels as NVIDIA's compiler sees them: registers and spills."""

import math

import pytest

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
def test_16_bytes_are_spilled_at_most(arch):
    found = nvrtc.resources(kernels.source(), NAMES, arch)
    assert found.keys() == set(NAMES)
    for name, r in found.items():
        assert r.spill_stores <= 16, name
        # An array in local memory would be more than spilled registers, rounded up to 8 bytes.
        assert r.stack < r.spill_stores + 8, name
