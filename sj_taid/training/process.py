"""What a process sets up and ends, and what of it is saved next to metrics."""

import ctypes
import logging
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from .. import __version__
from ..doctor import commit, cpu_name
from .config import key_of


def reuse_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones.

    By default it gives every large block back to the kernel, and a training step on the CPU spends
    more time on fresh pages than on arithmetic.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD of malloc.h
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def silence_notes() -> None:
    """Silence warnings of libraries about what is intended, or what no user can change."""
    # devices and services
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # Triton is not there
    for note in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
        r".*smaller than the logging interval",  # nothing is logged by the step
        r".*does not have many workers",  # images in memory are faster without
        r"Checkpoint directory .* exists and is not empty",  # a run that resumes
        r"Metric `InceptionScore` will save all",
        r"The dirpath has changed",  # in a folder that was moved
    ):
        warnings.filterwarnings("ignore", note)


@contextmanager
def ending_wandb_run() -> Iterator[None]:
    """End a run of W&B that begins within, or Lightning continues it in the next run."""
    before = getattr(sys.modules.get("wandb"), "run", None)
    try:
        yield
    finally:
        wandb = sys.modules.get("wandb")
        if wandb and wandb.run is not before:
            wandb.finish()


def given_overrides() -> dict[str, str]:
    """The overrides of Hydra's job as they were given, interpolations unresolved, by their keys."""
    overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)
    return {key_of(override): override for override in overrides}


def command_line(command: str, earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Choices, overrides and command of Hydra's job, without paths that are no choices.

    The overrides are added to those of the ``earlier`` job that it resumes, or replace them.
    """
    job, earlier = HydraConfig.get(), earlier or {"overrides": []}
    chosen = {k: v for k, v in job.runtime.choices.items() if not k.startswith("hydra/")}
    given = {key_of(override): override for override in earlier["overrides"]} | given_overrides()
    paths = job.job.config.override_dirname.exclude_keys
    overrides = [override for key, override in given.items() if key not in paths]
    return {
        "choices": earlier.get("choices", chosen),
        "overrides": overrides,
        "command": shlex.join(["sj-taid", command, *overrides]),
    }


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
