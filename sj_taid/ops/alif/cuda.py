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


def forward(
    x_seq: Tensor,
    v0: Tensor | None,
    v_init: float,
    w: Tensor,
    v_threshold: Tensor,
    decay_input: bool,
    v_reset: float | None,
    store_v_seq: bool,
    checkpoints: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``forward`` of the :class:`autograd.Engine`."""
    outputs = autograd.empty_outputs(
        x_seq, v0, v_init, w, v_threshold, decay_input, v_reset, store_v_seq, checkpoints
    )
    if x_seq.numel() == 0:
        return outputs
    spike_seq, v, v_seq, checkpoint = outputs
    options = Options(x_seq.dtype, x_seq.shape[0], v_reset, decay_input, store_v_seq)
    aligned = kernels.is_aligned(x_seq, v0, *outputs)
    grid = kernels.grid(x_seq, w, options.forward_vec(), aligned, _capacity(x_seq.device))
    _launch(
        "forward",
        options.forward_name(grid.vec, grid.lanes),
        x_seq,
        grid,
        _pointer(x_seq),
        _pointer(v0),
        np.float32(v_init),
        _pointer(w),
        _pointer(v_threshold),
        np.float32(v_reset or 0.0),
        _pointer(spike_seq),
        _pointer(v),
        _pointer(v_seq),
        _pointer(checkpoint),
    )
    return outputs


def backward(
    grad_spike_seq: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    x_seq: Tensor,
    v0: Tensor | None,
    v_init: float,
    w: Tensor,
    v_threshold: Tensor,
    checkpoint: Tensor,
    decay_input: bool,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: str,
    a: float,
    b: float,
    need_x: bool,
    need_v0: bool,
    need_w: bool,
    need_v_threshold: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``backward`` of the :class:`autograd.Engine`."""
    if grad_spike_seq is None:
        # Spikes that nobody used are too rare for kernels of their own.
        grad_spike_seq = torch.zeros_like(x_seq)
    grad_x_seq = torch.empty_like(x_seq) if need_x else x_seq.new_empty(0)
    grad_v0 = x_seq.new_empty(0, dtype=torch.float32)
    if need_v0:
        grad_v0 = torch.empty_like(x_seq[0], dtype=torch.float32)
    parameters = need_w + need_v_threshold
    if x_seq.numel() == 0:
        return grad_x_seq, grad_v0, w.new_zeros((parameters, *w.shape))
    options = Options(x_seq.dtype, x_seq.shape[0], v_reset, decay_input, grad_v_seq is not None)
    aligned = kernels.is_aligned(
        grad_spike_seq, grad_v, grad_v_seq, x_seq, v0, checkpoint, grad_x_seq, grad_v0
    )
    grid = kernels.grid(x_seq, w, options.backward_vec(), aligned, _capacity(x_seq.device))
    partial = w.new_empty((parameters, grid.threads * grid.lanes))
    needs = NEED_X * need_x | NEED_W * need_w | NEED_V_THRESHOLD * need_v_threshold
    _launch(
        "backward",
        options.backward_name(grid.vec, grid.lanes, detach_reset, needs, surrogate),
        x_seq,
        grid,
        _pointer(grad_spike_seq),
        _pointer(grad_v),
        _pointer(grad_v_seq),
        _pointer(x_seq),
        _pointer(v0),
        np.float32(v_init),
        _pointer(w),
        _pointer(v_threshold),
        np.float32(v_reset or 0.0),
        _pointer(checkpoint),
        np.float32(a),
        np.float32(b),
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
