"""Backend "numba": the loops as operators on tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import surrogate
from .. import autograd
from . import loops
from .threads import Partition, ask_for_huge_pages, run


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = autograd.Forward(*arguments)
    x = call.x_seq.float()
    spike_seq, v, v_seq, checkpoint, packed = autograd.empty_outputs(x, *arguments[1:])
    ask_for_huge_pages(spike_seq, v_seq)
    q = call.w.sigmoid()
    run(
        loops.forward,
        _partition(x, call.norm),
        x.data_ptr(),
        _address(call.v0),
        np.float32(call.v_init),
        q.data_ptr(),
        call.v_threshold.data_ptr(),
        spike_seq.data_ptr(),
        v.data_ptr(),
        v_seq.data_ptr(),
        _address(call.norm),
        packed.data_ptr(),
        *_steps(x),
        *_channels(x, q.numel()),
        *_channels(x, _width(call.norm)),
        np.float32(call.v_reset or 0.0),
        call.decay_input,
        call.v_reset is None,
    )
    return spike_seq.to(call.x_seq.dtype), v, v_seq, checkpoint, packed


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = autograd.Backward(*arguments)
    x = call.x_seq.float()
    grad_spike_seq = None if call.grad_spike_seq is None else call.grad_spike_seq.float()
    grad_x, grad_v0, grad_parameters, norm_sums = autograd.empty_gradients(*call._replace(x_seq=x))
    ask_for_huge_pages(grad_x)
    q = call.w.sigmoid()
    shape = _partition(x, call.norm)
    sums = np.zeros((shape.parts, 2, q.numel()))
    sums_of_norm = np.zeros((shape.parts, 2, _width(call.norm)))
    needs = call.need_w, call.need_v_threshold
    run(
        loops.backward_for(
            call.surrogate, call.decay_input, call.v_reset is None, call.detach_reset, *needs
        ),
        shape,
        _address(grad_spike_seq),
        _address(call.grad_v),
        _address(call.grad_v_seq),
        x.data_ptr(),
        _address(call.v0),
        np.float32(call.v_init),
        q.data_ptr(),
        call.v_threshold.data_ptr(),
        grad_x.data_ptr(),
        grad_v0.data_ptr(),
        sums,
        _address(call.norm),
        sums_of_norm,
        *_steps(x),
        *_channels(x, q.numel()),
        *_channels(x, _width(call.norm)),
        np.float32(call.v_reset or 0.0),
        np.float32(call.a),
        np.float32(call.b),
    )
    # A few numbers, for which numpy's functions cost a fraction of torch's.
    gradients = sums.sum(0)
    rate = q.numpy().ravel().astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # as torch, which warns of neither
        gradients[0] *= rate * (1 - rate)  # dq/dw
    grad_parameters.numpy()[:] = gradients[list(needs)].reshape(grad_parameters.shape)
    if call.need_norm:
        norm_sums.numpy()[:] = sums_of_norm.sum(0)
    # What the norm gives is not rounded, and nor is its gradient.
    dtype = call.x_seq.dtype if call.norm is None else x.dtype
    return grad_x.to(dtype), grad_v0, grad_parameters, norm_sums


def _statistics(x_seq: Tensor) -> Tensor:
    x = x_seq.float()
    width = x.shape[2]
    shape = _partition(x, x)
    sums = np.zeros((shape.parts, 3, width))
    run(loops.statistics, shape, x.data_ptr(), sums, *_steps(x), *_channels(x, width))
    mean, square, deviation = sums.sum(0) / (x[0].numel() // width)  # over a channel's neurons
    first = x[0, 0].flatten(1)[:, 0].numpy() if x.dim() > 3 else x[0, 0].numpy()
    var = deviation / len(x) + np.maximum(square - mean * mean, 0)
    return torch.from_numpy(np.stack([mean + first, var]))


def _input_gradient(grad_y: Tensor, *arguments: Any) -> None:
    call = autograd.Backward(*arguments)
    x = call.x_seq.float()
    table = torch.cat([t[:2] for t in (call.norm, call.ab) if t is not None])
    run(
        loops.input_gradient,
        _partition(x, call.norm),
        x.data_ptr(),
        grad_y.data_ptr(),
        table.data_ptr(),
        *_steps(x),
        *_channels(x, _width(call.norm)),
    )


def _partition(x: Tensor, norm: Tensor | None) -> Partition:
    return Partition.of(*_steps(x), loops.scratch_rows(len(x), norm is not None))


def _address(tensor: Tensor | None) -> int:
    """Where the data is; 0 for no tensor, as for one without elements."""
    return 0 if tensor is None else tensor.data_ptr()


def _steps(x: Tensor) -> tuple[int, int]:
    """Time steps and neurons."""
    return x.shape[0], x.numel() // x.shape[0]


def _channels(x: Tensor, width: int) -> tuple[int, int]:
    """How ``width`` channels lie: neuron i has channel ``i // inner % width``."""
    return (x.stride(2) if width > 1 else max(x.numel() // x.shape[0], 1)), width


def _width(norm: Tensor | None) -> int:
    return 1 if norm is None else norm.shape[1]


def unsupported(x_seq: Tensor, surrogate_function: Any) -> str | None:
    """Why these loops cannot take a call, or ``None`` if they can."""
    if x_seq.device.type != "cpu":
        return f"the input is on {x_seq.device}, and these loops run on the CPU"
    if x_seq.dtype == torch.float64:
        return "the input is float64, and these loops compute in float32"
    return surrogate.unsupported(surrogate_function)


_ENGINE = autograd.register(
    "cpu",
    "CPU",
    autograd.Engine(_forward, _backward, _statistics, _input_gradient, lambda x_seq: 0),
)
#: the backend: :func:`sj_taid.ops.alif.reference.multi_step`, fused
multi_step = partial(autograd.multi_step, _ENGINE)
