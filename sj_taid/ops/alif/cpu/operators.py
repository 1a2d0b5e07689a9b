"""Backend "numba": operators on tensors over the compiled loops."""

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

#: the loops' types for input, spikes and their gradients
DTYPES = {
    torch.float32: loops.FLOAT32,
    torch.bfloat16: loops.BFLOAT16,
    torch.float16: loops.FLOAT16,
}


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = autograd.Forward(*arguments)
    outputs = spike_seq, v, v_seq, _, bits = autograd.empty_outputs(*arguments)
    x, q = call.x_seq, call.w.sigmoid()
    ask_for_huge_pages(spike_seq, v_seq)
    run(
        loops.forward,
        _partition(x, call.norm),
        *_addresses(x, call.v0, q, call.v_threshold, spike_seq, v, v_seq, call.norm, bits),
        DTYPES[x.dtype],
        *_steps(x),
        *_channels(x, q.numel()),
        *_channels(x, _width(call.norm)),
        *_floats(call.v_init, call.v_reset),
        call.decay_input,
        call.v_reset is None,
    )
    return outputs


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = autograd.Backward(*arguments)
    gradients = grad_x, grad_v0, grad_parameters, norm_sums = autograd.empty_gradients(*call)
    x, q = call.x_seq, call.w.sigmoid()
    ask_for_huge_pages(grad_x)
    shape = _partition(x, call.norm)
    sums = np.zeros((shape.parts, 2, q.numel()))
    sums_of_norm = np.zeros((shape.parts, 2, _width(call.norm)))
    needs = call.need_w, call.need_v_threshold
    # The first of two backwards takes the kernel of the second, rather than wait for another one.
    learned = (True, True) if call.need_norm and not call.need_x else needs
    run(
        loops.backward_for(
            call.surrogate, call.decay_input, call.v_reset is None, call.detach_reset, *learned
        ),
        shape,
        *_addresses(call.grad_spike_seq, call.grad_v, call.grad_v_seq, x, call.v0, q),
        *_addresses(call.v_threshold, call.norm, call.ab, grad_x, grad_v0),
        sums,
        sums_of_norm,
        DTYPES[x.dtype],
        DTYPES[grad_x.dtype],
        call.need_norm,
        call.fixed_norm and call.need_x,
        *_steps(x),
        *_channels(x, q.numel()),
        *_channels(x, _width(call.norm)),
        *_floats(call.v_init, call.v_reset, call.a, call.b),
    )
    # numpy's functions cost a fraction of torch's for a few numbers.
    total = sums.sum(0)
    rate = q.numpy().ravel().astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # torch warns of neither
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
    scalars = (DTYPES[x.dtype], *_steps(x), *_channels(x, width))
    run(loops.statistics, shape, *_addresses(x, first), sums, *scalars)
    mean, square, deviation = sums.sum(0) / (x[0].numel() // width)  # over a channel's neurons
    var = deviation / len(x) + np.maximum(square - mean * mean, 0)
    return torch.from_numpy(np.stack([mean + first.numpy(), var]))


def _input_gradient(grad_y: Tensor, *arguments: Any) -> None:
    call = autograd.Backward(*arguments)
    x = call.x_seq
    table = torch.cat([t[:2] for t in (call.norm, call.ab) if t is not None])
    scalars = (*_steps(x), *_channels(x, _width(call.norm)))
    run(loops.input_gradient, _partition(x, call.norm), *_addresses(x, grad_y, table), *scalars)


def _partition(x: Tensor, norm: Tensor | None) -> Partition:
    return Partition.of(*_steps(x), *loops.scratch_rows(len(x), norm is not None))


def _addresses(*tensors: Tensor | None) -> list[int]:
    """The addresses of the data; 0 for no tensor, as for one without elements."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _floats(*values: float | None) -> list[np.float32]:
    return [np.float32(value or 0.0) for value in values]


def _steps(x: Tensor) -> tuple[int, int]:
    """Time steps and neurons."""
    return x.shape[0], x.numel() // x.shape[0]


def _channels(x: Tensor, width: int) -> tuple[int, int]:
    """``inner`` and ``width``: neuron i has channel ``i // inner % width``."""
    return (x.stride(2) if width > 1 else max(x.numel() // x.shape[0], 1)), width


def _width(norm: Tensor | None) -> int:
    return 1 if norm is None else norm.shape[1]


def unsupported(x_seq: Tensor, surrogate_function: Any) -> str | None:
    """Why these loops cannot take the call, or ``None``."""
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
#: :func:`sj_taid.ops.alif.reference.multi_step`, fused
multi_step = partial(autograd.multi_step, _ENGINE)
