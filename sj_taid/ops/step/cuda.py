"""Backend "cupy": the fused kernels on an NVIDIA GPU, compiled and launched by CuPy.

The only module that imports CuPy. Memory comes from PyTorch alone; launches go to the tensor's
device and PyTorch's current stream, read at every launch (backward runs in another thread).
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable
from functools import cache, lru_cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import cupy
import torch
from torch import Tensor

from .. import bits
from . import autograd, fused, kernels
from .kernels import NEED_NORM, NEED_TOTAL, NEED_X, Grid
from .plan import ENGINES, Engine, Plan, Spec
from .program import MOST_TOTALS

if torch.version.hip:
    raise ImportError("the kernels are for NVIDIA GPUs, not for ROCm")
# CuPy imports without a driver and without NVRTC, and fails at the first call: rather fail here.
cupy.cuda.runtime.getDeviceCount()
_Address = cupy.cuda.function.CPointer  # what CuPy passes to the driver as it is
if not hasattr(_Address, "ptr"):  # CuPy 13 takes a number's own address for the address it is
    raise ImportError(f"CuPy is older than 14: expected 14.2 or later, found {cupy.__version__}")
#: of NVRTC, which compiles the kernels
nvrtc_version: tuple[int, int] = cupy.cuda.nvrtc.getVersion()


def _is_known(capability: tuple[int, int]) -> bool:
    """Whether NVRTC compiles for a GPU; for a newer one CuPy takes the newest that NVRTC knows."""
    known = cupy.cuda.nvrtc.getSupportedArchs()
    architecture = min(10 * capability[0] + capability[1], max(known))
    return architecture in known and architecture // 10 == capability[0]


def _check_compiler() -> None:
    """Raise if NVRTC cannot compile for the GPUs here, or is not trusted with one of them."""
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    # One that it knows is enough: torch of the same CUDA does not run on the others either.
    if gpus and not any(map(_is_known, gpus)):
        version, gpu = ("{}.{}".format(*pair) for pair in (nvrtc_version, gpus[0]))
        raise ImportError(
            f"NVRTC {version} cannot compile for compute capability {gpu}: take torch and CuPy of "
            "another CUDA, 12 for a GPU older than 7.5"
        )
    if (13, 1) <= nvrtc_version <= (13, 3) and any(major >= 10 for major, _ in gpus):
        raise ImportError(
            "NVRTC 13.1 to 13.3 is not trusted on compute capability 10 and 12: there it failed on "
            "kernels of other projects or miscompiled them, though none of ours is known. On Linux "
            "put another next to torch's: pip install --target ~/nvrtc 'nvidia-cuda-nvrtc==13.4.*' "
            "and export LD_PRELOAD=~/nvrtc/nvidia/cu13/lib/libnvrtc.so.13 (docs/install.md)"
        )


_check_compiler()

#: Launches by a kernel's name in ``kernels.cu``, which prove that a call took this path.
launches: Counter[str] = Counter()

unsupported = partial(autograd.unsupported, "cuda", tuple(kernels.SCALARS))


class _Launch(NamedTuple):
    """A kernel on a device, its grid, and the fields of its argument that every call repeats."""

    name: str
    device: int | None
    kernel: Any
    blocks: tuple[int]
    threads: tuple[int]
    constants: array[int]
    sums: tuple[int, int]  #: the shape of what its threads write to be added up, if anything

    def __call__(self, *tensors: Tensor | None, v_init: tuple[float, ...] = ()) -> None:
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                self(*tensors, v_init=v_init)
            return
        struct = self.constants[:]
        for tensor in tensors:
            struct.append(0 if tensor is None else tensor.data_ptr())
        if v_init:
            struct.extend(_words("f", *v_init))
        stream = SimpleNamespace(ptr=torch._C._cuda_getCurrentRawStream(self.device))
        # The driver copies the struct before this returns.
        arguments = (_Address(struct.buffer_info()[0]),)
        self.kernel(self.blocks, self.threads, arguments, stream=stream)
        launches[self.name] += 1


class CudaPlan(Plan):
    """The plan of the kernels."""

    def __init__(self, spec: Spec) -> None:
        states = spec.reading.states
        saved = kernels.checkpoints(spec.steps, spec.dtype, states) if spec.saves else 0
        super().__init__(spec, spec.dtype, saved * max(1, states), kernels.packs_bits(spec), pack)
        self.no_state = () if states else (None,)  # arrays of C++ are not empty
        self.no_operand = () if spec.reading.operands else (None,)
        self.last_operand = self.first + spec.reading.operands
        self.prepare_forward = cache(partial(_prepare_forward, spec))

    def pad(self, operands: Any) -> Any:
        """Operands as the kernels' struct has them."""
        first, last = self.first, self.last_operand
        x, *states = operands[:first]
        values = *operands[first:last], *self.no_operand
        return x, *states, *self.no_state, *values, *operands[last:]

    def start_forward(self, v_init: Any, operands: Any, outputs: Any) -> None:
        # What torch allocates is aligned.
        launch = self.prepare_forward(kernels.is_aligned(*operands[: self.first]))
        first = self.first
        padded = *self.pad(operands), *outputs[:first], *self.no_state, *outputs[first:]
        launch(*padded, v_init=v_init or (0.0,))

    def prepare(self, needs: Any, wanted: tuple[int, ...], used: Any) -> Callable[..., None]:
        launches = cache(partial(_prepare_backward, self.spec, needs, wanted))
        return partial(self.start_backward, launches)

    def start_backward(self, launches: Any, v_init: Any, *tensors: Any) -> None:
        first, last = self.first, self.last_operand + 4
        operands, upstream = tensors[:last], tensors[last:][: first + 2]
        if upstream[0] is None:  # unused spikes are too rare for kernels of their own
            upstream = torch.zeros_like(operands[0]), *upstream[1:]
        grad_x, *grads = tensors[last:][first + 2 :]
        grad_v0, (weight, bias, *totals) = grads[: first - 1], grads[first - 1 :]
        run = launches(
            upstream[first] is not None, kernels.is_aligned(*operands[:first], *upstream)
        )
        norm, ab, v_init = operands[-4:], None, v_init or (0.0,)
        padded = *self.pad(operands), *upstream[:first], *self.no_state, *upstream[first:]
        if run.first:
            ab, sums = self.new((2, self.spec.channels)), self.new(run.first.sums)
            nothing = [None] * max(1, len(grad_v0))
            run.first(*padded, None, *nothing, None, sums, v_init=v_init)
            run.norm(sums, *norm, ab, weight, bias)
        sums = self.new(run.main.sums)
        run.main(*padded, grad_x, *grad_v0, *self.no_state, ab, sums, v_init=v_init)
        if run.norm and not run.first:
            run.norm(sums, *norm, None, weight, bias)
        for launch, which in run.totals:
            launch(sums, *[totals[k] for k in which], *[None] * (MOST_TOTALS - len(which)))


