"""Register of the spike tensors that are alive: which tensors are known to be zeros and ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.weak import TensorWeakRef

from .ops import surrogate
from .ops.bits import is_dense, pack, unpack_into

#: storage address -> the spike tensor that lies there
_register: dict[int, Spikes] = {}


class Spikes:
    """A live tensor of zeros and ones, and its bits."""

    def __init__(self, tensor: Tensor, sequence: Tensor, bits: Tensor | None) -> None:
        self._tensor = TensorWeakRef(tensor)
        self._version = tensor._version
        self._bits = bits
        self.dtype, self.shape, self.stride = tensor.dtype, sequence.shape, sequence.stride()

    def is_alive(self) -> bool:
        return self._tensor() is not None

    def is_seen_in(self, view: Tensor) -> bool:
        """Whether ``view`` shows these spikes, unchanged since they were registered."""
        return self.is_alive() and (view.dtype, view._version) == (self.dtype, self._version)

    @property
    def bits(self) -> Tensor:
        if self._bits is None:
            self._bits = pack(self._tensor().as_strided(self.shape, self.stride))
        return self._bits

    def restorer(self, view: Tensor) -> Callable[[Tensor], Tensor]:
        """The function that makes ``view`` from the bits."""
        place = (view.shape, view.stride(), view.storage_offset())
        return partial(_restore, self.dtype, self.shape, self.stride, place)


def _restore(
    dtype: torch.dtype, shape: torch.Size, stride: Any, view: tuple[Any, ...], bits: Tensor
) -> Tensor:
    spikes = torch.empty_strided(shape, stride, dtype=dtype, device=bits.device)
    unpack_into(bits, spikes)
    return spikes.as_strided(*view)


def register(tensor: Tensor, sequence: Tensor, bits: Tensor | None = None) -> None:
    """Note that ``tensor`` holds zeros and ones. ``sequence`` is ``tensor`` as ``[T, *]``.

    Nothing is noted of a tensor that fills a part of its memory, or without gradients, where
    nothing is saved.
    """
    for address in [a for a, spikes in list(_register.items()) if not spikes.is_alive()]:
        _register.pop(address, None)
    if not torch.is_grad_enabled() or not _address(tensor) or not is_dense(sequence):
        return
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        _register[_address(tensor)] = Spikes(tensor, sequence, bits)


def find(view: Any) -> Spikes | None:
    """The registered spikes that ``view`` shows all or some of, unchanged since."""
    spikes = _register.get(_address(view))
    return spikes if spikes is not None and spikes.is_seen_in(view) else None


def are_spikes(output: Tensor, surrogate_function: Any) -> bool:
    """Whether the output of a neuron is zeros and ones.

    The surrogates that the fused kernels know give nothing else. Of any other function, and of one
    with hooks, the output is looked at, which waits for the device.
    """
    known = surrogate_function and surrogate.unsupported(surrogate_function) is None
    if known and not (
        _global_forward_hooks or surrogate_function._forward_hooks or is_patched(surrogate_function)
    ):
        return True
    return _address(output) != 0 and bool(((output == 0) | (output == 1)).all())


def is_patched(module: nn.Module, known: Any = None) -> bool:
    """Whether the instance has functions of its own, other than ``known``."""
    return any(callable(value) and value is not known for value in vars(module).values())


def _address(tensor: Any) -> int:
    """Where the tensor's storage is; 0 if it has none."""
    if not isinstance(tensor, Tensor):
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except NotImplementedError:  # a wrapper of torch.func's
        return 0
