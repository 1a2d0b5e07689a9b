"""The registry: an explicit choice runs or raises; auto falls back and says why, once."""

import warnings

import pytest
import torch
from spikingjelly.activation_based import surrogate

from sj_taid.ops import backends
from sj_taid.ops.alif import reference

X = torch.zeros(2, 3)


@pytest.fixture
def broken(monkeypatch):
    """A preferred backend for the CPU that fails to import."""

    def load():
        raise ImportError("No module named 'fastlib'")

    monkeypatch.setitem(backends.BACKENDS, "broken", load)
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("broken",))
    monkeypatch.setattr(backends, "_warned", set())


def resolve(name):
    return backends.resolve(name, X, surrogate.ATan())


def test_torch_is_the_reference():
    assert resolve("torch").multi_step is reference.multi_step


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'cuda-magic' is unknown.*'auto', 'torch'"):
        resolve("cuda-magic")


@pytest.mark.usefixtures("broken")
def test_explicit_backend_raises_and_keeps_the_original_exception():
    with pytest.raises(backends.BackendUnavailableError, match=r"ImportError.*fastlib") as info:
        resolve("broken")
    assert isinstance(info.value.__cause__, ImportError)
    assert isinstance(backends.why_not("broken"), ImportError)


@pytest.mark.usefixtures("broken")
def test_auto_falls_back_and_says_why_once():
    with pytest.warns(RuntimeWarning, match="'broken' is not available.*fastlib"):
        assert resolve("auto").multi_step is reference.multi_step
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("auto").multi_step is reference.multi_step


def test_a_call_the_backend_cannot_take_is_refused_with_its_reason(monkeypatch):
    picky = backends.Backend(reference.multi_step, lambda x, s: "it is Tuesday")
    monkeypatch.setitem(backends.BACKENDS, "picky", lambda: picky)
    with pytest.raises(backends.BackendUnavailableError, match="it is Tuesday"):
        resolve("picky")


@pytest.mark.usefixtures("broken")
def test_environment_variable_decides_for_auto_and_is_a_contract(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "torch")
    assert resolve("auto").multi_step is reference.multi_step
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "broken")
    with pytest.raises(backends.BackendUnavailableError):
        resolve("auto")
