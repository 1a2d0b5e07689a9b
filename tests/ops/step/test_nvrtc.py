"""The kernels as NVIDIA's compiler sees them: what of a thread is not in registers."""

import pytest

from tests.ops.step import nvrtc

try:
    nvrtc.library()
    WHY_NOT = None
except OSError as error:
    WHY_NOT = str(error)

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"needs NVRTC: {WHY_NOT}")


@pytest.mark.kernels
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"])
def test_no_array_of_a_thread_is_in_local_memory(arch):
    """A loop that is not unrolled, or an index that is no constant, would put it there.

    How many single registers are spilled depends on the version of NVRTC: ``make gpu`` prints it.
    """
    for kernel, r in nvrtc.compile_all(arch):
        assert r.stack < kernel.bytes, (kernel.neuron, kernel.name)
