"""Wheel and sdist hold what they should, and what a package index shows of them is right."""

import configparser
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

import sj_taid
from sj_taid._extras import TRAIN

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sj_taid"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def setup_cfg():
    config = configparser.RawConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    # Not "build" alone, which a folder build/ of the checkout is too.
    pytest.importorskip("build.__main__", reason="needs the extra dev")
    from filelock import FileLock

    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    # Outside the checkout, whose build/ would be taken for the tool of that name.
    # One process at a time, since each puts what it packs into the checkout.
    with FileLock(tmp_path_factory.getbasetemp().parent / "sj-taid-build.lock"):
        done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built[1]) as wheel:
        (path,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        return message_from_bytes(wheel.read(path))


def test_the_wheel_holds_the_package_the_configs_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    for_developers = PACKAGE / "ops" / "alif" / "README.md"
    # conf in the package is a link, which rglob does not follow.
    folders = [(PACKAGE, "sj_taid"), (ROOT / "conf", "sj_taid/conf")]
    files = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for folder, name in folders
        for path in folder.rglob("*.*")
        if path.is_file() and "__pycache__" not in path.parts and path != for_developers
    }
    assert len(files) > 100
    about = f"sj_taid-{sj_taid.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == files
    assert {f"{about}licenses/LICENSE", f"{about}entry_points.txt"} <= names


def test_the_sdist_holds_what_the_wheel_is_built_of(built):
    folder = f"sj_taid-{sj_taid.__version__}"
    with tarfile.open(built[0]) as sdist:
        names = {name.removeprefix(f"{folder}/") for name in sdist.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "setup.cfg"} <= names
    assert not [name for name in names if name.startswith(("tests", "experiments", "docs"))]


@pytest.mark.slow
def test_the_wheel_alone_composes_a_run(built, tmp_path):
    pytest.importorskip("hydra", reason="needs the extra train")
    zipfile.ZipFile(built[1]).extractall(tmp_path)
    code = (
        "import sj_taid; from sj_taid.training.composing import compose; "
        "print(sj_taid.__file__, compose('train').dataset.name)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    said = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
    assert said.split() == [str(tmp_path / "sj_taid" / "__init__.py"), "digits"]


def test_a_package_index_takes_them(built):
    pytest.importorskip("twine", reason="needs the extra dev")
    command = [sys.executable, "-m", "twine", "check", "--strict", *built]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_metadata_says_what_it_is(metadata, setup_cfg):
    assert (metadata["Name"], metadata["Version"]) == ("sj-taid", sj_taid.__version__)
    extras = set(setup_cfg["options.extras_require"])
    assert set(metadata.get_all("Provides-Extra")) == extras
    url = setup_cfg["metadata"]["url"]
    addresses = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert {"Documentation", "Changelog", "Issues"} <= set(addresses)
    assert all(address.startswith(f"{url}/") for address in addresses.values())


def test_the_description_links_to_files_that_are_there(metadata, setup_cfg):
    url = setup_cfg["metadata"]["url"]
    text = metadata.get_payload(decode=True).decode()
    links = re.findall(r"(!?)\[[^]]*]\(([^)]+)\)", text)
    ours = [(picture, link) for picture, link in links if link.startswith(url)]
    assert len(ours) > 5 and any(picture for picture, _ in ours)
    assert not [link for _, link in links if not link.startswith("https://")]
    for picture, link in ours:
        kind, branch, path = link.removeprefix(f"{url}/").split("/", 2)
        assert (kind, branch) == ("raw" if picture else "blob", "main")
        assert (ROOT / path.partition("#")[0]).exists(), path


def test_one_version_everywhere():
    heading = re.search(r"^## (\S+)", read("CHANGELOG.md"), re.M)
    assert heading[1] == sj_taid.__version__
    citation = yaml.safe_load(read("CITATION.cff"))
    assert (citation["version"], citation["license"]) == (sj_taid.__version__, "MIT")


def test_the_workflow_runs_what_must_pass_on_each_python(setup_cfg):
    job = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["test"]
    assert job["steps"][-1]["run"] == "bash .ci/run"
    versions = re.findall(r":: (3\.\d+)", setup_cfg["metadata"]["classifiers"])
    assert job["strategy"]["matrix"]["python"] == versions
    assert setup_cfg["options"]["python_requires"] == f">={versions[0]}"


def test_the_remedy_for_a_command_that_lacks_a_package_is_all_of_the_extra(setup_cfg):
    extras = setup_cfg["options.extras_require"]
    lines = [line for line in extras["train"].split("\n") if line and not line.startswith("#")]
    parts = [part for line in lines for part in re.findall(r"^sj-taid\[(\w+)]$", line)]
    lines += [line for part in parts for line in extras[part].split("\n")]
    wanted = {re.split("[>=]", line)[0] for line in lines if re.match(r"(?!sj-taid)\w", line)}
    assert "safetensors" in wanted and set(TRAIN.split()) == wanted
