"""The description for a package index: README.md with absolute links. The rest is in setup.cfg."""

import re
from configparser import RawConfigParser
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
config = RawConfigParser()
config.read(ROOT / "setup.cfg", encoding="utf-8")
URL = config["metadata"]["url"]


def make_absolute(link: re.Match[str]) -> str:
    """Make a link of README.md absolute: to the file, or to the bytes of a picture."""
    picture, text, path = link.groups()
    return f"{picture}[{text}]({URL}/{'raw' if picture else 'blob'}/main/{path})"


readme = (ROOT / "README.md").read_text(encoding="utf-8")
setup(
    long_description=re.sub(r"(!?)\[([^]]*)]\((?!https?:|#)([^)]+)\)", make_absolute, readme),
    project_urls={
        "Documentation": f"{URL}/blob/main/docs/index.md",
        "Changelog": f"{URL}/blob/main/CHANGELOG.md",
        "Issues": f"{URL}/issues",
    },
)
