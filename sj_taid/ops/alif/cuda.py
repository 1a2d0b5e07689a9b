"""Backend "cupy": the fused kernels on an NVIDIA GPU, compiled and launched by CuPy.

The only module that imports CuPy. Memory comes from PyTorch alone; launches go to the tensor's
device and PyTorch's current stream, read at every launch (backward runs in another thread).
"""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from typing import Any

import cupy
import numpy as np
import torch
from torch import Tensor

from . import autograd, kernels
from .kernels import NEED_NORM, NEED_V_THRESHOLD, NEED_W, NEED_X, Grid, Options

if torch.version.hip:
    raise ImportError("the kernels are for NVIDIA GPUs, not for ROCm")
# CuPy imports without a driver and without NVRTC, and fails at the first call: rather fail here.
cupy.cuda.runtime.getDeviceCount()
_from_external = cupy.cuda.Stream.from_external  # since CuPy 14
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

#: Launches by "forward", "backward" and "statistics", which prove that a call took this path.
launches: Counter[str] = Counter()

unsupported = partial(autograd.unsupported, "cuda", tuple(kernels.SCALARS))


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """The ``forward`` of the :class:`autograd.Engine`."""
    call = autograd.Forward(*arguments)
    call.check_layout()
    outputs = autograd.empty_outputs(*arguments)
    x_seq = call.x_seq
    if x_seq.numel() == 0:
        return outputs
    options = _options(call, call.store_v_seq)
    sequences = (x_seq, call.v0, *outputs[:5])
    vec = options.forward_vec()
    grid, name = _grid(sequences, _channels(call), vec, (Options.forward_name, options, call.pack))
    tensors = (*sequences, call.w, call.v_threshold, call.norm)
    scalars = (_float(call.v_init), _float(call.v_reset), call.w.dim(), x_seq.shape[0])
    _launch("forward", name, grid, tensors, *scalars)
    return outputs


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The ``backward`` of the :class:`autograd.Engine`."""
    call = autograd.Backward(*arguments)
    call.check_layout()
    x_seq = call.x_seq
    grad_x_seq, grad_v0, grad_parameters, norm_sums = autograd.empty_gradients(*call)
    if x_seq.numel() == 0:
        return grad_x_seq, grad_v0, grad_parameters.zero_(), norm_sums.zero_()
    grad_spike_seq = call.grad_spike_seq
    if grad_spike_seq is None:  # unused spikes are too rare for kernels of their own
        grad_spike_seq = torch.zeros_like(x_seq)
    options = _options(call, call.grad_v_seq is not None)
    needs = NEED_X * call.need_x | NEED_W * call.need_w | NEED_V_THRESHOLD * call.need_v_threshold
    needs |= NEED_NORM * call.need_norm
    kernel = (Options.backward_name, options, call.detach_reset, needs, call.surrogate)
    sequences = (
        *(grad_spike_seq, call.grad_v, call.grad_v_seq, x_seq, call.v0, call.checkpoint),
        *(grad_x_seq, grad_v0),
    )
    grid, name = _grid(sequences, _channels(call), options.backward_vec(), kernel)
    parameters = len(grad_parameters)
    partial_sums = call.w.new_empty((parameters + 2 * call.need_norm, grid.threads * grid.lanes))
    tensors = (*sequences, call.w, call.v_threshold, call.norm, call.ab, partial_sums)
    floats = map(_float, (call.v_init, call.v_reset, call.a, call.b))
    _launch("backward", name, grid, tensors, *floats, call.w.dim(), len(x_seq))
    sums = grid.reduce(partial_sums)
    if call.need_norm:
        norm_sums.copy_(sums[parameters:])
    sums = sums[:parameters]
    if call.w.dim() == 0 and grid.channels > 1:
        sums = sums.sum(1)
    return grad_x_seq, grad_v0, sums.view(grad_parameters.shape), norm_sums


def statistics(x_seq: Tensor) -> Tensor:
    """The ``statistics`` of the :class:`autograd.Engine`, reading the sequence once."""
    autograd.check_layout(x_seq)
    channels = x_seq.shape[2]
    if x_seq.numel() == 0:
        return autograd.empty_statistics(x_seq).fill_(torch.nan)
    kernel = (kernels.statistics_name, x_seq.dtype)
    # Half of the threads keep memory busy, and write half as many sums.
    vec = kernels.STATISTICS_VEC
    grid, name = _grid((x_seq,), channels, vec, kernel, steps=len(x_seq), share=2)
    partial_sums = x_seq.new_empty((2, grid.threads * grid.lanes), dtype=torch.float64)
    _launch("statistics", name, grid, (x_seq, partial_sums))
    mean, square = grid.reduce(partial_sums) / (x_seq.numel() // channels)
    pivot = x_seq.as_strided((channels,), (x_seq.stride(2),))
    return torch.stack([pivot + mean, (square - mean * mean).clamp_(min=0)])


ENGINE = autograd.register(
    "cupy", "CUDA", autograd.Engine(forward, backward, statistics, kernels.checkpoints)
)
#: :func:`sj_taid.ops.alif.reference.multi_step`, fused: 1 launch forward, 2 backward
multi_step = partial(autograd.multi_step, ENGINE)


def _options(call: autograd.Forward | autograd.Backward, v_seq: bool) -> Options:
    x_seq, norm = call.x_seq, call.norm is not None
    return Options(x_seq.dtype, x_seq.shape[0], call.v_reset, call.decay_input, v_seq, norm)


def _channels(call: autograd.Forward | autograd.Backward) -> int:
    return call.w.numel() if call.norm is None else call.norm.shape[1]


#: makes a kernel's name: a function, its first argument, and those behind ``vec`` and ``lanes``
_Kernel = tuple[Any, ...]


def _grid(
    sequences: tuple[Tensor | None, ...],
    channels: int,
    vec: int,
    kernel: _Kernel,
    steps: int = 1,
    share: int = 1,
) -> tuple[Grid, str]:
    """The grid of a ``share``-th of the threads that run at a time, and the kernel's name."""
    x_seq = next(t for t in sequences if t is not None)  # one of its shape and layout
    aligned, device = kernels.is_aligned(*sequences), x_seq.device
    layout = tuple(x_seq.shape), x_seq.stride()
    return _plan(layout, device, _capacity(device), channels, vec, aligned, kernel, steps, share)


