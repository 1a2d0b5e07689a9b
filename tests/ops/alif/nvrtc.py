"""NVRTC, NVIDIA's run-time compiler, called from Python: compiles the kernels without a GPU.

    python -m tests.ops.alif.nvrtc --arch sm_90

prints the registers and spills of the common kernels. The library comes with CUDA, with CUDA
builds of PyTorch and with the ``nvidia-cuda-nvrtc`` wheel.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import re
import sys
import time
from collections.abc import Sequence
from ctypes.util import find_library
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from sj_taid.ops.alif import kernels
from sj_taid.ops.alif.plan import Charge, Dynamics, Spec


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
    for name in (*wheels(sys.path), find_library("nvrtc")):
        if name:
            return ctypes.CDLL(str(name))
    raise OSError(
        "NVRTC (libnvrtc.so) was not found on sys.path or in the system; "
        "pip install nvidia-cuda-nvrtc"
    )


def version() -> str:
    """The version of CUDA that the library is of."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def wheels(path: list[str]) -> list[Path]:
    """The libraries of NVRTC's wheels on ``path``, ``libnvrtc.so.13`` and so on, newest first."""
    found = (p for entry in path for p in Path(entry).glob("nvidia/*/lib/libnvrtc.so.*"))
    return sorted(found, key=lambda p: [*map(int, re.findall(r"\d+", p.name))], reverse=True)


def resources(source: str, names: tuple[str, ...], arch: str) -> dict[str, Resources]:
    """Compile the kernels ``names`` (C++ name expressions) for ``arch``, such as ``"sm_90"``.

    Raises:
        RuntimeError: the source does not compile; the message is the compiler's log.
    """
    with _Program(source, names, (f"--gpu-architecture={arch}", "--ptxas-options=-v")) as program:
        log = program.log()
        mangled = {program.lowered_name(name): name for name in names}
    return {
        mangled[entry[: entry.index("'")]]: Resources(
            registers=_read_number(r"Used (\d+) registers", entry),
            spill_stores=_read_number(r"(\d+) bytes spill stores", entry),
            spill_loads=_read_number(r"(\d+) bytes spill loads", entry),
            stack=_read_number(r"(\d+) bytes stack frame", entry),
        )
        for entry in re.split(r"Compiling entry function '", log)[1:]
    }


def _read_number(pattern: str, entry: str) -> int:
    match = re.search(pattern, entry)
    if match is None:
        raise RuntimeError(f"expected {pattern!r} in ptxas's report, but it says:\n{entry}")
    return int(match.group(1))


class _Program:
    def __init__(self, source: str, names: tuple[str, ...], options: tuple[str, ...]) -> None:
        self._library = library()
        self._program = ctypes.c_void_p()
        self._call("CreateProgram", source.encode(), b"kernels.cu", 0, None, None, create=True)
        for name in names:
            self._call("AddNameExpression", name.encode())
        encoded = [option.encode() for option in (*kernels.COMPILER_OPTIONS, *options)]
        array = (ctypes.c_char_p * len(encoded))(*encoded)
        try:
            self._call("CompileProgram", len(encoded), array)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{self.log()}") from error

    def __enter__(self) -> _Program:
        return self

    def __exit__(self, *exception: object) -> None:
        self._library.nvrtcDestroyProgram(ctypes.byref(self._program))

    def log(self) -> str:
        return self._text("ProgramLog")

    def lowered_name(self, name: str) -> str:
        lowered = ctypes.c_char_p()
        self._call("GetLoweredName", name.encode(), ctypes.byref(lowered))
        return (lowered.value or b"").decode()

    def _text(self, what: str) -> str:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", buffer)
        return buffer.value.decode()

    def _call(self, function: str, *arguments: object, create: bool = False) -> None:
        program = ctypes.byref(self._program) if create else self._program
        status = getattr(self._library, f"nvrtc{function}")(program, *arguments)
        if status:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            reason = self._library.nvrtcGetErrorString(status).decode()
            raise RuntimeError(f"nvrtc{function}: {reason}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the resources of the common kernels."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    parser.add_argument("--arch", default="sm_{}{}".format(*here), help="such as sm_90")
    arch = parser.parse_args(arguments).arch
    needs = kernels.NEED_X | kernels.NEED_W | kernels.NEED_V_THRESHOLD
    names = []
    for dtype, steps in itertools.product(kernels.SCALARS, (1, 2, 4, 8, 16, 24)):
        dynamics = Dynamics(Charge.DECAY_INPUT, None, None, 0.0, False, "Sigmoid", 0.0, 0.0)
        about = (dynamics, dtype, torch.device("cuda"), steps, 1, 1, 1, (), (), *[False] * 6)
        spec = Spec(*about)
        for name, vec in (kernels.forward(spec), kernels.backward(spec, needs, False)):
            names.append(name.format(vec, 1))
    start = time.perf_counter()
    found = resources(kernels.source(), tuple(dict.fromkeys(names)), arch)
    seconds = time.perf_counter() - start
    print(f"NVRTC {version()}: {len(found)} kernels for {arch} compiled in {seconds:.1f} s")
    for name, r in found.items():
        print(f"{r.registers:4} registers, {r.spill_stores} bytes spilled: {name}")


if __name__ == "__main__":
    main()
