"""Print which backends work here, why the others do not, and how to get them.

``python -m torch.utils.collect_env`` says the rest of the machine.
"""

import argparse
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from . import __version__
from .functional import alif_multi_step
from .ops import backends

PACKAGES = ("torch", "spikingjelly", "numpy", "numba", "cupy-cuda12x", "cupy-cuda13x", "triton")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 if a backend that should work gives other results than torch."""
    argparse.ArgumentParser(prog="sj-taid doctor", description=__doc__).parse_args(arguments)
    print(f"sj-taid {__version__}, commit {commit() or 'unknown, not a checkout'}")
    for package, number in installed().items():
        print(package, number or "is not installed")
    print(*availability(), sep="\n")
    tests = [self_test(name, device) for name, device in fused_backends()]
    for _, line in tests:
        print(line)
    return 0 if all(equal for equal, _ in tests) else 1


def installed() -> dict[str, str | None]:
    """The version of each of ``PACKAGES``, ``None`` if it is not installed."""
    return {name: next((d.version for d in distributions(name=name)), None) for name in PACKAGES}


def cpu_name() -> str:
    """The name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def commit() -> str | None:
    """The commit of this checkout, with ``+`` if files differ from it, or ``None``.

    Read once per process, before its first run: at the end the checkout may hold another.
    """
    here = Path(__file__)
    describe = ["describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        # An installed package may lie inside a repository that is not its own.
        for arguments in (["ls-files", "--error-unmatch", here.name], describe):
            run = subprocess.run(
                ["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def availability() -> Iterator[str]:
    """Each backend: works, or the original reason why not and what it needs."""
    for name in backends.BACKENDS:
        reason = backends.why_not(name)
        if reason is None:
            yield f"backend {name}: works"
        else:
            first_line = (str(reason).strip() or "no message").splitlines()[0]
            yield f"backend {name}: no; {type(reason).__name__}: {first_line}"
            yield f"    it needs {backends.needed_by(name)}"


def fused_backends() -> Iterator[tuple[str, str]]:
    """The backends other than torch that work here, each with its device."""
    for device, names in backends.PREFERENCE.items():
        if device == "cpu" or torch.cuda.is_available():
            yield from ((name, device) for name in names if backends.why_not(name) is None)


def self_test(name: str, device: str) -> tuple[bool, str]:
    """Run a backend once and compare its outputs with torch's; the first call compiles it.

    With ``w = 0``, so that sigmoid(w) is 1/2 wherever it is computed.
    """
    x_seq = torch.randn(4, 32, 64, device=device)
    w, v_threshold = torch.zeros((), device=device), torch.ones((), device=device)

    def fire(backend: str) -> Sequence[Tensor]:
        options: Any = {"surrogate_function": surrogate.ATan(), "store_v_seq": True}
        return alif_multi_step(x_seq, 0.0, w, v_threshold, backend=backend, **options)

    expected = fire("torch")
    start = time.perf_counter()
    try:
        equal = all(torch.equal(*pair) for pair in zip(fire(name), expected, strict=True))
    except Exception as error:  # of a compiler, a driver or a kernel
        return False, f"self test of {name}: FAILED, {type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    passed = f"equal to torch bit for bit; its first call took {seconds:.2f} s"
    failed = "FAILED, other outputs than torch's; please report it"
    return equal, f"self test of {name}: {passed if equal else failed}"


if __name__ == "__main__":
    raise SystemExit(main())
