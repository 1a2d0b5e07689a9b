"""Backend "cupy": the fused kernels on an NVIDIA GPU, compiled and launched by CuPy.

The only module that imports CuPy. Memory comes from PyTorch alone; launches go to the tensor's
device and PyTorch's current stream, read at every launch (backward runs in another thread).
"""

from __future__ import annotations

from array import array
from collections import Counter
from functools import cache, lru_cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import cupy
import torch
from torch import Tensor

from .. import bits
from . import autograd, kernels
from .kernels import NEED_NORM, NEED_V_THRESHOLD, NEED_W, NEED_X, Grid, Kernel
from .plan import Engine, Needs, Norm, Spec

if torch.version.hip:
    raise ImportError("the kernels are for NVIDIA GPUs, not for ROCm")
# CuPy imports without a driver and without NVRTC, and fails at the first call: rather fail here.
cupy.cuda.runtime.getDeviceCount()
_Address = cupy.cuda.function.CPointer  # what CuPy passes to the driver as it is
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

_Maybe = Tensor | None
_NO_NORM = (None,) * len(Norm._fields)


class _Launch(NamedTuple):
    """A kernel on a device, its grid, and what no call changes of the struct that it takes."""

    name: str
    device: int | None
    kernel: Any
    blocks: tuple[int]
    threads: tuple[int]
    constants: array[int]
    sums: tuple[int, int]  #: the shape of what its threads write to be added up, if anything

    def __call__(self, *tensors: _Maybe, v_init: float | None = None) -> None:
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                self(*tensors, v_init=v_init)
            return
        struct = self.constants[:]
        for tensor in tensors:
            struct.append(0 if tensor is None else tensor.data_ptr())
        if v_init is not None:
            struct.frombytes(array("f", (v_init, 0.0)).tobytes())
        stream = SimpleNamespace(ptr=torch._C._cuda_getCurrentRawStream(self.device))
        # The driver copies the struct before this returns.
        arguments = (_Address(struct.buffer_info()[0]),)
        self.kernel(self.blocks, self.threads, arguments, stream=stream)
        launches[self.name] += 1


