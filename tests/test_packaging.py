"""The wheel holds what it should; the version and the remedies for missing packages are right."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import sj_taid
from tests import smoke

ROOT = Path(__file__).parents[1]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.slow
def test_wheel_holds_package_and_configs(tmp_path):
    # Not "build" alone, which also names a folder of the checkout.
    pytest.importorskip("build.__main__", reason="needs the extra dev")
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")  # built from the sdist
    about = f"sj_taid-{sj_taid.__version__}.dist-info/"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(about)}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sj_taid").rglob("*.*")}
    # conf in the package is a link, which rglob does not follow.
    files |= {f"sj_taid/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    page = zipfile.ZipFile(wheel).read(f"{about}METADATA").decode()
    links = re.findall(r"]\(([^)\s]+)", page)
    assert len(links) > 20 and all(link.startswith("https://") for link in links)
    left_out = re.compile(r"(?!.*/pretrained/).*\.md|.*__pycache__.*")
    assert not names - files
    assert not [name for name in files - names if not left_out.fullmatch(name)]


def test_version_is_the_same_everywhere():
    heading = re.search(r"^## (\S+)", read("CHANGELOG.md"), re.M)
    citation = yaml.safe_load(read("CITATION.cff"))
    assert heading[1] == citation["version"] == sj_taid.__version__


def test_workflows_pin_each_action_by_one_hash():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / ".github").rglob("*.yml")]
    used = [line for text in texts for line in re.findall(r"uses: (.*)", text)]
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", line) for line in used)
    assert len({*used}) == len({line.partition("@")[0] for line in used})


def test_smoke_test_of_the_release_passes():
    smoke.main()
