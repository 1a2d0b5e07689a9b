"""python -m sj_taid.doctor: what works, why the rest does not, the remedy."""

import re
import runpy
import subprocess
import sys

import pytest
import torch

from sj_taid import doctor
from sj_taid.ops import backends


def test_doctor_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sj_taid.doctor"])
    with (
        pytest.warns(RuntimeWarning, match="found in sys.modules"),
        pytest.raises(SystemExit) as ended,
    ):
        runpy.run_module("sj_taid.doctor", run_name="__main__")
    assert not ended.value.code
    output = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in output
    assert "backend torch: works" in output
    assert backends.NEEDS.keys() == backends.BACKENDS.keys() - {"torch"}


def test_availability_gives_the_original_reason_and_the_remedy(monkeypatch):
    def load():
        raise ImportError("libfast.so: cannot open\nsecond line")

    monkeypatch.setattr(backends, "BACKENDS", {"cupy": load})
    assert list(doctor.availability()) == [
        "backend cupy: no; ImportError: libfast.so: cannot open",
        f"    it needs {backends.NEEDS['cupy']}",
    ]


def test_self_test_passes_for_every_backend():
    for name, device in doctor.fused_backends():
        equal, line = doctor.self_test(name, device)
        assert equal, line


@pytest.mark.parametrize("outcome", [1.0, RuntimeError("nvrtc: error: invalid value")])
def test_doctor_reports_other_outputs_than_torchs_and_errors(outcome, monkeypatch, capsys):
    def step(x_seq, *_, backend, **__):
        if backend == "cupy" and isinstance(outcome, Exception):
            raise outcome
        outputs = [torch.zeros_like(x_seq) for _ in range(3)]
        outputs[2][0, 0, 0] = outcome if backend == "cupy" else 0.0  # one voltage
        return tuple(outputs)

    monkeypatch.setattr(doctor, "alif_multi_step", step)
    monkeypatch.setattr(doctor, "fused_backends", lambda: [("cupy", "cpu")])
    monkeypatch.setattr(doctor.backends, "why_not", {"cupy": ImportError()}.get)
    assert doctor.main([]) == 1
    said = "RuntimeError: nvrtc: error" if isinstance(outcome, Exception) else "other outputs than"
    shown = capsys.readouterr().out
    assert f"self test of cupy: FAILED, {said}" in shown
    assert "backend cupy: no; ImportError: no message" in shown


def test_commit_is_this_checkouts_own(tmp_path, monkeypatch):
    """Not that of a repository in which the package happens to be installed."""

    def git(*arguments):
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "doctor.py").touch()
    git("commit", "--allow-empty", "-m", "another's")
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    assert doctor.commit.__wrapped__() is None
    git("add", "doctor.py")
    git("commit", "-m", "its own")
    assert re.fullmatch("[0-9a-f]{12}", doctor.commit.__wrapped__())


@pytest.mark.gpu
def test_fused_backends_has_the_gpu():
    assert ("cupy", "cuda") in list(doctor.fused_backends())
