"""What a figure needs beside it: versions, commit, machine."""

import os
from importlib.metadata import version
from typing import Any

import torch

from .. import __version__
from ..doctor import commit, cpu_name


def provenance() -> dict[str, Any]:
    """Versions, commit, threads and machine of this process."""
    packages = ("spikingjelly", "torch", "lightning")
    return {
        "versions": {"sj-taid": __version__, **{name: version(name) for name in packages}},
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
    }
