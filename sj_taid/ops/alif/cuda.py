"""Backend "cupy": the fused kernels on an NVIDIA GPU, compiled and launched by CuPy.

The only module that imports CuPy. Memory comes from PyTorch alone; launches go to the tensor's
device and PyTorch's current stream, read at every launch (backward runs in another thread).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import cupy
import numpy as np
import torch
from torch import Tensor

from .. import surrogate as surrogates
from . import autograd, kernels
from .kernels import (
    NEED_NORM,
    NEED_V_THRESHOLD,
    NEED_W,
    NEED_X,
    SCALARS,
    STATISTICS_VEC,
    Grid,
    Options,
)

# CuPy imports without a driver and without NVRTC, and fails at the first call: rather fail here.
cupy.cuda.runtime.getDeviceCount()
cupy.cuda.nvrtc.getVersion()

#: Launches since the start, by "forward", "backward" and "statistics": which path a call took.
launches: Counter[str] = Counter()


def compiler() -> str:
    """Who compiles and loads the kernels, for reports."""
    major, minor = cupy.cuda.nvrtc.getVersion()
    driver = cupy.cuda.runtime.driverGetVersion()
    return (
        f"NVRTC {major}.{minor}, driver for CUDA {driver // 1000}.{driver % 1000 // 10}, "
        "compute capability {}.{}".format(*torch.cuda.get_device_capability())
    )


def unsupported(x_seq: Tensor, surrogate_function: Any) -> str | None:
    """Why these kernels cannot take the call, or ``None``."""
    if x_seq.device.type != "cuda":
        return f"the input is on {x_seq.device}, expected on a CUDA device; move it: x.cuda()"
    if x_seq.dtype not in SCALARS:
        return (
            f"the input is {x_seq.dtype}, expected one of {', '.join(map(str, SCALARS))}; "
            "convert it, or use backend='torch'"
        )
    return surrogates.unsupported(surrogate_function)


def multi_step(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`sj_taid.ops.alif.reference.multi_step`, fused: 1 launch forward, 2 backward."""
    return autograd.multi_step(ENGINE, *args, **options)


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """The ``forward`` of the :class:`autograd.Engine`."""
    call = autograd.Forward(*arguments)
    outputs = spike_seq, v, v_seq, checkpoint, packed = autograd.empty_outputs(*arguments)
    x_seq = call.x_seq
    if x_seq.numel() == 0:
        return outputs
    options = _options(call, call.store_v_seq)
    grid = _grid(
        x_seq,
        _channels(call),
        options.forward_vec(),
        lambda vec, lanes: options.forward_name(vec, lanes, call.pack),
        *(x_seq, call.v0, spike_seq, v, v_seq, checkpoint),
    )
    _launch(
        "forward",
        options.forward_name(grid.vec, grid.lanes, call.pack),
        x_seq,
        grid,
        _pointer(x_seq),
        _pointer(call.v0),
        np.float32(call.v_init),
        *_parameters(call),
        _pointer(spike_seq),
        _pointer(v),
        _pointer(v_seq),
        _pointer(checkpoint),
        _pointer(packed),
        x_seq.shape[0],
    )
    return outputs


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The ``backward`` of the :class:`autograd.Engine`."""
    call = autograd.Backward(*arguments)
    x_seq = call.x_seq
    grad_x_seq, grad_v0, grad_parameters, norm_sums = autograd.empty_gradients(*call)
    if x_seq.numel() == 0:
        return grad_x_seq, grad_v0, grad_parameters.zero_(), norm_sums.zero_()
    grad_spike_seq = call.grad_spike_seq
    if grad_spike_seq is None:
        # Spikes that nobody used are too rare for kernels of their own.
        grad_spike_seq = torch.zeros_like(x_seq)
    options = _options(call, call.grad_v_seq is not None)
    needs = NEED_X * call.need_x | NEED_W * call.need_w | NEED_V_THRESHOLD * call.need_v_threshold
    needs |= NEED_NORM * call.need_norm

    def name(vec: int, lanes: int) -> str:
        return options.backward_name(vec, lanes, call.detach_reset, needs, call.surrogate)

    grid = _grid(
        x_seq,
        _channels(call),
        options.backward_vec(),
        name,
        *(grad_spike_seq, call.grad_v, call.grad_v_seq, x_seq, call.v0, call.checkpoint),
        *(grad_x_seq, grad_v0),
    )
    parameters = len(grad_parameters)
    partial = call.w.new_empty((parameters + 2 * call.need_norm, grid.threads * grid.lanes))
    _launch(
        "backward",
        name(grid.vec, grid.lanes),
        x_seq,
        grid,
        _pointer(grad_spike_seq),
        _pointer(call.grad_v),
        _pointer(call.grad_v_seq),
        _pointer(x_seq),
        _pointer(call.v0),
        np.float32(call.v_init),
        *_parameters(call),
        _pointer(call.ab),
        _pointer(call.checkpoint),
        np.float32(call.a),
        np.float32(call.b),
        _pointer(grad_x_seq),
        _pointer(grad_v0),
        _pointer(partial),
        x_seq.shape[0],
    )
    sums = grid.reduce(partial)
    if call.need_norm:
        norm_sums.copy_(sums[parameters:])
    sums = sums[:parameters]
    if call.w.dim() == 0 and grid.channels > 1:
        sums = sums.sum(1)
    return grad_x_seq, grad_v0, sums.view(grad_parameters.shape), norm_sums


def statistics(x_seq: Tensor) -> Tensor:
    """The ``statistics`` of the :class:`autograd.Engine`: the sequence read once."""
    channels = x_seq.shape[2]
    if x_seq.numel() == 0:
        return autograd.empty_statistics(x_seq).fill_(torch.nan)

    def name(vec: int, lanes: int) -> str:
        return kernels.statistics_name(x_seq.dtype, vec, lanes)

    grid = _grid(x_seq, channels, STATISTICS_VEC, name, x_seq, steps=len(x_seq))
    partial = x_seq.new_empty((2, grid.threads * grid.lanes), dtype=torch.float64)
    arguments = (_pointer(x_seq), _pointer(partial))
    _launch("statistics", name(grid.vec, grid.lanes), x_seq, grid, *arguments)
    mean, square = grid.reduce(partial) / (x_seq.numel() // channels)
    pivot = x_seq.as_strided((channels,), (x_seq.stride(2),))
    return torch.stack([pivot + mean, (square - mean * mean).clamp_(min=0)])


ENGINE = autograd.register(
    "cupy", "CUDA", autograd.Engine(forward, backward, statistics, None, kernels.kept_voltages)
)


def _options(call: autograd.Forward | autograd.Backward, v_seq: bool) -> Options:
    x_seq, norm = call.x_seq, call.norm is not None
    return Options(x_seq.dtype, x_seq.shape[0], call.v_reset, call.decay_input, v_seq, norm)


def _channels(call: autograd.Forward | autograd.Backward) -> int:
    return call.w.numel() if call.norm is None else call.norm.shape[1]


def _parameters(call: autograd.Forward | autograd.Backward) -> tuple[Any, ...]:
    """The kernels' arguments from ``w`` to ``norm``."""
    return (
        _pointer(call.w),
        _pointer(call.v_threshold),
        call.w.dim(),  # from a channel's parameter to the next one's
        np.float32(call.v_reset or 0.0),
        _pointer(call.norm),
    )


