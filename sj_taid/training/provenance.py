"""What a figure needs beside it: versions, commit, machine."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__


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


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def commit() -> str | None:
    """The commit of this checkout, with ``+`` where files differ from it.

    Asked for when a process starts its first run: at the end the checkout may hold another.
    """
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout
    return run.stdout.strip()