class _Backward(NamedTuple):
    """The launches of a backward, or ``None``."""

    first: Any  #: makes the norm's sums alone, where x's gradient needs them
    norm: Any
    main: _Launch
    totals: tuple[tuple[_Launch, list[int]], ...]  #: with which totals each makes


def _prepare_forward(spec: Spec, aligned: bool) -> _Launch:
    return _prepare_threads(spec, kernels.forward(spec), aligned)[0]


def _prepare_backward(
    spec: Spec, needs: Any, wanted: tuple[int, ...], v_seq: bool, aligned: bool
) -> _Backward:
    def prepare(needs: int, totals: int = 0) -> tuple[_Launch, Grid]:
        kernel = kernels.backward(spec, needs, v_seq)
        return _prepare_threads(spec, kernel, aligned, 2 * bool(needs & NEED_NORM) + totals)

    needs_x, needs_norm = needs[0], needs[-1]
    both = spec.norm and needs_x and not spec.fixed_norm
    # By running statistics x's gradient has no terms to subtract, which the kernel knows by this.
    norm_sums = spec.norm and not both and (needs_norm or spec.fixed_norm)
    first, norm_grid = prepare(NEED_NORM) if both else (None, None)
    learns = sum(NEED_TOTAL << k for k in wanted)
    main, grid = prepare(NEED_X * needs_x | learns | NEED_NORM * norm_sums, len(wanted))
    norm, totals = None, []
    if both or needs_norm:
        count = _words("d", spec.steps * spec.neurons / max(1, spec.channels))
        norm = _prepare_adders(spec, "norm_gradients<float>", (norm_grid or grid).partials, count)
    for per_channel in (True, False):
        which = [k for k in wanted if spec.reading.total_channels[k] is per_channel]
        if which:
            partials = grid.partials if per_channel else (grid.threads * grid.lanes, 1, 1)
            places = [2 * norm_sums + wanted.index(k) for k in which]
            more = array("q", [*places, *[0] * (MOST_TOTALS - len(which))])
            name = "parameter_gradients<float>"
            totals.append((_prepare_adders(spec, name, partials, more, len(which)), which))
    return _Backward(first, norm, main, tuple(totals))


def pack(values: Tensor, most: int = 1) -> Tensor:
    """:func:`.bits.pack` in one launch."""
    size = bits.size_of(values, most)
    packed = values.new_empty(bits.packed_shape(most, *size), dtype=torch.uint8)
    _launch_packing("pack", values, packed, size)
    return packed


def unpack_into(packed: Tensor, values: Tensor) -> None:
    """:func:`.bits.unpack_into` in one launch."""
    _launch_packing("unpack", values, packed, bits.size_of_packed(packed, values))


