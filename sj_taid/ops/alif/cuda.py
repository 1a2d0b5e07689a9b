"""Backend "cupy": the fused kernels on an NVIDIA GPU, compiled and launched by CuPy.

The only module that imports CuPy. Memory comes from PyTorch alone; launches go to the tensor's
device and PyTorch's current stream, read at every launch (backward runs in another thread).
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import cupy
import numpy as np
import torch
from torch import Tensor

from .. import surrogate as surrogates
from . import autograd, kernels
from .kernels import NEED_V_THRESHOLD, NEED_W, NEED_X, SCALARS, Grid, Options
from .nvrtc import OPTIONS

# CuPy imports without a driver and without NVRTC, and fails at the first call: rather fail here.
cupy.cuda.runtime.getDeviceCount()
cupy.cuda.nvrtc.getVersion()

#: Launches since the start, by "forward" and "backward": shows which path a call took.
launches: Counter[str] = Counter()


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


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``forward`` of the :class:`autograd.Engine`."""
    call = autograd.Forward(*arguments)
    outputs = spike_seq, v, v_seq, checkpoint = autograd.empty_outputs(*arguments)
    x_seq = call.x_seq
    if x_seq.numel() == 0:
        return outputs
    options = Options(x_seq.dtype, x_seq.shape[0], call.v_reset, call.decay_input, call.store_v_seq)
    aligned = kernels.is_aligned(x_seq, call.v0, *outputs)
    grid = kernels.grid(x_seq, call.w, options.forward_vec(), aligned, _capacity(x_seq.device))
    _launch(
        "forward",
        options.forward_name(grid.vec, grid.lanes),
        x_seq,
        grid,
        _pointer(x_seq),
        _pointer(call.v0),
        np.float32(call.v_init),
        _pointer(call.w),
        _pointer(call.v_threshold),
        np.float32(call.v_reset or 0.0),
        _pointer(spike_seq),
        _pointer(v),
        _pointer(v_seq),
        _pointer(checkpoint),
    )
    return outputs


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The ``backward`` of the :class:`autograd.Engine`."""
    call = autograd.Backward(*arguments)
    x_seq, w = call.x_seq, call.w
    grad_x_seq, grad_v0, grad_parameters = autograd.empty_gradients(*arguments)
    if x_seq.numel() == 0:
        return grad_x_seq, grad_v0, grad_parameters.zero_()
    grad_spike_seq = call.grad_spike_seq
    if grad_spike_seq is None:
        # Spikes that nobody used are too rare for kernels of their own.
        grad_spike_seq = torch.zeros_like(x_seq)
    through_v_seq = call.grad_v_seq is not None
    options = Options(x_seq.dtype, x_seq.shape[0], call.v_reset, call.decay_input, through_v_seq)
    aligned = kernels.is_aligned(
        grad_spike_seq,
        call.grad_v,
        call.grad_v_seq,
        x_seq,
        call.v0,
        call.checkpoint,
        grad_x_seq,
        grad_v0,
    )
    grid = kernels.grid(x_seq, w, options.backward_vec(), aligned, _capacity(x_seq.device))
    partial = w.new_empty((len(grad_parameters), grid.threads * grid.lanes))
    needs = NEED_X * call.need_x | NEED_W * call.need_w | NEED_V_THRESHOLD * call.need_v_threshold
    _launch(
        "backward",
        options.backward_name(grid.vec, grid.lanes, call.detach_reset, needs, call.surrogate),
        x_seq,
        grid,
        _pointer(grad_spike_seq),
        _pointer(call.grad_v),
        _pointer(call.grad_v_seq),
        _pointer(x_seq),
        _pointer(call.v0),
        np.float32(call.v_init),
        _pointer(w),
        _pointer(call.v_threshold),
        np.float32(call.v_reset or 0.0),
        _pointer(call.checkpoint),
        np.float32(call.a),
        np.float32(call.b),
        _pointer(grad_x_seq),
        _pointer(grad_v0),
        _pointer(partial),
    )
    return grad_x_seq, grad_v0, grid.reduce(partial, w.shape)


ENGINE = autograd.register("cupy", "CUDA", autograd.Engine(forward, backward, kernels.checkpoints))


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
                (*arguments, x_seq.shape[0], grid.size, grid.threads, grid.inner, grid.channels),
            )
    launches[direction] += 1


@cache
def _function(device: int, name: str) -> Any:
    """The kernel ``name`` loaded on ``device``: compiled by NVRTC once, kept on disk by CuPy."""
    module = cupy.RawModule(code=kernels.source(), options=OPTIONS, name_expressions=(name,))
    try:
        return module.get_function(name)
    except cupy.cuda.compiler.CompileException as error:
        raise RuntimeError(f"NVRTC could not compile {name}:\n{error}") from error


@cache
def _capacity(device: torch.device) -> int:
    """How many threads the GPU holds at a time."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * properties.max_threads_per_multi_processor


def _pointer(tensor: Tensor | None) -> int:
    """The address of the data, 0 for a tensor that is absent or has no elements."""
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()
