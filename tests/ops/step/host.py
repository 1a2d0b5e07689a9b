"""The cupy backend on a machine with no GPU: the driver's calls go to a g++ build of the kernels.

``cuda.py`` is loaded as it is, over a stand-in for CuPy whose ``RawModule`` hands out functions of
the very text of ``kernels.cu``, compiled as C++ under ``prelude.h``. So what is tested is the whole
way from ``multi_step`` to the kernel: the choice of the kernel, the grid, the arguments' order and
width, the arithmetic. Only the GPU's own parallel execution is not.
"""

import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import pytest
import torch

from sj_taid.ops.step import autograd, readings
from sj_taid.ops.step.plan import ENGINES
from tests.helpers import results

GXX = shutil.which("g++")
FLAGS = (
    *("-std=c++17", "-O0", "-shared", "-fPIC", "-w"),
    "-fvisibility=hidden",  # or libraries share what is static in a function
    "-nostdinc++",  # C's own math.h, a quarter of the time
    "-ffp-contract=off",  # as NVRTC's --fmad=false
    "-fno-strict-aliasing",  # floats are moved in words of integers, as is usual in CUDA
)

needs_gxx = pytest.mark.skipif(GXX is None, reason="needs g++ to compile kernels.cu as C++")

LAUNCHER = Path(autograd.__file__).with_name("cuda.py")
PRELUDE = Path(__file__).with_name("prelude.h")
_LARGEST_UNIT = 80  # kernels a library


def shifted(t):
    """A copy that starts at an odd multiple of its items, in the same layout."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
    return memory.as_strided(t.shape, t.stride()).copy_(t)


class CompileError(Exception):
    """In the place of CuPy's ``CompileException``."""


class Host:
    """A GPU's stand-in: compiles kernels with g++, runs them, and records every launch."""

    def __init__(self, directory, edit=str, flags=(), launcher=LAUNCHER):
        self.directory = directory
        self.edit = edit  # of the kernels' text
        self.launcher = launcher  # the file
        self.flags = (*FLAGS, *flags)
        self.launches = []
        self.guarded = []  # the devices made current
        self.dry = None  # a set while only texts and names of the kernels are collected
        self._functions = {}
        self.current = threading.local()  # a thread's device and stream
        self.cuda = self.load_cuda(self.make_cupy())

    def collect(self, run):
        """The texts and names of the kernels that ``run`` launches, without running them."""
        self.dry = set()
        try:
            run()
            return self.dry
        finally:
            self.dry = None

    def kernels(self, case):
        """The names of the kernels that a case launches."""
        return self.collect(lambda: results(self.cuda.multi_step, case))

    def build(self, kernels):
        """Compile the ``kernels``, texts and names, that are not there, two libraries at a time."""
        missing = sorted(set(kernels) - self._functions.keys())  # those of a text are neighbours
        size = -(-len(missing) // -(-len(missing) // _LARGEST_UNIT)) if missing else 1
        units = [missing[i : i + size] for i in range(0, len(missing), size)]
        with ThreadPoolExecutor(2) as pool:
            for library, unit in zip(pool.map(self._compile, units), units, strict=True):
                for i, kernel in enumerate(unit):
                    found = (getattr(library, f"kernel_{i}{end}") for end in ("", "_size"))
                    function, size = found
                    self._functions[kernel] = function, size(), library.take_end

    def _compile(self, kernels):
        exports = defaultdict(str)
        for i, (source, name) in enumerate(kernels):
            exports[source] += f"EXPORT(kernel_{i}, {name})\n"
        text = f'#include "{PRELUDE}"\n'
        for i, (source, lines) in enumerate(exports.items()):
            text += f"namespace text_{i} {{\nusing ::load_word;\n{source}\n{lines}}}\n"
        key = f"{self.flags}{text}{PRELUDE.read_text()}"
        key = hashlib.sha256(key.encode()).hexdigest()[:16]
        unit = self.directory / f"{key}.cpp"
        unit.write_text(text)
        library = unit.with_suffix(".so")
        subprocess.run([GXX, *self.flags, unit, "-o", library], check=True)
        loaded = ctypes.CDLL(str(library))
        loaded.take_end.restype = ctypes.c_void_p
        return loaded

    def load_cuda(self, cupy):
        """``cuda.py`` over this CuPy, under a name of its own."""
        name = "sj_taid.ops.step.cuda_on_host"
        spec = importlib.util.spec_from_file_location(name, self.launcher)
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "cupy", cupy)
            patch.setitem(ENGINES, "cuda", None)  # a GPU's own is back afterwards
            spec.loader.exec_module(module)
        module._capacity = lambda device: 16
        # Of each kernel another number runs at a time, by its registers.
        module._resident = lambda device, name, source: 4 + crc32(name.encode()) % 13
        return module

    def make_cupy(self):
        return SimpleNamespace(
            __version__="14.2.0",
            RawModule=self._module,
            cuda=SimpleNamespace(
                runtime=SimpleNamespace(getDeviceCount=lambda: 1, driverGetVersion=lambda: 13010),
                nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)),
                function=SimpleNamespace(CPointer=Address),
                compiler=SimpleNamespace(CompileException=CompileError),
            ),
        )

    def _module(self, code, options, name_expressions):
        source = self.edit(code)
        return SimpleNamespace(get_function=lambda name: partial(self._launch, source, name))

    def _launch(self, source, name, grid, block, arguments, *, stream):
        if self.dry is not None:
            self.dry.add((source, name))
            return
        if (source, name) not in self._functions:
            self.build([(source, name)])
        function, size, take_end = self._functions[source, name]
        (struct,) = arguments
        assert struct.size == size, f"the struct of {name}"
        function(*grid, *block, ctypes.c_void_p(struct.ptr))
        about = {"name": name, "stream": stream.ptr, "device": self._get("device")}
        self.launches.append(SimpleNamespace(**about, read_to=take_end()))

    @contextmanager
    def patched(self):
        """The parts of ``torch.cuda`` that the launcher calls, for tensors on the CPU."""

        @contextmanager
        def device(index):
            before, self.current.device = self._get("device"), index
            self.guarded.append(index)
            yield
            self.current.device = before

        stand_ins = {
            "_cuda_getDevice": lambda: self._get("device"),
            "_cuda_getCurrentRawStream": lambda device: self._get("stream"),
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "device", device)
            # A first call's check would launch kernels too; tests/ops/step has it.
            patch.setattr(readings, "verify", lambda *arguments: None)
            for name, function in stand_ins.items():
                patch.setattr(torch._C, name, function, raising=False)
            yield self

    def _get(self, name):
        return getattr(self.current, name, None)


class Address:
    """CuPy 14's ``CPointer``: of what the driver copies, here with its size."""

    ptr = 0  # of the class too

    def __init__(self, ptr):
        struct = sys._getframe(1).f_locals["struct"]
        assert struct.buffer_info()[0] == ptr
        self.ptr, self.size = ptr, len(struct) * struct.itemsize
