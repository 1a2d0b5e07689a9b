"""NVRTC, NVIDIA's run-time compiler, called from Python: compiles the kernels without a GPU.

    python -m tests.ops.step.nvrtc --arch sm_90

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
from spikingjelly.activation_based import neuron

from sj_taid._internal import compat
from sj_taid.ops.step import kernels
from sj_taid.ops.step.kernels import NEED_NORM, NEED_TOTAL, NEED_X
from sj_taid.ops.step.plan import spec_of
from sj_taid.ops.step.program import Reading
from sj_taid.ops.step.record import Neuron, Notes
from tests.helpers import Case
from tests.ops.step.conformance import COUNTS, make_reading, pairwise


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


# What decides the registers of a thread: the most neurons, the longest single sweep of half
# precision and that of float32, segments with a rest.
OPTIONS = {
    "T": (1, 4, 8, 16, 23),
    "dtype": tuple(kernels.SCALARS),
    "per_lane": (False, True),
    "v_seq": (False, True),
    "needs": ("x", "all", "norm", "norm and sums", "all and norm"),
    "pack": (False, True),
}
#: neurons of SpikingJelly's, of one to two states; the installed version may lack some
NEURONS = (
    *("IFNode", "LIFNode", "KLIFNode", "QIFNode", "EIFNode", "TernaryLIFNode"),
    *("ComplementaryLIFNode", "CUBALIFNode", "IzhikevichNode"),
)


def readings() -> Iterator[tuple[str, Reading]]:
    """Neurons that kernels are compiled for."""
    yield "ALIF", make_reading(Case())
    yield "ALIF of counts", make_reading(Case(None, surrogate_function=COUNTS["counts"]()))
    for name in NEURONS:
        if hasattr(neuron, name):
            node = getattr(neuron, name)()
            yield name, Neuron(node, compat.step_of(type(node))).read((2, 3, 5, 7), Notes())


class Kernel(NamedTuple):
    """A kernel of a neuron, and the bytes of the smallest array that a thread of it holds."""

    neuron: str
    source: str
    name: str
    bytes: int


def neuron_kernels() -> Iterator[Kernel]:
    """Those of each neuron, over pairs of options that differ from neuron to neuron."""
    rows = [*pairwise(OPTIONS)]
    for turn, (who, reading) in enumerate(readings()):
        for row in rows[turn % 9 :: 9]:
            has_norm = "norm" in row["needs"]
            needs = NEED_X * (row["needs"][:3] != "nor") | NEED_NORM * has_norm
            if row["needs"] not in ("x", "norm"):
                needs |= sum(NEED_TOTAL << k for k in range(len(reading.program.totals)))
            x = torch.empty(row["T"], 1, 1, dtype=row["dtype"])
            spec = spec_of(x, reading, has_norm, False, row["v_seq"], row["pack"], True)
            held = kernels.longest_sweep(x.dtype, reading.states)
            held = row["T"] if row["T"] <= held else kernels.SEGMENT
            for name, vec in (kernels.forward(spec), kernels.backward(spec, needs, row["v_seq"])):
                lanes = vec if row["per_lane"] else 1
                size = 4 * held * vec  # a state of each step
                yield Kernel(who, kernels.source_of(spec), name.format(vec, lanes), size)


def other_kernels() -> Iterator[Kernel]:
    """Those that know of no neuron."""
    source = kernels.source()
    for what in ("norm", "parameter"):
        yield Kernel("", source, f"{what}_gradients<float>", 4 * 8)
    for dtype, scalar in kernels.SCALARS.items():
        vecs = (1, kernels.ALIGNMENT // dtype.itemsize)
        for what, vec, counts in itertools.product(("pack", "unpack"), vecs, (0, 1)):
            yield Kernel("", source, f"{what}<{scalar},{vec},{counts}>", 4 * max(2, vec))


def compile_all(arch: str) -> Iterator[tuple[Kernel, Resources]]:
    """What ptxas says of all of them."""
    by_source: dict[str, dict[str, Kernel]] = {}
    for kernel in (*neuron_kernels(), *other_kernels()):
        by_source.setdefault(kernel.source, {})[kernel.name] = kernel
    for source, named in by_source.items():
        found = resources(source, [*named], arch)
        yield from ((named[name], numbers) for name, numbers in found.items())


#: ALIF's launches: whether behind a norm, and what backward makes
LAUNCHES = {
    "forward": (False, 0),
    "backward": (False, NEED_X | NEED_TOTAL | NEED_TOTAL << 1),
    "norm: forward": (True, 0),
    "norm: sums": (True, NEED_NORM),
    "norm: backward": (True, NEED_X | NEED_TOTAL | NEED_TOTAL << 1),
}


def alif_table(arch: str) -> str:
    """Registers and bytes spilled of the default ALIF's launches, in Markdown."""
    version = ctypes.c_int(), ctypes.c_int()
    _call("Version", *map(ctypes.byref, version))
    about = "{}, NVRTC {}.{}".format(arch, *(number.value for number in version))
    rows = [[about, *LAUNCHES], ["---"] * 6]
    reading = make_reading(Case())
    for dtype, T in itertools.product((torch.float32, torch.bfloat16), (4, 8, 16, 32)):
        x, names = torch.empty(T, 1, 1, dtype=dtype), []
        for norm, needs in LAUNCHES.values():
            spec = spec_of(x, reading, norm, False, False, True, True)
            name, vec = kernels.backward(spec, needs, False) if needs else kernels.forward(spec)
            names.append(name.format(vec, 1))
        found = resources(kernels.source_of(spec), names, arch)
        cells = (f"{found[name].registers}, {found[name].spill_stores}" for name in names)
        rows.append([f"{kernels.SCALARS[dtype]}, T = {T}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the resources of the kernels, for the GPU here unless another is named."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    parser.add_argument("--arch", default="sm_{}{}".format(*here), help="such as sm_90")
    arch = parser.parse_args(arguments).arch
    start = time.perf_counter()
    found = [*compile_all(arch)]
    seconds = time.perf_counter() - start
    print(f"{len(found)} kernels for {arch} compiled in {seconds:.1f} s by {library()._name}")
    for kernel, r in found:
        about = f"{kernel.neuron}: {kernel.name}"
        print(f"{r.registers:4} registers, {r.spill_stores} bytes spilled: {about}")
    print(alif_table(arch))


if __name__ == "__main__":
    main()
