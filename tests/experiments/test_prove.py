"""prove.py: continues past any failure, and reports it with the original exception."""

import importlib
import importlib.util
import re
from importlib.metadata import version
from pathlib import Path

import any_net
import prove
import pytest
import torch
from prove import Step
from spikingjelly.activation_based import neuron

from sj_taid import accelerate
from sj_taid.ops import backends
from tests.test_docs import Parsed, parse_only  # noqa: F401

#: no name for a file
GPU = "../NVIDIA H100 | 80GB HBM3"


def read_page(out):
    """The page in the only folder, without the padding of tables."""
    (path,) = out.glob("*/prove.md")
    return re.sub(" +", " ", path.read_text(encoding="utf-8"))


def run_steps(monkeypatch, out, steps, *options):
    """The exit code and the page of a run of these steps, as if there were a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr(prove, "steps", lambda device, folder: steps)
    return prove.main(["--out", str(out), *options]), read_page(out)


def test_prove_continues_past_what_raises_or_dies(tmp_path, monkeypatch, capsys):
    steps = [
        Step("raises", ["-c", "raise ValueError('in|jected')"]),
        Step("dies", ["-c", "import os; print('so far'); os.abort()"], {"A": "b c"}),
        Step("passes", ["-c", "print('fine')"]),
    ]
    code, page = run_steps(monkeypatch, tmp_path, steps)
    assert code == 1
    said = [line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()[:3]]
    assert said == ["failed", "failed", "passed"]
    assert "1 passed, 2 failed, 0 skipped" in page
    assert "Traceback (most recent call last):" in page and "\nValueError: in|jected\n~~~" in page
    assert "| raises | failed |" in page
    assert r"exit code 1: ValueError: in\|jected |" in page
    assert "## dies failed: SIGABRT" in page and "`'A=b c' python -c" in page
    assert "so far" in page


def test_prove_names_its_files_by_the_machine_and_replaces_them(tmp_path, monkeypatch):
    out = tmp_path / "out"
    folder = out / "nvidia-h100-80gb-hbm3"
    folder.mkdir(parents=True)
    (folder / "frontier.csv").write_text("neuron\nof another day\n")
    rows = ("T,N,device,commit", "4,8,a GPU,1234", "1")
    write = f"import sys; print(*{rows}, sep='\\n', file=open(sys.argv[1], 'w'))"
    steps = [Step("writes", ["-c", write, str(folder / "neuron.csv")])]
    code, page = run_steps(monkeypatch, out, steps)
    assert code == 0 and [path.name for path in out.iterdir()] == [folder.name]
    assert page.startswith(f"# {GPU}: 1 passed")
    assert f"torch {version('torch')}" in page and "## neuron\n" in page
    assert "| T | N |" in page and "| 4 | 8 |" in page and "| 1 | |" in page
    assert "of another day" not in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_prove_without_a_gpu_says_why(tmp_path, capsys, monkeypatch):
    def load():
        raise ImportError("libcuda.so: cannot open")

    monkeypatch.setitem(backends.BACKENDS, "cupy", load)
    assert prove.main(["--out", str(tmp_path / "out")]) == 1
    output = capsys.readouterr().out
    assert "finds no GPU" in output and "ImportError: libcuda.so: cannot open" in output
    assert backends.NEEDS["cupy"] in output and "experiments/prove.py --device cpu" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", prove.SIZES)
def test_every_step_is_a_command_that_parses(device, tmp_path, parse_only):  # noqa: F811
    for step in prove.steps(device, tmp_path):
        program, *arguments = step.arguments
        if program == "-m":
            name, *arguments = arguments
            if name == "pytest":
                continue
        else:
            assert (prove.ROOT / program).is_file()
            name = Path(program).stem
        with pytest.raises(Parsed):
            importlib.import_module(name).main(arguments)


def test_a_net_is_measured_as_it_is_before_it_is_compiled(tmp_path):
    steps = [[*step.arguments] for step in prove.steps("cuda", tmp_path)]
    (compiled,) = (i for i, arguments in enumerate(steps) if "--compile" in arguments)
    assert [word for word in steps[compiled] if word != "--compile"] in steps[:compiled]


def test_neurons_that_are_no_lif_are_made_and_fused():
    for name in prove.OTHERS:
        net = getattr(any_net, name)()
        assert not isinstance(net[1], neuron.LIFNode)
        report = accelerate(net, torch.zeros(2, 2, 128, 3, 3))
        assert "1 of 1 neurons on the fused operator" in str(report), (name, report)
