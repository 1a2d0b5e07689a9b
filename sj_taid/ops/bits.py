"""Spikes as bits along time, and counts as four bits: the formats, in plain torch.

Spikes are uint8 ``[ceil(T / 8), neurons]``: bit ``k`` of byte ``w`` is the neuron's spike at time
step ``8 w + k``. The neurons are in memory order, so any dense layout with time outermost
(contiguous, channels-last) has the same bits.

Counts up to 14 are uint8 ``[ceil(values / 2)]``: two neighbours in memory a byte, the first in its
lower half; 15 is NaN. Not along time, which may be one step.
"""

import torch
from torch import Tensor

STEPS_PER_BYTE = 8
#: the largest count that four bits hold, and what stands for NaN
LARGEST_COUNT, NAN = 14, 15


def pack(values: Tensor, most: int = 1) -> Tensor:
    """Whole numbers up to ``most``, 14 at most, of a dense ``[T, *]``, time outermost in memory.

    With a ``most`` of 1 none is NaN.

    >>> pack(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
    tensor([[5, 4]], dtype=torch.uint8)
    >>> pack(torch.tensor([[1.0, 2.0, torch.nan]]), most=14)
    tensor([33, 15], dtype=torch.uint8)
    """
    steps, neurons = size_of(values, most)
    rows = values.as_strided((steps, neurons), (neurons, 1))
    if most == 1:
        packed = rows.new_zeros(packed_shape(1, steps, neurons), dtype=torch.uint8)
        for t, fired in enumerate(rows.ne(0).byte()):
            packed[t // STEPS_PER_BYTE] |= fired << t % STEPS_PER_BYTE
    else:
        halves = rows[0].nan_to_num(NAN).byte()
        packed = halves[::2].clone()
        packed[: neurons // 2] |= halves[1::2] << 4
    return packed


def unpack_into(packed: Tensor, values: Tensor) -> None:
    """Write what was packed into a dense tensor of as many values.

    >>> spikes, counts = torch.empty(3, 2), torch.empty(3)
    >>> unpack_into(torch.tensor([[5, 4]], dtype=torch.uint8), spikes)
    >>> unpack_into(torch.tensor([33, 15], dtype=torch.uint8), counts)
    >>> spikes.tolist(), counts.tolist()
    ([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], [1.0, 2.0, nan])
    """
    steps, neurons = size_of_packed(packed, values)
    rows = values.as_strided((steps, neurons), (neurons, 1))
    if packed.dim() == 2:
        masks = 1 << torch.arange(STEPS_PER_BYTE, dtype=torch.uint8, device=rows.device)
        for byte, part in zip(packed, rows.split(STEPS_PER_BYTE), strict=False):
            torch.ne(byte & masks[: len(part), None], 0, out=part)
    else:
        rows[0, ::2] = packed & NAN
        rows[0, 1::2] = packed[: neurons // 2] >> 4
        rows[0].masked_fill_(rows[0] == NAN, torch.nan)


def size_of(values: Tensor, most: int) -> tuple[int, int]:
    """Steps and neurons of what :func:`pack` is given; of counts a single step."""
    steps = len(values) if most == 1 else 1
    return steps, values.numel() // steps


def size_of_packed(packed: Tensor, values: Tensor) -> tuple[int, int]:
    """Steps and neurons of what ``packed`` holds, with ``values`` of its size."""
    if packed.dim() == 1:
        return 1, values.numel()
    return values.numel() // max(packed.shape[1], 1), packed.shape[1]


def packed_shape(most: int, steps: int, neurons: int) -> tuple[int, ...]:
    """The shape of what :func:`pack` gives.

    >>> packed_shape(1, 9, 5), packed_shape(4, 1, 5)
    ((2, 5), (3,))
    """
    if most == 1:
        return -(-steps // STEPS_PER_BYTE), neurons
    return (-(-steps * neurons // 2),)


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
