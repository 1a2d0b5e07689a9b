"""prove.py: continues past any failure, and reports it with the original exception."""

import importlib
import importlib.util
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

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


def test_prove_continues_past_what_fails_and_writes_a_page(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "nvidia-h100-80gb-hbm3"
    folder.mkdir()
    (folder / "frontier.csv").write_text("neuron\nof another day\n")
    rows = ("T,N,device,commit", "4,8,a GPU,1234", "1")
    write = f"import sys; print(*{rows}, sep='\\n', file=open(sys.argv[1], 'w'))"
    steps = [
        Step("raises", ["-c", "raise ValueError('in|jected')"]),
        Step("dies", ["-c", "import os; print('so far'); os.abort()"], {"A": "b c"}),
        Step("writes", ["-c", write, str(folder / "neuron.csv")]),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr(prove, "steps", lambda device, folder: steps)
    assert prove.main(["--out", str(tmp_path)]) == 1
    said = [line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()[:3]]
    assert said == ["failed", "failed", "passed"]
    (path,) = tmp_path.glob("*/prove.md")
    page = re.sub(" +", " ", path.read_text(encoding="utf-8"))  # without the padding of tables
    assert page.startswith(f"# {GPU}: 1 passed, 2 failed, 0 skipped")
    for part in (
        f"torch {version('torch')}",
        "Traceback (most recent call last):",
        "\nValueError: in|jected\n~~~",
        r"| raises | failed |",
        r"exit code 1: ValueError: in\|jected |",
        "## dies failed: SIGABRT",
        "`'A=b c' python -c",
        "so far",
        "## neuron\n",
        "| T | N |",
        "| 4 | 8 |",
        "| 1 | |",
    ):
        assert part in page
    assert "of another day" not in page
    del steps[:2]
    assert prove.main(["--out", str(tmp_path)]) == 0


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


def collect(*arguments):
    """The tests that pytest would run."""
    found = []
    watch = SimpleNamespace(pytest_collection_finish=lambda session: found.extend(session.items))
    assert pytest.main(["--collect-only", "-qq", *arguments], plugins=[watch]) == 0
    return {item.nodeid: item.originalname for item in found}


@pytest.mark.parametrize("device", prove.SIZES)
def test_conformance_selects_every_test_that_conforms(device, tmp_path):
    """Each in the step of its dtype: a selection that is empty would be green."""
    steps = [s for s in prove.steps(device, tmp_path) if s.name.startswith("conformance")]
    selected = [collect(*step.arguments[2:]) for step in steps]
    assert all("test_conforms" in of_dtype.values() for of_dtype in selected)
    files = [argument for argument in steps[0].arguments if argument.endswith(".py")]
    every = {node: name for node, name in collect("-m", "", *files).items() if "conforms" in name}
    found = [node for of_dtype in selected for node in of_dtype]
    assert len(found) == len(set(found)) and set(found) >= every.keys()


def test_neurons_that_are_no_lif_are_made_and_fused():
    for name in prove.OTHERS:
        net = getattr(any_net, name)()
        assert not isinstance(net[1], neuron.LIFNode)
        report = accelerate(net, torch.zeros(2, 2, 128, 3, 3))
        assert "1 of 1 neurons on the fused operator" in str(report), (name, report)
