"""sj-taid prove: goes on past any failure, and reports it with the original exception."""

import csv
import importlib
import importlib.util
import subprocess
import sys

import pytest
import torch

from sj_taid import prove
from sj_taid.ops import backends
from sj_taid.prove import Step
from tests.test_docs import Parsed, parse_only  # noqa: F401

GPU = "../NVIDIA H100 | 80GB HBM3"
FIRST = ["step", "outcome", "seconds", "error", "command", "device", "commit", "sj-taid_version"]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with a name that is none for a file."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)


def proved(monkeypatch, out, steps, *options):
    """The exit code, the page and the rows of a run of these steps."""
    monkeypatch.setattr(prove, "steps", lambda device, folder: steps)
    code = prove.main(["--out", str(out), *options])
    (folder,) = out.iterdir()
    page = (folder / "prove.md").read_text(encoding="utf-8")
    return code, page, [*csv.DictReader((folder / f"{folder.name}.csv").open(newline=""))]


@pytest.mark.usefixtures("gpu")
def test_goes_on_past_what_raises_or_dies(tmp_path, monkeypatch, capsys):
    steps = [
        Step("raises", ["-c", "raise ValueError('in|jected')"], hint="Try another one."),
        Step("dies", ["-c", "import os; print('so far'); os.abort()"], {"A": "b c"}),
        Step("absent", ["-c", "1/0"], left_out="there is none"),
        Step("passes", ["-c", "print('fine')"]),
    ]
    code, page, rows = proved(monkeypatch, tmp_path, steps)
    assert code == 1
    outcomes = ["failed", "failed", "left out", "passed"]
    assert [row["outcome"] for row in rows] == outcomes
    assert [line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()[:4]] == (
        outcomes
    )
    assert rows[0]["error"] == "exit code 1: ValueError: in|jected"
    assert rows[1]["error"].startswith("SIGABRT") and rows[1]["command"].startswith(
        "'A=b c' python"
    )
    assert "1 passed, 2 failed, 0 skipped" in page and "Try another one." in page
    assert "Traceback (most recent call last):" in page and "\nValueError: in|jected\n~~~" in page
    assert "| raises | failed |" in page and r"ValueError: in\|jected |" in page
    assert "so far" in page and "ZeroDivisionError" not in page


@pytest.mark.usefixtures("gpu")
def test_names_files_by_the_machine_and_every_row_by_versions_and_commit(tmp_path, monkeypatch):
    out = tmp_path / "out"
    table = "print('T,N,torch_version'); print('4,8,9.9'); print('1')"
    steps = [
        Step("passes", ["-c", "pass"]),
        Step("writes", ["-c", f"import sys; sys.stdout = open(sys.argv[1], 'w'); {table}"]),
    ]
    folder = out / "nvidia-h100-80gb-hbm3"
    steps[1] = steps[1]._replace(arguments=[*steps[1].arguments, str(folder / "neuron.csv")])
    folder.mkdir(parents=True)
    (folder / "memory.csv").write_text("neuron\nof another day\n")
    code, page, rows = proved(monkeypatch, out, steps)
    assert code == 0 and [path.name for path in out.iterdir()] == [folder.name]
    assert (folder / "nvidia-h100-80gb-hbm3.csv").is_file() and page.startswith(f"# {GPU}: 2 pass")
    assert [row["step"] for row in rows] == ["passes", "writes", "neuron", "neuron"]
    columns = [*rows[0]]
    assert columns[: len(FIRST)] == FIRST and columns[-2:] == ["T", "N"]
    assert {"torch_version", "spikingjelly_version", "triton_version", "cuda_version"} < {*columns}
    assert all(row["device"] == GPU and row["sj-taid_version"] for row in rows)
    assert rows[0]["torch_version"] and rows[2]["torch_version"] == "9.9"  # a row's own counts
    assert "## neuron\n" in page and "of another day" not in page


def test_a_step_that_hangs_is_stopped(tmp_path):
    step = Step("hangs", ["-c", "import time; time.sleep(600)"])
    outcome = prove.run(step, tmp_path, 0.5)
    assert outcome.outcome == "failed" and outcome.error.startswith("stopped after 0 s (--minutes")


