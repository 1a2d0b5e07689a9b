"""``import sj_taid`` stays light; its parts come when they are used, or say what to install."""

import re
import subprocess
import sys

import pytest

CODE = """
import sys
from spikingjelly.activation_based import functional, layer, neuron
theirs = {*sys.modules}
import sj_taid

more = {*sys.modules} - theirs
assert "torch._dynamo" not in more  # it alone takes a second
assert {name.partition(".")[0] for name in more} - sys.stdlib_module_names == {"sj_taid"}
from sj_taid import *
assert functional.__name__.startswith("spikingjelly"), "import * leaves out ours"
assert sj_taid.model.FSVAE and not hasattr(sj_taid, "metrics")
for part, package in (("lightning", "lightning"), ("metric", "torchmetrics")):
    sys.modules[package] = None  # as if it were not installed
    for use in (f"sj_taid.{part}", f"import sj_taid.{part}", f"from sj_taid import {part}"):
        try:
            exec(use)
        except ModuleNotFoundError as error:
            assert f"pip install {package}" in str(error), error
        else:
            raise AssertionError(use)
sys.modules["omegaconf"] = None
from sj_taid.__main__ import main

for command in ("doctor", "--help"):
    sys.argv[1:] = [command]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code
sys.argv[1:] = ["train"]
main()
"""


@pytest.mark.slow
def test_import_is_light_and_names_what_is_missing_in_one_line():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    said = r"sj-taid train needs the extra train: .*omegaconf.*; to get it: pip install .* in .*\n"
    assert re.fullmatch(said, done.stderr) and done.returncode == 1, done.stderr
    assert "backend torch: works" in done.stdout and "draw images" in done.stdout
    assert 'pip install ".[train]" in a' in done.stdout
