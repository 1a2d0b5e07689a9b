"""Spikes as bits along time: the format, in plain torch.

``bits`` is uint8 ``[ceil(T / 8), neurons]``: bit ``k`` of byte ``w`` is the neuron's spike at time
step ``8 w + k``. The neurons are in memory order, so any dense layout with time outermost
(contiguous, channels-last) has the same bits.
"""

import torch
from torch import Tensor

STEPS_PER_BYTE = 8


def pack(spike_seq: Tensor) -> Tensor:
    """The bits of a dense ``spike_seq`` ``[T, *]`` of zeros and ones, time outermost in memory.

    >>> pack(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
    tensor([[5, 4]], dtype=torch.uint8)
    """
    fired = _in_memory_order(spike_seq).ne(0)
    bits = fired.new_zeros((count_bytes(len(fired)), fired.shape[1]), dtype=torch.uint8)
    for t, row in enumerate(fired):
        bits[t // STEPS_PER_BYTE] |= row.to(torch.uint8) << t % STEPS_PER_BYTE
    return bits


def unpack_into(bits: Tensor, spike_seq: Tensor) -> None:
    """Write the spikes of ``bits`` into the dense ``spike_seq`` ``[T, *]``.

    >>> spike_seq = torch.empty(3, 2)
    >>> unpack_into(torch.tensor([[5, 4]], dtype=torch.uint8), spike_seq)
    >>> spike_seq.tolist()
    [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    """
    masks = 1 << torch.arange(STEPS_PER_BYTE, dtype=torch.uint8, device=bits.device).unsqueeze(1)
    for byte, rows in zip(bits, _in_memory_order(spike_seq).split(STEPS_PER_BYTE), strict=True):
        torch.ne(byte & masks[: len(rows)], 0, out=rows)


def count_bytes(steps: int) -> int:
    """Bytes per neuron for a number of time steps."""
    return -(-steps // STEPS_PER_BYTE)


def is_dense(x_seq: Tensor) -> bool:
    """Whether ``x_seq`` fills its memory without gaps or overlaps, time outermost.

    >>> x_seq = torch.zeros(2, 3, 4, 5)
    >>> is_dense(x_seq), is_dense(x_seq.transpose(1, 3)), is_dense(x_seq.transpose(0, 1))
    (True, True, False)
    """
    if x_seq.is_contiguous():
        return True
    # Under torch.func.vmap the batch lies between the values, and empty_like keeps its gap too.
    axes = zip(x_seq.shape, x_seq.stride(), strict=True)
    if 1 + sum((size - 1) * stride for size, stride in axes) != x_seq.numel():
        return False
    # empty_like keeps the strides of dense tensors alone, and "meta" allocates nothing. No sorting
    # of the strides: torch.compile cannot where they are symbols.
    dense = x_seq.stride() == torch.empty_like(x_seq, device="meta").stride()
    return dense and (x_seq.shape[0] == 1 or x_seq.stride(0) == x_seq[0].numel())


def _in_memory_order(spike_seq: Tensor) -> Tensor:
    """A dense ``[T, *]`` with time outermost as ``[T, neurons]``, without a copy."""
    neurons = spike_seq[0].numel()
    return spike_seq.as_strided((len(spike_seq), neurons), (neurons, 1))
