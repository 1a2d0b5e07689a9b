"""Backend "numba": operators on tensors over the compiled loops."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import autograd
from . import loops, threads
from .threads import Partition, ask_for_huge_pages, group_size, run

#: the loops' types for input, spikes and their gradients
DTYPES = {torch.float32: loops.FLOAT32, torch.bfloat16: loops.BFLOAT16}


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = autograd.Forward(*arguments)
    call.check_layout()
    outputs = spike_seq, v, v_seq, _, bits = autograd.empty_outputs(*arguments)
    q, threshold = _parameters(call)
    partition = _partition(call.x_seq, len(q), whole=False)
    ask_for_huge_pages(spike_seq, v_seq)
    run(
        loops.compile_kernel(loops.forward),
        partition,
        q=q,
        threshold=threshold,
        norm=call.norm,
        spike=spike_seq,
        v=v,
        v_seq=v_seq,
        bits=bits,
        **_options(call),
    )
    return outputs


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = autograd.Backward(*arguments)
    call.check_layout()
    gradients = grad_x, grad_v0, grad_parameters, norm_sums = autograd.empty_gradients(*call)
    x, whole = call.x_seq, call.numbers is not None
    q, threshold = _parameters(call)
    partition = _partition(x, len(q), whole)
    ask_for_huge_pages(grad_x)
    sums = partition.sums(2)
    sums_of_norm = partition.sums(2) if call.need_norm else None
    needs = call.need_w, call.need_v_threshold
    # The first of two backwards takes the kernel of the second, rather than wait for another one.
    learned = (True, True) if call.need_norm and not call.need_x else needs
    options = call.surrogate, call.decay_input, call.v_reset is None, call.detach_reset, *learned
    run(
        loops.compile_kernel(loops.backward_for(*options)),
        partition,
        q=q,
        threshold=threshold,
        norm=call.norm,
        ab=torch.empty((2, len(q)), dtype=torch.float32) if whole else call.ab,
        numbers=call.numbers,
        fixed_norm=call.fixed_norm,
        grad_spike=call.grad_spike_seq,
        grad_v=call.grad_v,
        grad_v_seq=call.grad_v_seq,
        grad_x=grad_x,
        grad_v0=grad_v0,
        sums=sums,
        norm_sums=sums_of_norm,
        a=call.a,
        b=call.b,
        **_options(call),
    )
    # numpy's functions cost a fraction of torch's for a few numbers.
    total = sums.numpy().sum(0)
    if call.need_w:
        rate = q.numpy().astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # torch warns of neither
            total[0] *= rate * (1 - rate)  # dq/dw
    if call.w.dim() == 0:
        total = total.sum(1)
    asked = total[1 - call.need_w : 1 + call.need_v_threshold]
    grad_parameters.numpy()[:] = asked.reshape(grad_parameters.shape)
    if sums_of_norm is not None:
        norm_sums.numpy()[:] = sums_of_norm.numpy().sum(0)
    return gradients


def _statistics(x: Tensor) -> Tensor:
    autograd.check_layout(x)
    first = x.as_strided((x.shape[2],), (x.stride(2),)).float().contiguous()  # of each channel
    partition = _partition(x, len(first), whole=False)
    sums = partition.sums(3)
    kernel = loops.compile_kernel(loops.statistics)
    run(kernel, partition, x=x, norm=first, sums=sums, dtype=DTYPES[x.dtype])
    with np.errstate(invalid="ignore"):  # of infinities, of which torch does not warn either
        mean, square, deviation = sums.numpy().sum(0) / (x[0].numel() // len(first))
        var = deviation / len(x) + np.maximum(square - mean * mean, 0)
    return torch.from_numpy(np.stack([mean + first.numpy(), var]))


def _parameters(call: autograd.Forward | autograd.Backward) -> tuple[Tensor, Tensor]:
    """``q`` and the threshold, one per channel if there is a norm or they are."""
    width = call.w.numel() if call.norm is None else call.x_seq.shape[2]
    q, threshold = call.w.sigmoid(), call.v_threshold
    return q.expand(width).contiguous(), threshold.expand(width).contiguous()


def _partition(x: Tensor, channels: int, whole: bool) -> Partition:
    return Partition.of(len(x), x.numel() // len(x), _inner(x, channels), channels, whole)


def _inner(x: Tensor, channels: int) -> int:
    """Neuron ``i`` has channel ``i // inner % channels``."""
    return x.stride(2) if channels > 1 else max(x.numel() // len(x), 1)


def _has_channels_in_cache(x: Tensor) -> bool:
    """Whether all values of the channels of a part, at least one, fit the cache."""
    channels = x.shape[2]
    values = x.numel() // channels * group_size(channels, _inner(x, channels))
    return 0 < values <= threads.WHOLE


def _options(call: autograd.Forward | autograd.Backward) -> dict[str, Any]:
    return {
        "x": call.x_seq,
        "dtype": DTYPES[call.x_seq.dtype],
        "v0": call.v0,
        "v_init": call.v_init,
        "v_rest": call.v_reset,
        "decay_input": call.decay_input,
        "soft": call.v_reset is None,
    }


unsupported = partial(autograd.unsupported, "cpu", tuple(DTYPES))
ENGINE = autograd.register(
    "cpu",
    "CPU",
    autograd.Engine(_forward, _backward, _statistics, lambda T, dtype: 0, _has_channels_in_cache),
)
#: :func:`sj_taid.ops.alif.reference.multi_step`, fused
multi_step = partial(autograd.multi_step, ENGINE)
