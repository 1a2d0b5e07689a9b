"""README as a package index shows it, where relative links lead nowhere; all else: setup.cfg."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def absolute(text: str, url: str) -> str:
    """Markdown with the links and pictures of this repository at its address."""
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{url}/raw/main/", text)
    return re.sub(r"(\]\()(?!https?:|#)", rf"\1{url}/blob/main/", text)


if __name__ == "__main__":
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(long_description=absolute(page, config["metadata"]["url"]))