@cache
def _plan(
    layout: tuple[tuple[int, ...], tuple[int, ...]],
    device: torch.device,
    capacity: int,
    channels: int,
    vec: int,
    aligned: bool,
    kernel: _Kernel,
    steps: int,
    share: int,
) -> tuple[Grid, str]:
    make_name, first, *rest = kernel

    def resident(vec: int, lanes: int) -> int:
        return _resident(device, make_name(first, vec, lanes, *rest)) // share

    x_seq = torch.empty_strided(*layout, device="meta")
    grid = kernels.grid(x_seq, channels, vec, aligned, capacity, resident, steps)
    return grid, make_name(first, grid.vec, grid.lanes, *rest)


class _CurrentStream:
    """PyTorch's current stream under the protocol that CuPy reads."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


def _launch(
    direction: str, name: str, grid: Grid, tensors: tuple[Tensor | None, ...], *scalars: Any
) -> None:
    device = next(t.device for t in tensors if t is not None)
    # A Python int is passed in 64 bits, a NumPy scalar in its own width.
    sizes = (grid.size, grid.threads, grid.inner, grid.channels)
    arguments = (*map(_pointer, tensors), *scalars, *sizes)
    with torch.cuda.device(device):  # where CuPy loads modules and launches
        function = _function(device.index, name)
        with _from_external(_CurrentStream()):
            function((grid.blocks,), (kernels.BLOCK,), arguments)
    launches[direction] += 1


@cache
def _function(device: int, name: str) -> Any:
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


def _pointer(tensor: Tensor | None) -> int:
    """The address of the data, 0 for a tensor that is absent or has no elements."""
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _float(value: float | None) -> np.float32:
    return np.float32(value or 0.0)
