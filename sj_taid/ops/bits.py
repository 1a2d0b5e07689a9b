"""Spikes as bits along time, and counts as four bits: the formats, in plain torch.

``bits`` is uint8 ``[ceil(T / 8), neurons]``: bit ``k`` of byte ``w`` is the neuron's spike at time
step ``8 w + k``. The neurons are in memory order, so any dense layout with time outermost
(contiguous, channels-last) has the same bits.

Counts up to 15 are uint8 ``[ceil(values / 2)]``: two neighbours in memory a byte, the first in its
lower half. Not along time, which may be one step. A NaN comes back as some count.
"""

from collections.abc import Callable

import torch
from torch import Tensor

STEPS_PER_BYTE = 8
#: the largest count that four bits hold
LARGEST_COUNT = 15


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


def pack_counts(counts: Tensor) -> Tensor:
    """The half bytes of a flat tensor of whole numbers from 0 to 15.

    >>> pack_counts(torch.tensor([1.0, 2.0, 15.0]))
    tensor([33, 15], dtype=torch.uint8)
    """
    halves = counts.byte() & LARGEST_COUNT
    packed = halves[::2].clone()
    packed[: len(halves) // 2] |= halves[1::2] << 4
    return packed


def unpack_counts_into(packed: Tensor, counts: Tensor) -> None:
    """Write the counts of ``packed`` into a flat tensor.

    >>> counts = torch.empty(3)
    >>> unpack_counts_into(torch.tensor([33, 15], dtype=torch.uint8), counts)
    >>> counts.tolist()
    [1.0, 2.0, 15.0]
    """
    counts[::2] = packed & LARGEST_COUNT
    counts[1::2] = packed[: len(counts) // 2] >> 4


def pack_whole(
    values: Tensor,
    most: int,
    pack: Callable[[Tensor], Tensor] = pack,
    pack_counts: Callable[[Tensor], Tensor] = pack_counts,
) -> Tensor:
    """Whole numbers of a dense ``[T, *]`` up to ``most``, 15 at most: as bits or as half bytes."""
    if most == 1:
        return pack(_in_memory_order(values))
    return pack_counts(values.as_strided((values.numel(),), (1,)))


def packed_shape(most: int, steps: int, neurons: int) -> tuple[int, ...]:
    """The shape of what :func:`pack_whole` gives.

    >>> packed_shape(1, 9, 5), packed_shape(4, 1, 5)
    ((2, 5), (3,))
    """
    if most == 1:
        return count_bytes(steps), neurons
    return (-(-steps * neurons // 2),)


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
