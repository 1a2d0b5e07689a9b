"""``import sj_taid`` stays light; its parts come when they are used, or say what to install."""

import subprocess
import sys
from importlib import import_module

import pytest
from spikingjelly.activation_based import functional as theirs

import sj_taid

CODE = """
import sys
import sj_taid

optional = ("lightning", "torchmetrics", "cupy", "numba", "hydra", "safetensors")
assert not [name for name in optional if name in sys.modules]
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


def test_import_is_light_and_missing_packages_come_with_the_remedy():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", sj_taid._PARTS)
def test_parts_are_attributes(part, monkeypatch):
    pytest.importorskip({"metric": "torchmetrics", "training": "omegaconf", "data": "rich"}.get(part, "torch"))
    monkeypatch.delitem(vars(sj_taid), part, raising=False)
    assert getattr(sj_taid, part) is import_module(f"sj_taid.{part}")
    with pytest.raises(AttributeError, match="no attribute 'metrics'"):
        sj_taid.metrics


@pytest.mark.parametrize(("command", "package"), [("train", "lightning"), ("search", "optuna")])
def test_a_command_that_lacks_a_package_says_what_to_install(command, package, monkeypatch):
    cli = pytest.importorskip("sj_taid.training.cli", reason="needs the extra train")
    module = {"train": "commands"}.get(command, command)
    monkeypatch.delattr(f"sj_taid.training.{module}", raising=False)
    monkeypatch.delitem(sys.modules, f"sj_taid.training.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match="to get it: pip install ") as error:
        getattr(cli, command)([])
    remedy = str(error.value).partition("pip install ")[2]
    assert {package, "hydra-core"} <= set(remedy.split())


def test_star_leaves_spikingjellys_functional():
    names = {"functional": theirs}
    exec("from sj_taid import *", names)
    assert names["functional"] is theirs and names["ALIFNode"] is sj_taid.ALIFNode
    assert sj_taid.functional.alif_step
