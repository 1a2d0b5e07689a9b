"""Spikes as bits along time: the definition in plain torch, and where kernels leave theirs.

``bits`` is uint8 ``[ceil(T / 8), neurons]``: bit ``k`` of byte ``w`` is the neuron's spike at time
step ``8 w + k``. The neurons are in the order of memory, so the layout of a dense sequence with
time outermost (contiguous, channels-last) is none of the bits' business.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

STEPS_A_BYTE = 8

_request = threading.local()


def pack(spike_seq: Tensor) -> Tensor:
    """The bits of a dense ``spike_seq`` ``[T, *]`` of zeros and ones, time outermost in memory.

    >>> pack(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
    tensor([[5, 4]], dtype=torch.uint8)
    """
    fired = in_memory_order(spike_seq).ne(0)
    bits = fired.new_zeros((words(len(fired)), fired.shape[1]), dtype=torch.uint8)
    for t, row in enumerate(fired):
        bits[t // STEPS_A_BYTE] |= row.to(torch.uint8) << t % STEPS_A_BYTE
    return bits


def unpack_into(bits: Tensor, spike_seq: Tensor) -> None:
    """Write what ``bits`` stands for into the dense ``spike_seq`` ``[T, *]``.

    >>> spike_seq = torch.empty(3, 2)
    >>> unpack_into(torch.tensor([[5, 4]], dtype=torch.uint8), spike_seq)
    >>> spike_seq.tolist()
    [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    """
    for t, row in enumerate(in_memory_order(spike_seq)):
        row.copy_(bits[t // STEPS_A_BYTE] >> t % STEPS_A_BYTE & 1)


def words(steps: int) -> int:
    """How many bytes a neuron's ``steps`` take."""
    return -(-steps // STEPS_A_BYTE)


def in_memory_order(spike_seq: Tensor) -> Tensor:
    """A dense ``[T, *]`` with time outermost as ``[T, neurons]``, without a copy."""
    neurons = spike_seq[0].numel()
    return spike_seq.as_strided((len(spike_seq), neurons), (neurons, 1))


def request() -> None:
    """Let this thread's next fused forward write the bits of its spikes too, and leave them."""
    _request.wanted = True


def requested() -> bool:
    """Whether a forward is to write bits."""
    return getattr(_request, "wanted", False) and not torch.compiler.is_compiling()


def leave(bits: Tensor) -> None:
    """What a fused forward wrote, for :func:`taken`."""
    _request.bits = bits


def taken() -> Tensor | None:
    """The bits that were asked for, or ``None`` where no forward wrote them; ends the request."""
    bits = getattr(_request, "bits", None)
    _request.wanted, _request.bits = False, None
    return bits