@pytest.mark.usefixtures("gpu")
def test_what_no_longer_fits_is_named(tmp_path, monkeypatch):
    steps = [Step("late", ["-c", "1/0"])]
    code, page, (row,) = proved(monkeypatch, tmp_path, steps, "--minutes", "0")
    assert code == 1 and row["outcome"] == "skipped"
    assert "| late | skipped | 0.0 | the 0 minutes are used up |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_says_why_not_and_what_would_be_run(tmp_path, capsys, monkeypatch):
    def load():
        raise ImportError("libcuda.so: cannot open")

    monkeypatch.setitem(backends.BACKENDS, "cupy", load)
    assert prove.main(["--out", str(tmp_path / "out")]) == 1
    output = capsys.readouterr().out
    assert "GPU: none" in output and "ImportError: libcuda.so: cannot open" in output
    assert backends.NEEDS["cupy"] in output and "sj-taid prove --device cpu" in output
    planned = [*prove.steps("cuda", tmp_path / "out" / "MACHINE")]
    assert len(planned) == 11 and all(step.command in output for step in planned)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.usefixtures("gpu")
def test_a_kernel_that_cannot_run_is_reported_with_what_to_try(tmp_path, monkeypatch):
    (kernel,) = (step for step in prove.steps("cuda", tmp_path) if step.name == "kernel")
    code, page, (row,) = proved(monkeypatch, tmp_path / "out", [kernel])
    assert code == 1 and row["outcome"] == "failed" and "NVRTC, the compiler" in page
    reason = row["error"].removeprefix("exit code 1: ")
    assert "Traceback (most recent call last):" in page and f"\n{reason}\n~~~" in page


@pytest.mark.parametrize("device", prove.SIZES)
def test_every_step_is_a_command_that_is_understood(device, tmp_path, parse_only):  # noqa: F811
    pytest.importorskip("pandas", reason="the benchmarks need the extra train")
    for step in prove.steps(device, tmp_path):
        option, name, *arguments = step.arguments
        assert option == "-m"
        with pytest.raises(Parsed):
            importlib.import_module(name).main(arguments)


def test_what_spikingjelly_has_no_kernels_for_is_left_out(monkeypatch):
    there = {"spikingjelly._ops", "spikingjelly._ops.plif._C", "triton"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there or None)
    assert prove.why_not("cuda") == prove.why_not("triton") == ""
    there.remove("spikingjelly._ops.plif._C")
    assert "without its native operators" in prove.why_not("cuda")
    there.remove("triton")
    assert prove.why_not("triton") == "Triton is not installed"
    there.clear()
    assert "0.0.0.0.14" in prove.why_not("cuda")


TOY = {
    "conformance": "--cases 1",
    "neuron": "--steps 2 --neurons 64 --repeats 1 --only LIF",
    "memory": "--dtypes float32 --steps 2",
    "norm": "--steps 3 --batch 2 --repeats 1 --dtypes float32 --nets '3 x [conv, norm, neuron]'",
    "fsvae": "--parts compare --T 2 --batch 2 --size 8 --repeats 1",
}


@pytest.mark.slow
def test_all_that_a_cpu_can(tmp_path):
    pytest.importorskip("pandas", reason="the benchmarks need the extra train")
    pytest.importorskip("numba", reason="needs numba: pip install numba")
    program = (
        f"from sj_taid import prove; prove.SIZES['cpu'] = {TOY}; raise SystemExit(prove.main())"
    )
    options = ["--device", "cpu", "--minutes", "60", "--out", str(tmp_path)]  # of a busy machine
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.iterdir()
    page = (folder / "prove.md").read_text(encoding="utf-8")
    assert "9 passed, 0 failed, 0 skipped" in page
    assert "backend numba: works" in page and "bit for bit" in page
    assert page.count("1 of the 1 cases that ran equal the definition.") == 3
    assert "| SpikingJelly PLIF |" in page and "| ALIF, one operator, bits |" in page
    rows = [*csv.DictReader((folder / f"{folder.name}.csv").open(newline=""))]
    assert {"neuron", "memory", "norm", "fsvae"} <= {row["step"] for row in rows}
    assert all(row["torch_version"] for row in rows)
