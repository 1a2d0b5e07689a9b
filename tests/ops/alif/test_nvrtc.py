"""The kernels as NVIDIA's compiler sees them: what of a thread is not in registers."""

import itertools

import pytest

from sj_taid.ops.alif import kernels
from sj_taid.ops.alif.kernels import NEED_NORM, NEED_V_THRESHOLD, NEED_W, NEED_X
from sj_taid.ops.alif.plan import Charge
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
    "charge": tuple(Charge),
    "surrogate": ("Sigmoid", "S2NN", "QPseudoSpike"),
    "needs": ("no norm", NEED_NORM | ALL & ~NEED_X, NEED_NORM, ALL, NEED_NORM | ALL),
    "pack": (False, True),
}


def make(dtype, steps, v_reset=0.0, **options):
    """The spec of a call, and the names of kernels for as many neurons a thread as they take."""
    changes = {"steps": steps} | {n: options.pop(n) for n in ("norm", "pack") if n in options}
    case = Case(v_reset, **options, dtype=dtype, shape=(1, 1, 1), through=("spike_seq",))
    return make_spec(case, **changes)


def kernels_and_bytes():
    """Names of kernels, and the bytes of the smallest array that a thread of each holds."""
    for row in pairwise(OPTIONS):
        norm = row["needs"] != "no norm"
        counts = row["v_reset"] == "counts" or row["charge"] == Charge.NO_STATE
        spec = make(
            row["dtype"],
            row["T"],
            None if counts else row["v_reset"],
            detach_reset=row["detach_reset"],
            surrogate_function=(COUNTS["counts"] if counts else SURROGATES[row["surrogate"]])(),
            norm=norm,
            pack=row["pack"],
        )
        spec = spec._replace(dynamics=spec.dynamics._replace(charge=row["charge"]))
        needs, v_seq = row["needs"] if norm else ALL, row["v_seq"]
        is_sweep = row["T"] <= kernels.longest_sweep(row["dtype"])
        steps = row["T"] if is_sweep else kernels.SEGMENT
        for name, vec in (
            kernels.forward(spec._replace(store_v_seq=v_seq)),
            kernels.backward(spec, needs, v_seq),
        ):
            lanes = vec if row["per_lane"] else 1
            yield name.format(vec, lanes), 4 * steps * vec  # a voltage of each step
    yield from ((f"{what}_gradients<float>", 4 * 8) for what in ("norm", "parameter"))
    for dtype, scalar in kernels.SCALARS.items():
        vecs = (1, kernels.ALIGNMENT // dtype.itemsize)
        for what, vec, counts in itertools.product(("pack", "unpack"), vecs, (0, 1)):
            yield f"{what}<{scalar},{vec},{counts}>", 4 * max(2, vec)


NAMES = dict(kernels_and_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", *OTHERS])
def test_no_array_of_a_thread_is_in_local_memory(arch):
    """A loop that is not unrolled, or an index that is no constant, would put it there.

    How many single registers are spilled depends on the version of NVRTC: ``make gpu`` prints it.
    """
    found = nvrtc.resources(kernels.source(), tuple(NAMES), arch)
    assert found.keys() == NAMES.keys()
    for name, r in found.items():
        assert r.stack < NAMES[name], name
