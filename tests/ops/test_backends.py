"""The registry: an explicit choice runs or raises; auto falls back and says why, once."""

import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from sj_taid import swap_neurons
from sj_taid.ops import backends
from sj_taid.ops.step import reference

X = torch.zeros(2, 3)


@pytest.fixture
def broken(monkeypatch):
    """A preferred backend for the CPU that fails to import; the list of its attempts."""

    attempts = []

    def load():
        attempts.append(1)
        raise ModuleNotFoundError("No module named 'fastlib'")

    monkeypatch.setitem(backends.BACKENDS, "broken", load)
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("broken",))
    monkeypatch.setattr(backends, "_warned", set())
    return attempts


def resolve(name):
    return backends.resolve(name, X)


@pytest.mark.usefixtures("broken")
def test_resolve_explicit_name_raises_from_the_original_exception():
    with pytest.raises(backends.BackendUnavailableError, match=r"ModuleNotFound.*fastlib") as info:
        resolve("broken")
    assert isinstance(info.value.__cause__, ImportError)


def test_resolve_auto_falls_back_and_says_why_once(broken):
    with pytest.warns(RuntimeWarning, match="'broken' is not available.*fastlib"):
        assert resolve("auto").multi_step is reference.multi_step
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("auto").multi_step is reference.multi_step
    assert len(broken) == 1, "a failed import is not repeated"


@pytest.mark.usefixtures("broken")
def test_resolve_auto_takes_the_environment_variable_or_raises(monkeypatch):
    for value in ("torch", ""):  # empty: as not set
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, value)
        with nullcontext() if value else pytest.warns(RuntimeWarning):
            assert resolve("auto").multi_step is reference.multi_step
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "broken")
    with pytest.raises(backends.BackendUnavailableError):
        resolve("auto")
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cuda-magic")
    with pytest.raises(ValueError, match=r"SJ_TAID_BACKEND='cuda-magic' is unknown.*'torch'"):
        resolve("auto")
    assert resolve("torch").multi_step is reference.multi_step


def test_resolve_auto_takes_torch_while_a_dispatch_mode_watches(monkeypatch):
    fused = backends.Backend(lambda *_: None, lambda x: None)
    monkeypatch.setitem(backends.BACKENDS, "fused", lambda: fused)
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("fused",))
    with TorchDispatchMode():  # as a counter of operations
        assert resolve("auto").multi_step is reference.multi_step
        assert resolve("fused") is fused
    modes = create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.MUST_SAVE)
    for mode in (torch._subclasses.FakeTensorMode(), *modes):
        with mode:
            assert resolve("auto") is fused, mode


@pytest.mark.parametrize("counter", ["ACCounter", "MACCounter", "NeuronStateCounter"])
@pytest.mark.parametrize("v_reset", [-0.5, None])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_counters_read_the_same_after_a_swap(step_mode, v_reset, counter):
    counters = pytest.importorskip("spikingjelly.activation_based.op_counter")
    node = neuron.ParametricLIFNode(v_threshold=0.1, v_reset=v_reset)
    net = nn.Sequential(layer.Linear(3, 5), node, layer.Linear(5, 2))
    functional.set_step_mode(net, step_mode)
    x_seq = torch.rand(4, 2, 3)

    def count():
        functional.reset_net(net)
        counting = getattr(counters, counter)()
        with counters.DispatchCounterMode([counting]):
            net(x_seq) if step_mode == "m" else [net(x) for x in x_seq]
        return counting.get_total()

    expected = count()
    swap_neurons(net)
    assert count() == expected > 0


@pytest.mark.slow
def test_why_not_runs_no_operator():
    """Or the first call under a counter of operations fails, or is counted."""
    script = """
from torch.utils._python_dispatch import TorchDispatchMode
import sj_taid

class Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, function, *_):
        raise AssertionError(function)

with Refusing():
    print(sj_taid.ops.backends.why_not("numba"))
"""
    printed = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert printed.startswith(("None", "No module named 'numba'"))