def _grid(
    x_seq: Tensor,
    channels: int,
    vec: int,
    name: Callable[[int, int], str],
    *tensors: Tensor | None,
    steps: int = 1,
) -> Grid:
    device = x_seq.device
    return kernels.grid(
        x_seq,
        channels,
        vec,
        kernels.is_aligned(*tensors),
        _capacity(device),
        lambda vec, lanes: _resident(device, name(vec, lanes)),
        steps,
    )


class _CurrentStream:
    """PyTorch's current stream under the protocol that CuPy reads."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


def _launch(direction: str, name: str, x_seq: Tensor, grid: Grid, *arguments: Any) -> None:
    # CuPy loads modules and launches on the current device.
    with torch.cuda.device(x_seq.device):
        function = _function(x_seq.device.index, name)
        with cupy.cuda.Stream.from_external(_CurrentStream()):
            function(
                (grid.blocks,),
                (kernels.BLOCK,),
                # A Python int is passed in 64 bits, a NumPy scalar in its own width.
                (*arguments, grid.size, grid.threads, grid.inner, grid.channels),
            )
    launches[direction] += 1


@cache
def _function(device: int, name: str) -> Any:
    """The kernel ``name`` loaded on ``device``: compiled by NVRTC once, kept on disk by CuPy."""
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
