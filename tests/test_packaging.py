"""Wheel and sdist hold what they should."""

import configparser
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import sj_taid
from sj_taid._extras import TRAIN

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sj_taid"
DEVELOPERS = {*PACKAGE.rglob("README.md"), ROOT / "conf" / "README.md"} - {
    *PACKAGE.glob("pretrained/**/README.md")
}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    # Not "build" alone, which also names a folder of the checkout.
    pytest.importorskip("build.__main__", reason="needs the extra dev")
    from filelock import FileLock

    out = tmp_path_factory.mktemp("dist")
    # In a folder without build/, and one process at a time: each writes into the checkout.
    with FileLock(tmp_path_factory.getbasetemp().parent / "sj-taid-build.lock"):
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_wheel_holds_package_and_configs(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    # conf in the package is a link, which rglob does not follow.
    folders = [(PACKAGE, "sj_taid"), (ROOT / "conf", "sj_taid/conf")]
    files = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for folder, name in folders
        for path in {*folder.rglob("*.*")} - DEVELOPERS
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(files) > 100
    about = f"sj_taid-{sj_taid.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == files
    assert {f"{about}licenses/LICENSE", f"{about}entry_points.txt"} <= names


@pytest.mark.slow
def test_wheel_alone_composes_a_run(built, tmp_path):
    pytest.importorskip("hydra", reason="needs the extra train")
    zipfile.ZipFile(built[1]).extractall(tmp_path)
    code = (
        "import sj_taid; from sj_taid.training.config import compose; "
        "print(sj_taid.__file__, compose('train').dataset.name)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    output = run(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    assert output.split() == [str(tmp_path / "sj_taid" / "__init__.py"), "digits"]


def test_sdist_holds_sources_only(built):
    folder = f"sj_taid-{sj_taid.__version__}"
    with tarfile.open(built[0]) as sdist:
        names = {name.removeprefix(f"{folder}/") for name in sdist.getnames()}
    assert {"LICENSE", "README.md", "setup.cfg", "sj_taid/ops/alif/kernels.cu"} <= names
    assert not [name for name in names if name.startswith(("experiments", "docs"))]


def test_version_is_the_same_everywhere():
    heading = re.search(r"^## (\S+)", read("CHANGELOG.md"), re.M)
    citation = yaml.safe_load(read("CITATION.cff"))
    assert heading[1] == citation["version"] == sj_taid.__version__
    assert citation["license"] == "MIT"


def test_missing_package_remedy_is_the_whole_extra():
    config = configparser.RawConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    text = config["options.extras_require"]["train"]
    wanted = set(re.findall(r"^(?!sj-taid)(\w[\w-]*)", text, re.M))
    assert "safetensors" in wanted and set(TRAIN.split()) == wanted
