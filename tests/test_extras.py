"""``import sj_taid`` stays light; its parts come when they are used, or say what to install."""

import re
import subprocess
import sys
from importlib import import_module

import pytest
from spikingjelly.activation_based import functional as theirs

import sj_taid

CODE = """
import sys
from spikingjelly.activation_based import functional, layer, neuron
theirs = {*sys.modules}
import sj_taid

# Dynamo alone takes a second.
heavy = {"lightning", "torchmetrics", "cupy", "numba", "hydra", "safetensors", "torch._dynamo"}
assert not heavy & {*sys.modules} - theirs
assert sj_taid.model.FSVAE
for part, package in (("lightning", "lightning"), ("metric", "torchmetrics")):
    sys.modules[package] = None  # as if it were not installed
    for use in (f"sj_taid.{part}", f"import sj_taid.{part}", f"from sj_taid import {part}"):
        try:
            exec(use)
        except ModuleNotFoundError as error:
            assert f"pip install {package}" in str(error), error
        else:
            raise AssertionError(use)
"""


def test_import_is_light_and_names_missing_packages():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", sj_taid._PARTS)
def test_parts_are_attributes(part, monkeypatch):
    pytest.importorskip(
        {"metric": "torchmetrics", "training": "omegaconf", "data": "lightning"}.get(part, "torch")
    )
    monkeypatch.delitem(vars(sj_taid), part, raising=False)
    assert getattr(sj_taid, part) is import_module(f"sj_taid.{part}")
    with pytest.raises(AttributeError, match="no attribute 'metrics'"):
        sj_taid.metrics


UNTRAINED = """
import sys

sys.modules["omegaconf"] = None
from sj_taid.__main__ import main

sys.argv[1:] = ["doctor"]
try:
    main()
except SystemExit as ended:
    assert not ended.code
sys.argv[1:] = ["--help"]
main()
"""


@pytest.mark.slow
def test_command_line_without_the_extra_train_is_one_line():
    done = subprocess.run([sys.executable, "-c", UNTRAINED], capture_output=True, text=True)
    assert done.returncode == 1 and "backend torch: works" in done.stdout
    said = r"sj-taid, .* extra train: .*omegaconf.*; to get it: pip install .* hydra-core .*\n"
    assert re.fullmatch(said, done.stderr)


def test_import_star_leaves_spikingjellys_functional():
    names = {"functional": theirs}
    exec("from sj_taid import *", names)
    assert names["functional"] is theirs and names["ALIFNode"] is sj_taid.ALIFNode
    assert sj_taid.functional.alif_step
