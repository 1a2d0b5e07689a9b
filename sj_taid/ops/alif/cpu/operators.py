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

#: what the loops take for input, spikes and their gradients
DTYPES = {
    torch.float32: loops.FLOAT32,
    torch.bfloat16: loops.BFLOAT16,
    torch.float16: loops.FLOAT16,
}


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = autograd.Forward(*arguments)
    outputs = spike_seq, v, v_seq, _, packed = autograd.empty_outputs(*arguments)
    x = call.x_seq
    ask_for_huge_pages(spike_seq, v_seq)
    q = call.w.sigmoid()
    run(
        loops.forward,
        _partition(x, call.norm),
        DTYPES[x.dtype],
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
    return outputs


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = autograd.Backward(*arguments)
    gradients = grad_x, grad_v0, grad_parameters, norm_sums = autograd.empty_gradients(*call)
    x = call.x_seq
    ask_for_huge_pages(grad_x)
    q = call.w.sigmoid()
    shape = _partition(x, call.norm)
    sums = np.zeros((shape.parts, 2, q.numel()))
    sums_of_norm = np.zeros((shape.parts, 2, _width(call.norm)))
    needs = call.need_w, call.need_v_threshold
    # A second backward takes the kernel of the first, rather than wait for one to be compiled.
    learned = needs if call.ab is None else (True, True)
    run(
        loops.backward_for(
            call.surrogate, call.decay_input, call.v_reset is None, call.detach_reset, *learned
        ),
        shape,
        DTYPES[x.dtype],
        _address(call.grad_spike_seq),
        _address(call.grad_v),
        _address(call.grad_v_seq),
        x.data_ptr(),
        _address(call.v0),
        np.float32(call.v_init),
        q.data_ptr(),
        call.v_threshold.data_ptr(),
        DTYPES[grad_x.dtype],
        grad_x.data_ptr(),
        grad_v0.data_ptr(),
        sums,
        _address(call.norm),
        sums_of_norm,
        call.need_norm,
        call.fixed_norm and call.need_x,
        _address(call.ab),
        *_steps(x),
        *_channels(x, q.numel()),
        *_channels(x, _width(call.norm)),
        np.float32(call.v_reset or 0.0),
        np.float32(call.a),
        np.float32(call.b),
    )
    # A few numbers, for which numpy's functions cost a fraction of torch's.
    total = sums.sum(0)
    rate = q.numpy().ravel().astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # as torch, which warns of neither
        total[0] *= rate * (1 - rate)  # dq/dw
    grad_parameters.numpy()[:] = total[list(needs)].reshape(grad_parameters.shape)
    if call.need_norm:
        norm_sums.numpy()[:] = sums_of_norm.sum(0)
    return gradients


def _statistics(x: Tensor) -> Tensor:
    width = x.shape[2]
    first = x.as_strided((width,), (x.stride(2),)).float().contiguous()
    shape = _partition(x, x)
    sums = np.zeros((shape.parts, 3, width))
    run(
        loops.statistics,
        shape,
        DTYPES[x.dtype],
        x.data_ptr(),
        first.data_ptr(),
        sums,
        *_steps(x),
        *_channels(x, width),
    )
    mean, square, deviation = sums.sum(0) / (x[0].numel() // width)  # over a channel's neurons
    var = deviation / len(x) + np.maximum(square - mean * mean, 0)
    return torch.from_numpy(np.stack([mean + first.numpy(), var]))


def _input_gradient(grad_y: Tensor, *arguments: Any) -> None:
    call = autograd.Backward(*arguments)
    x = call.x_seq
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
    return Partition.of(*_steps(x), *loops.scratch_rows(len(x), norm is not None))


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
    if x_seq.dtype not in DTYPES:
        return (
            f"the input is {x_seq.dtype}, expected one of {', '.join(map(str, DTYPES))}; "
            "convert it, or use backend='torch'"
        )
    return surrogate.unsupported(surrogate_function)


_ENGINE = autograd.register(
    "cpu",
    "CPU",
    autograd.Engine(_forward, _backward, _statistics, _input_gradient, lambda x_seq: 0),
)
#: the backend: :func:`sj_taid.ops.alif.reference.multi_step`, fused
multi_step = partial(autograd.multi_step, _ENGINE)
