import pytest

from tests.ops.step.host import Host


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
