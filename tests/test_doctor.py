"""python -m sj_taid.doctor: what works, why the rest does not, the remedy."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sj_taid import doctor
from sj_taid.ops import backends


@pytest.fixture
def report(monkeypatch, capsys):
    """Run the doctor as if nvidia-smi said this and this torch were here; its output."""

    def run(smi=None, cuda=None, returns=0):
        monkeypatch.setattr(doctor.collect_env, "run_and_read_all", lambda *_: smi)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert doctor.main([]) == returns
        return capsys.readouterr().out

    return run


def test_doctor_prints_what_a_bug_report_needs(report):
    card = "NVIDIA H100 80GB HBM3, 9.0, 580.65.06"
    output = report(smi=f"{card}\n{card}", cuda="13.2")
    assert "backend torch: works" in output
    assert f"GPU, compute capability, driver: {card}\n{card}\n" in output
    assert "torch.version.cuda 13.2\n" in output
    for package in ("torch", "spikingjelly", "cupy-cuda13x", "nvidia-cuda-nvrtc"):
        assert f"\n{package} " in output
    output = report()
    assert "torch.version.cuda None" in output and "driver: nvidia-smi knows none" in output


def test_cupy_needs_a_torch_with_cuda_and_a_device(monkeypatch):
    """Whatever CuPy sees."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setitem(sys.modules, "sj_taid.ops.step.cuda", SimpleNamespace())
    backends._failure_of.cache_clear()
    assert "is built without CUDA" in doctor.check_backend("cupy")[1]
    backends._failure_of.cache_clear()
    monkeypatch.setattr(backends, "BACKENDS", {"cupy": lambda: None})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.check_backend("cupy")[1].endswith("no; torch.cuda.is_available() is False")


def test_backend_gives_the_original_reason_and_the_remedy(monkeypatch):
    """All of its message: CuPy's begins with a line of ``=``."""

    def load():
        raise ImportError("====\nFailed to import CuPy.\n\n  libcuda.so.1: cannot open\n")

    monkeypatch.setattr(backends, "BACKENDS", {"cupy": load})
    passed, text = doctor.check_backend("cupy")
    assert passed and text.splitlines() == [
        "backend cupy: no; ImportError: ====",
        *("    Failed to import CuPy.", "    ", "      libcuda.so.1: cannot open"),
        f"    it needs {backends.NEEDS['cupy']}",
    ]


@pytest.mark.parametrize(
    ("outcome", "said"),
    [(1.0, "other outputs than"), (RuntimeError("nvrtc: error"), "RuntimeError: nvrtc: error")],
)
def test_doctor_reports_other_outputs_than_torchs_and_errors(outcome, said, report, monkeypatch):
    def step(x_seq, *_, backend, **__):
        if backend == "fast" and isinstance(outcome, Exception):
            raise outcome
        outputs = [torch.zeros_like(x_seq) for _ in range(3)]
        outputs[2][0, 0, 0] = outcome if backend == "fast" else 0.0  # one voltage
        return tuple(outputs)

    monkeypatch.setattr(doctor, "alif_multi_step", step)
    monkeypatch.setattr(backends, "BACKENDS", {"fast": lambda: None})
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("fast",))
    assert f"backend fast: FAILED, {said}" in report(returns=1)


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
def test_doctor_runs_the_gpu(capsys):
    assert doctor.main([]) == 0
    output = capsys.readouterr().out
    assert "backend cupy: works; its outputs equal torch's" in output and "\nNVRTC, as" in output