class CudaPlan:
    """The :class:`.plan.Plan` of the kernels."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.prepare_forward = cache(partial(_prepare_forward, spec))
        self.prepare_backward = cache(partial(_prepare_backward, spec))
        on: dict[str, Any] = {"device": spec.device}
        float32: dict[str, Any] = on | {"dtype": torch.float32}
        order, step = (spec.shape, spec.strides), (spec.shape[1:], spec.strides[1:])
        self.new = partial(torch.empty, **float32)
        self.new_v = partial(torch.empty_strided, *step, **float32)
        self.new_v_seq = partial(torch.empty_strided, *order, **float32)
        self.new_spikes = partial(torch.empty_strided, *order, dtype=spec.dtype, **on)
        size = bits.packed_shape(1, spec.steps, spec.neurons)
        self.new_bits = partial(torch.empty, size, dtype=torch.uint8, **on)
        #: whether forward packs its spikes, or a kernel of their own its counts
        self.packs = spec.pack and not spec.dynamics.counts
        self.packs_after = spec.pack and spec.dynamics.counts
        saved = kernels.checkpoints(spec.steps, spec.dtype) if spec.saves else 0
        self.checkpoint, self.has_checkpoint = (saved, spec.neurons), saved > 0

    def forward(
        self, x: Tensor, v0: _Maybe, v_init: float, w: _Maybe, v_threshold: _Maybe,
        norm: Norm | None,
    ) -> tuple[Tensor, Tensor, _Maybe, _Maybe, _Maybe]:  # fmt: skip
        launch = self.prepare_forward(kernels.is_aligned(x, v0))  # what torch allocates is
        outputs = (
            self.new_spikes(),
            self.new_v(),
            self.new_v_seq() if self.spec.store_v_seq else None,
            self.new(self.checkpoint) if self.has_checkpoint else None,
            self.new_bits() if self.packs else None,
        )
        launch(x, v0, *outputs, w, v_threshold, *(norm or _NO_NORM), v_init=v_init)
        if not self.packs_after:
            return outputs
        levels = self.spec.dynamics.levels
        return *outputs[:4], bits.pack_whole(outputs[0], levels, pack, pack_counts)

    def backward(
        self, needs: Needs, grad_spike: _Maybe, grad_v: _Maybe, grad_v_seq: _Maybe, x: Tensor,
        v0: _Maybe, v_init: float, w: _Maybe, v_threshold: _Maybe, checkpoint: _Maybe,
        norm: Norm | None,
    ) -> tuple[_Maybe, ...]:  # fmt: skip
        if grad_spike is None:  # unused spikes are too rare for kernels of their own
            grad_spike = torch.zeros_like(x)
        given = (grad_spike, grad_v, grad_v_seq, x, v0, checkpoint)
        parameters = (w, v_threshold, *(norm or _NO_NORM))
        run = self.prepare_backward(needs, grad_v_seq is not None, kernels.is_aligned(*given))
        new, channels, ab = self.new, self.spec.channels, None
        grad_weight, grad_bias = (new(channels), new(channels)) if needs.norm else (None, None)
        if run.first and run.norm:
            ab, sums = new((2, channels)), new(run.first.sums)
            run.first(*given, None, None, *parameters, None, sums, v_init=v_init)
            run.norm(sums, *parameters[2:], ab, grad_weight, grad_bias)
        grad_x = torch.empty_like(x) if needs.x else None
        grad_v0 = self.new_v() if needs.v0 else None
        sums = new(run.main.sums)
        run.main(*given, grad_x, grad_v0, *parameters, ab, sums, v_init=v_init)
        if run.norm and not run.first:
            run.norm(sums, *parameters[2:], None, grad_weight, grad_bias)
        size = (channels,) * self.spec.per_channel
        grad_w = new(size) if needs.w else None
        grad_v_threshold = new(size) if needs.v_threshold else None
        if run.parameters:
            run.parameters(sums, grad_w, grad_v_threshold)
        return grad_x, grad_v0, grad_w, grad_v_threshold, grad_weight, grad_bias


class _Backward(NamedTuple):
    """The launches of a backward."""

    first: _Launch | None  #: makes the norm's sums alone, where x's gradient needs them
    norm: _Launch | None
    main: _Launch
    parameters: _Launch | None


def _prepare_forward(spec: Spec, aligned: bool) -> _Launch:
    return _prepare_threads(spec, kernels.forward(spec), aligned)[0]


def _prepare_backward(spec: Spec, needs: Needs, v_seq: bool, aligned: bool) -> _Backward:
    def prepare(needs: int) -> tuple[_Launch, Grid]:
        sums = 2 * bool(needs & NEED_NORM) + (needs & (NEED_W | NEED_V_THRESHOLD)).bit_count()
        kernel = kernels.backward(spec, needs, v_seq)
        return _prepare_threads(spec, kernel, aligned, sums)

    learns = NEED_W * needs.w | NEED_V_THRESHOLD * needs.v_threshold
    both = spec.norm and needs.x and not spec.fixed_norm
    # By running statistics x's gradient has no terms to subtract, which the kernel knows by this.
    norm_sums = spec.norm and not both and (needs.norm or spec.fixed_norm)
    first, norm_grid = prepare(NEED_NORM) if both else (None, None)
    main, grid = prepare(NEED_X * needs.x | learns | NEED_NORM * norm_sums)
    norm = parameters = None
    if both or needs.norm:
        count = _words("d", spec.steps * spec.neurons / max(1, spec.channels))
        norm = _prepare_adders(spec, "norm_gradients<float>", (norm_grid or grid).partials, count)
    if learns:
        partials = grid.partials if spec.per_channel else (grid.sums, 1, 1)
        before, turns = array("q", (2 * norm_sums,)), needs.w + needs.v_threshold
        parameters = _prepare_adders(spec, "parameter_gradients<float>", partials, before, turns)
    return _Backward(first, norm, main, parameters)


def pack(spike_seq: Tensor) -> Tensor:
    """:func:`.bits.pack` in one launch."""
    steps, neurons = spike_seq.shape
    packed = spike_seq.new_empty(bits.packed_shape(1, steps, neurons), dtype=torch.uint8)
    _launch_bits("pack_bits", spike_seq, packed)
    return packed


def unpack_into(packed: Tensor, spike_seq: Tensor) -> None:
    """:func:`.bits.unpack_into` in one launch."""
    _launch_bits("unpack_bits", spike_seq, packed)


def pack_counts(counts: Tensor) -> Tensor:
    """:func:`.bits.pack_counts` in one launch."""
    shape = bits.packed_shape(bits.LARGEST_COUNT, 1, len(counts))
    packed = counts.new_empty(shape, dtype=torch.uint8)
    _launch_bits("pack_counts", counts.unsqueeze(0), packed)
    return packed


def unpack_counts_into(packed: Tensor, counts: Tensor) -> None:
    """:func:`.bits.unpack_counts_into` in one launch."""
    _launch_bits("unpack_counts", counts.unsqueeze(0), packed)


def _launch_bits(name: str, spike_seq: Tensor, packed: Tensor) -> None:
    aligned, (steps, neurons) = kernels.is_aligned(spike_seq, packed), spike_seq.shape
    about = (name, spike_seq.dtype, steps, neurons, aligned, spike_seq.device)
    _prepare_bits(*about)(spike_seq, packed)


@lru_cache(maxsize=1024)
def _prepare_bits(
    name: str, dtype: torch.dtype, steps: int, neurons: int, aligned: bool, device: torch.device
) -> _Launch:
    widest = kernels.ALIGNMENT // dtype.itemsize
    vec = widest if aligned and neurons % widest == 0 else 1
    threads = bits.count_bytes(steps) * neurons // vec
    if name.endswith("counts"):  # of one step, in pairs
        threads = -(-neurons // max(2, vec))
    constants, blocks = array("q", (threads, steps, neurons)), -(-threads // kernels.BLOCK)
    return _prepare(device, f"{name}<{kernels.SCALARS[dtype]},{vec}>", constants, blocks)


ENGINE = Engine(CudaPlan, pack, unpack_into, pack_counts, unpack_counts_into)
#: :func:`sj_taid.ops.alif.reference.multi_step`, fused
multi_step = partial(autograd.multi_step, ENGINE)


def _words(kind: str, *values: float) -> array[int]:
    """Floats in 8 bytes each ("d"), or two by two ("f")."""
    return array("q", array(kind, values).tobytes())


def _constants(spec: Spec) -> array[int]:
    d = spec.dynamics
    floats = (d.v_reset or 0.0, d.w or 0.0, d.v_threshold or 0.0, d.a, d.b, d.levels)
    return _words("f", *floats) + array("q", (spec.per_channel, spec.steps))


def _prepare_threads(
    spec: Spec, kernel: Kernel, aligned: bool, sums: int = 0
) -> tuple[_Launch, Grid]:
    """A launch of the threads that run at a time; each writes its ``sums``."""
    device = spec.device

    def resident(vec: int, lanes: int) -> int:
        return _resident(device, kernel.name(vec, lanes))

    layout = (spec.neurons, spec.inner, spec.channels)
    grid = kernels.grid(*layout, kernel.vec, aligned, _capacity(device), resident)
    name = kernel.name(grid.vec, grid.lanes)
    constants = array("q", grid.arguments) + _constants(spec)
    return _prepare(device, name, constants, grid.blocks, sums=(sums, grid.sums)), grid


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
) -> _Launch:
    short, kernel = name.partition("<")[0], _function(device.index, name)
    # Without work too: then sums are of nothing.
    return _Launch(short, device.index, kernel, (max(1, blocks),), (threads,), constants, sums)


@cache
def _function(device: int | None, name: str) -> Any:
    """The kernel ``name`` loaded on ``device``: compiled by NVRTC once, saved on disk by CuPy."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a kernel is not loaded yet, and a CUDA graph being captured cannot load it: "
            "run one training step before capturing"
        )
    module = cupy.RawModule(
        code=kernels.source(), options=kernels.COMPILER_OPTIONS, name_expressions=(name,)
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
def _resident(device: torch.device, name: str) -> int:
    """How many threads of the kernel ``name`` the GPU runs at a time."""
    with torch.cuda.device(device):
        registers = _function(device.index, name).num_regs
    return kernels.resident_threads(registers, *_processors(device))


@cache
def _processors(device: torch.device) -> tuple[int, int]:
    """How many multiprocessors the GPU has, and how many threads each of them holds."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.max_threads_per_multi_processor
