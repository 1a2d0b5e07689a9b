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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sj_taid.ops.alif import autograd, kernels
from tests.helpers import results

GXX = shutil.which("g++")
FLAGS = (
    *("-std=c++17", "-O1", "-shared", "-fPIC", "-w"),
    "-ffp-contract=off",  # as NVRTC's --fmad=false
    "-fno-strict-aliasing",  # floats are moved in words of integers, as is usual in CUDA
)

needs_gxx = pytest.mark.skipif(GXX is None, reason="needs g++ to compile kernels.cu as C++")

_PRELUDE = Path(__file__).with_name("prelude.h")
_AT_A_TIME = 2  # libraries built side by side
_LARGEST_UNIT = 80  # kernels a library


class CompileError(Exception):
    """In the place of CuPy's ``CompileException``."""


class Host:
    """A GPU's stand-in: compiles kernels with g++, runs them, and records every launch."""

    def __init__(self, directory, source=None, flags=()):
        self.directory = directory
        self.source = source or kernels.source()
        self.flags = (*FLAGS, *flags)
        self.launches = []
        self.capacity = 16
        self.dry = None  # a set while only the names of the kernels are collected
        self._functions = {}
        self._device = self._stream = None
        self.cuda = self.load_cuda(self.make_cupy())

    def collect(self, run):
        """The kernels that ``run`` launches, without running them."""
        self.dry = set()
        try:
            run()
            return self.dry
        finally:
            self.dry = None

    def kernels(self, case):
        """The names of the kernels that a case launches."""
        return self.collect(lambda: results(self.cuda.multi_step, case))

    def build(self, names):
        """Compile the kernels ``names`` that are not yet there, a few libraries side by side."""
        missing = sorted(set(names) - self._functions.keys())
        count = max(_AT_A_TIME, -(-len(missing) // _LARGEST_UNIT))
        units = [unit for unit in (missing[i::count] for i in range(count)) if unit]
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            for library, unit in zip(pool.map(self._compile, units), units, strict=True):
                for i, name in enumerate(unit):
                    function = getattr(library, f"kernel_{i}")
                    widths = getattr(library, f"kernel_{i}_widths")
                    widths.restype = ctypes.POINTER(ctypes.c_int)
                    self._functions[name] = function, widths()

    def _compile(self, names):
        exports = "".join(f"EXPORT(kernel_{i}, {name})\n" for i, name in enumerate(names))
        text = f'#include "{_PRELUDE}"\n{self.source}\n{exports}'
        key = hashlib.sha256((text + _PRELUDE.read_text()).encode()).hexdigest()[:16]
        unit = self.directory / f"{key}.cpp"
        unit.write_text(text)
        library = unit.with_suffix(".so")
        subprocess.run([GXX, *self.flags, unit, "-o", library], check=True)
        return ctypes.CDLL(str(library))

    def load_cuda(self, cupy):
        """``cuda.py`` over this CuPy, under a name of its own and without its operators."""
        path = Path(autograd.__file__).with_name("cuda.py")
        spec = importlib.util.spec_from_file_location("sj_taid.ops.alif.cuda_on_host", path)
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "cupy", cupy)
            patch.setattr(autograd, "register", lambda name, key, engine: engine)
            spec.loader.exec_module(module)
        self.real = SimpleNamespace(capacity=module._capacity, resident=module._resident)
        module._capacity = lambda device: self.capacity
        module._resident = lambda device, name: self.capacity
        return module

    def make_cupy(self):
        @contextmanager
        def from_external(stream):
            self._stream = stream.__cuda_stream__()
            yield
            self._stream = None

        return SimpleNamespace(
            RawModule=self._module,
            cuda=SimpleNamespace(
                runtime=SimpleNamespace(getDeviceCount=lambda: 1, driverGetVersion=lambda: 13010),
                nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)),
                Stream=SimpleNamespace(from_external=from_external),
                compiler=SimpleNamespace(CompileException=CompileError),
            ),
        )

    def _module(self, code, options, name_expressions):
        return SimpleNamespace(get_function=lambda name: lambda *call: self._launch(name, *call))

    def _launch(self, name, grid, block, arguments):
        if self.dry is not None:
            self.dry.add(name)
            return
        if name not in self._functions:
            self.build([name])
        function, widths = self._functions[name]
        values = [_as_cupy_passes(argument) for argument in arguments]
        expected = [widths[i] for i in range(len(values) + 1)]
        assert [ctypes.sizeof(v) for v in values] + [0] == expected, f"arguments of {name}"
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        function(*grid, *block, pointers)
        self.launches.append(
            SimpleNamespace(
                name=name, grid=grid, block=block, stream=self._stream, device=self._device
            )
        )

    @contextmanager
    def patched(self):
        """The parts of ``torch.cuda`` that the launcher calls, for tensors on the CPU."""

        @contextmanager
        def device(index):
            self._device = index
            yield
            self._device = None

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "device", device)
            patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0x5EED))
            yield self


def _as_cupy_passes(argument):
    """CuPy's rule: a Python int takes 64 bits, a NumPy scalar its own width."""
    if type(argument) is int:
        return ctypes.c_longlong(argument)
    if type(argument) is np.float32:
        return ctypes.c_float(argument)
    raise TypeError(f"CuPy would pass {argument!r} in a width the kernels do not expect")