def _launch_packing(name: str, values: Tensor, packed: Tensor, size: tuple[int, int]) -> None:
    about = packed.dim() == 1, kernels.is_aligned(values, packed)
    _prepare_packing(name, values.dtype, values.device, size, *about)(values, packed)


@lru_cache(maxsize=1024)
def _prepare_packing(
    name: str, dtype: torch.dtype, device: Any, size: tuple[int, int], counts: bool, aligned: bool
) -> _Launch:
    steps, neurons = size
    vec = kernels.ALIGNMENT // dtype.itemsize  # bytes of a thread, and neighbouring values
    if not aligned or neurons % (2 * vec if counts else vec):
        vec = 1
    most = bits.LARGEST_COUNT if counts else 1
    threads = math.prod(bits.packed_shape(most, steps, neurons)) // vec
    constants, blocks = array("q", (threads, steps, neurons)), -(-threads // kernels.BLOCK)
    kernel = f"{name}<{kernels.SCALARS[dtype]},{vec},{counts:d}>"
    return _prepare(device, kernel, constants, blocks)


ENGINES["cuda"] = ENGINE = Engine(CudaPlan, pack, unpack_into)
#: :func:`sj_taid.ops.step.reference.multi_step`, fused
multi_step = partial(fused.multi_step, ENGINE)


def _words(kind: str, *values: float) -> array[int]:
    """Floats in 8 bytes each ("d"), or two by two ("f")."""
    if kind == "f" and len(values) % 2:
        values = *values, 0.0
    return array("q", array(kind, values).tobytes())


def _constants(spec: Spec) -> array[int]:
    strides = spec.reading.operand_channels or (False,)
    return array("q", (spec.steps, *strides)) + _words("f", *(spec.reading.constants or (0.0,)))


def _prepare_threads(
    spec: Spec, kernel: tuple[str, int], aligned: bool, sums: int = 0
) -> tuple[_Launch, Grid]:
    """A launch of the threads that run at a time; each writes its ``sums``."""
    (name, vec), source = kernel, kernels.source_of(spec)

    def resident(vec: int, lanes: int) -> int:
        return _resident(spec.device, name.format(vec, lanes), source)

    layout = (spec.neurons, spec.inner, spec.channels)
    grid = kernels.grid(*layout, vec, aligned, _capacity(spec.device), resident)
    constants, size = array("q", grid[:4]) + _constants(spec), (sums, grid.threads * grid.lanes)
    name = name.format(grid.vec, grid.lanes)
    blocks = -(-grid.threads // kernels.BLOCK)
    return _prepare(spec.device, name, constants, blocks, sums=size, source=source), grid


def _prepare_adders(
    spec: Spec, name: str, partials: tuple[int, ...], more: array[int], turns: int = 1
) -> _Launch:
    """A launch of a block per channel, ``turns`` times, that adds up what threads wrote."""
    constants, blocks = array("q", partials) + more, partials[-1] * turns
    return _prepare(spec.device, name, constants, blocks, kernels.ADDERS)


def _prepare(
    device: torch.device,
    name: str,
    constants: array[int],
    blocks: int,
    threads: int = kernels.BLOCK,
    sums: tuple[int, int] = (0, 0),
    source: str | None = None,
) -> _Launch:
    short, kernel = name.partition("<")[0], _function(device.index, name, source)
    # Without work too: then sums are of nothing.
    return _Launch(short, device.index, kernel, (max(1, blocks),), (threads,), constants, sums)


@cache
def _function(device: int | None, name: str, source: str | None = None) -> Any:
    """The kernel ``name`` loaded on ``device``: compiled by NVRTC once, saved on disk by CuPy."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a kernel is not loaded yet, and a CUDA graph being captured cannot load it: "
            "run one training step before capturing"
        )
    module = cupy.RawModule(
        code=source or kernels.source(), options=kernels.COMPILER_OPTIONS, name_expressions=(name,)
    )
    try:
        with torch.cuda.device(device):
            return module.get_function(name)
    except cupy.cuda.compiler.CompileException as error:
        raise RuntimeError(f"NVRTC could not compile {name}:\n{error}") from error


def _capacity(device: torch.device) -> int:
    """How many threads the GPU holds at a time."""
    return kernels.resident_threads(1, *_processors(device))


@cache
def _resident(device: torch.device, name: str, source: str) -> int:
    """How many threads of the kernel ``name`` the GPU runs at a time."""
    with torch.cuda.device(device):
        registers = _function(device.index, name, source).num_regs
    return kernels.resident_threads(registers, *_processors(device))


@cache
def _processors(device: torch.device) -> tuple[int, int]:
    """How many multiprocessors the GPU has, and how many threads each of them holds."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.max_threads_per_multi_processor
