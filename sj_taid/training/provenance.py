"""What is saved next to metrics: the command line, versions, commit and machine."""

import os
import shlex
from importlib.metadata import version
from typing import Any

import torch

from .. import __version__
from ..doctor import commit, cpu_name
from .config import select_overrides


def command_line(command: str, job: Any) -> dict[str, Any]:
    """The overrides and the command of Hydra's job, without this machine's paths."""
    ignored = job.job.config.override_dirname.exclude_keys
    overrides = select_overrides(job.overrides.task, ignored)
    return {"overrides": overrides, "command": shlex.join(["sj-taid", command, *overrides])}


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
