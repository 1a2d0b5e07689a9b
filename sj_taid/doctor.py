"""Print what a bug report needs, which backends work here, why the others do not, and the remedy.

A backend works if it computes on its device what torch does. ``python -m torch.utils.collect_env``
says the rest of the machine.
"""

import argparse
import platform
import subprocess
import time
from collections.abc import Sequence
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor
from torch.utils import collect_env

from . import __version__
from .functional import alif_multi_step
from .ops import backends

_GPUS = "nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader"
PACKAGES = (
    *("torch", "spikingjelly", "numpy", "numba", "cupy-cuda12x", "cupy-cuda13x"),
    *("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "triton"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 if a backend that should work gives other results than torch."""
    argparse.ArgumentParser(prog="sj-taid doctor", description=__doc__).parse_args(arguments)
    print(f"sj-taid {__version__}, commit {commit() or 'unknown, not a checkout'}")
    for package, number in installed().items():
        print(package, number or "is not installed")
    print("torch.version.cuda", torch.version.cuda)
    gpus = collect_env.run_and_read_all(collect_env.run, _GPUS)  # whatever torch and CuPy see
    print(f"GPU, compute capability, driver: {gpus or 'nvidia-smi knows none'}")
    if backends.works("cupy"):
        from .ops.step.cuda import nvrtc_version

        print("NVRTC, as CuPy loaded it: {}.{}".format(*nvrtc_version))
    if backends.works("numba"):
        from .ops.step.cpu.rows import cache_folder

        print(f"compiled neurons are kept in {cache_folder() or 'no folder'}")
    passed, lines = zip(*map(check_backend, backends.BACKENDS), strict=True)
    print(*lines, sep="\n")
    return 0 if all(passed) else 1


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


def check_backend(name: str) -> tuple[bool, str]:
    """Whether a backend that should work does, and a report: the original reason why not."""
    if (reason := backends.why_not(name)) is not None:
        message = str(reason).strip().replace("\n", "\n    ")
        why = f"backend {name}: no; {type(reason).__name__}: {message}"
        return True, f"{why}\n    it needs {backends.needed_by(name)}"
    device = next((d for d, names in backends.PREFERENCE.items() if name in names), None)
    if device is None:
        return True, f"backend {name}: works"
    if device == "cuda" and not torch.cuda.is_available():
        return True, f"backend {name}: no; torch.cuda.is_available() is False"
    return self_test(name, device)


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
        return False, f"backend {name}: FAILED, {type(error).__name__}: {error}"
    if not equal:
        return False, f"backend {name}: FAILED, other outputs than torch's; please report it"
    seconds = time.perf_counter() - start
    equals = f"its outputs equal torch's bit for bit, its first call took {seconds:.2f} s"
    return True, f"backend {name}: works; {equals}"


if __name__ == "__main__":
    raise SystemExit(main())
