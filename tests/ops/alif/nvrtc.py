"""NVRTC, NVIDIA's run-time compiler, called from Python: compiles the kernels without a GPU.

    python -m tests.ops.alif.nvrtc --arch sm_90

prints the registers and spills of the kernels. The library comes with CUDA, with CUDA
builds of PyTorch and with the ``nvidia-cuda-nvrtc`` wheel.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import re
import sys
import time
from collections.abc import Iterator, Sequence
from ctypes.util import find_library
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from sj_taid.ops.alif import kernels
from sj_taid.ops.alif.kernels import NEED_NORM, NEED_V_THRESHOLD, NEED_W, NEED_X
from sj_taid.ops.alif.plan import Charge
from tests.helpers import Case
from tests.ops.alif.conformance import COUNTS, SURROGATES, make_spec, pairwise

ALL = NEED_X | NEED_W | NEED_V_THRESHOLD


class Resources(NamedTuple):
    """What ptxas reports of one kernel; bytes are per thread."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int


@cache
def library() -> ctypes.CDLL:
    """The NVRTC library: the newest wheel's on ``sys.path``, else the system's.

    Raises:
        OSError: there is none; the message says how to install one.
    """
    for path in wheels(sys.path):
        for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))  # 13.0 would not look for them there
        return ctypes.CDLL(str(path))
    if name := find_library("nvrtc"):
        return ctypes.CDLL(name)
    raise OSError(
        "NVRTC (libnvrtc.so) was not found on sys.path or in the system; "
        "pip install nvidia-cuda-nvrtc"
    )


def wheels(path: list[str]) -> list[Path]:
    """The libraries of NVRTC's wheels on ``path``, ``libnvrtc.so.13`` and so on, newest first."""
    found = (p for entry in path for p in Path(entry).glob("nvidia/*/lib/libnvrtc.so.*"))
    return sorted(found, key=lambda p: [*map(int, re.findall(r"\d+", p.name))], reverse=True)


def resources(source: str, names: Sequence[str], arch: str) -> dict[str, Resources]:
    """Compile the kernels ``names`` (C++ name expressions) for ``arch``, such as ``"sm_90"``.

    Raises:
        RuntimeError: the source does not compile; the message is the compiler's log.
    """
    program, options = ctypes.c_void_p(), [*kernels.COMPILER_OPTIONS, "--ptxas-options=-v"]
    encoded = [option.encode() for option in (*options, f"--gpu-architecture={arch}")]
    _call("CreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        for name in names:
            _call("AddNameExpression", program, name.encode())
        array = (ctypes.c_char_p * len(encoded))(*encoded)
        try:
            _call("CompileProgram", program, len(encoded), array)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{_log(program)}") from error
        mangled, lowered = {}, ctypes.c_char_p()
        for name in names:
            _call("GetLoweredName", program, name.encode(), ctypes.byref(lowered))
            mangled[(lowered.value or b"").decode()] = name
        entries = re.split(r"Compiling entry function '", _log(program))[1:]
    finally:
        _call("DestroyProgram", ctypes.byref(program))
    return {mangled[entry[: entry.index("'")]]: _read(entry) for entry in entries}


def _read(entry: str) -> Resources:
    """The numbers of ptxas's report of a kernel."""
    units = "spill stores", "spill loads", "stack frame"
    patterns = (r"Used (\d+) registers", *(rf"(\d+) bytes {unit}" for unit in units))
    found = [re.search(pattern, entry) for pattern in patterns]
    if not all(found):
        raise RuntimeError(f"expected {patterns} in ptxas's report, but it says:\n{entry}")
    return Resources(*(int(match[1]) for match in found if match))


def _log(program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _call("GetProgramLogSize", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _call("GetProgramLog", program, buffer)
    return buffer.value.decode()


def _call(function: str, *arguments: object) -> None:
    if status := getattr(library(), f"nvrtc{function}")(*arguments):
        library().nvrtcGetErrorString.restype = ctypes.c_char_p
        reason = library().nvrtcGetErrorString(status).decode()
        raise RuntimeError(f"nvrtc{function}: {reason}")


# What decides the registers of a thread: the greediest surrogates, the most neurons, the longest
# single sweep of half precision and that of float32, segments with a rest.
OPTIONS = {
    "T": (1, 4, 8, 16, 23),
    "dtype": tuple(kernels.SCALARS),
    "v_reset": (0.0, -0.25, None, "counts"),
    "per_lane": (False, True),
    "v_seq": (False, True),
    "detach_reset": (False, True),
    "charge": tuple(Charge),
    "surrogate": ("Sigmoid", "S2NN", "QPseudoSpike"),
    "needs": ("no norm", NEED_NORM | ALL & ~NEED_X, NEED_NORM, ALL, NEED_NORM | ALL),
    "pack": (False, True),
}


def kernels_and_bytes() -> Iterator[tuple[str, int]]:
    """Names of kernels, and the bytes of the smallest array that a thread of each holds."""
    for row in pairwise(OPTIONS):
        norm = row["needs"] != "no norm"
        counts = row["v_reset"] == "counts" or row["charge"] == Charge.NO_STATE
        case = Case(
            None if counts else row["v_reset"],
            row["detach_reset"],
            dtype=row["dtype"],
            shape=(1, 1, 1),
            surrogate_function=(COUNTS["counts"] if counts else SURROGATES[row["surrogate"]])(),
            through=("spike_seq",),
        )
        spec = make_spec(case, steps=row["T"], norm=norm, pack=row["pack"])
        spec = spec._replace(dynamics=spec.dynamics._replace(charge=row["charge"]))
        needs, v_seq = row["needs"] if norm else ALL, row["v_seq"]
        is_sweep = row["T"] <= kernels.longest_sweep(row["dtype"])
        steps = row["T"] if is_sweep else kernels.SEGMENT
        for name, vec in (
            kernels.forward(spec._replace(store_v_seq=v_seq)),
            kernels.backward(spec, needs, v_seq),
        ):
            lanes = vec if row["per_lane"] else 1
            yield name.format(vec, lanes), 4 * steps * vec  # a voltage of each step
    yield from ((f"{what}_gradients<float>", 4 * 8) for what in ("norm", "parameter"))
    for dtype, scalar in kernels.SCALARS.items():
        vecs = (1, kernels.ALIGNMENT // dtype.itemsize)
        for what, vec, counts in itertools.product(("pack", "unpack"), vecs, (0, 1)):
            yield f"{what}<{scalar},{vec},{counts}>", 4 * max(2, vec)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the resources of the kernels, for the GPU here unless another is named."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    parser.add_argument("--arch", default="sm_{}{}".format(*here), help="such as sm_90")
    arch = parser.parse_args(arguments).arch
    start = time.perf_counter()
    found = resources(kernels.source(), [*dict(kernels_and_bytes())], arch)
    seconds = time.perf_counter() - start
    print(f"{len(found)} kernels for {arch} compiled in {seconds:.1f} s by {library()._name}")
    for name, r in found.items():
        print(f"{r.registers:4} registers, {r.spill_stores} bytes spilled: {name}")


if __name__ == "__main__":
    main()
