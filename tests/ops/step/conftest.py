import pytest
import torch

from tests.ops.step.host import Host


def pytest_itemcollected(item):
    """Mark what conforms by its dtype, by which prove.py selects: its case's, or a parameter."""
    if item.get_closest_marker("conforms"):
        given = item.callspec.params
        dtype = getattr(given.get("case"), "dtype", given.get("dtype", torch.float32))
        item.add_marker(str(dtype).removeprefix("torch."))


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """The cupy backend over a g++ build of the kernels, shared so that each is compiled once."""
    return Host(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def launcher(host):
    """``host`` for one test: no launch recorded yet, no function loaded."""
    host.launches.clear()
    host.guarded.clear()
    host.cuda.launches.clear()
    host.cuda._function.cache_clear()
    with host.patched():
        yield host
