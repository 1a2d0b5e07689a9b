"""Spikes kept for backward as bits along time, not as numbers of two or four bytes."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import TensorWeakRef

from ._checks import check_net
from .neuron import ALIFNode
from .ops import bits
from .ops.alif.autograd import is_dense

__all__ = ["PackedSpikes", "packed_spikes"]

#: The greatest of zeros and ones is one of them, so its output is packed like a neuron's.
_MAX_POOLING = nn.modules.pooling._MaxPoolNd
#: The layers that autocast gives a cast input.
_CAST = (nn.Linear, nn.modules.conv._ConvNd)
#: The neurons whose output is zeros and ones; a subclass may do something else.
_NEURONS = (ALIFNode, neuron.LIFNode, neuron.ParametricLIFNode, neuron.IFNode)
#: The layers that save their input: what they save of a neuron's output is packed.
_READERS = (*_CAST, _MAX_POOLING, nn.modules.pooling._AvgPoolNd)


def packed_spikes(net: nn.Module) -> PackedSpikes:
    r"""Keep the spikes that ``net``'s layers save for backward as bits.

    A convolution, linear or pooling layer keeps its input. Where that is a neuron's output, or what
    max pooling made of one, each spike is kept as one bit instead of 32 or 16, and restored when
    backward asks: gradients are equal bit for bit. Views of an output count (flattened, transposed,
    one time step of it); anything else is kept as it is: averages, sums, what was changed in place.
    Max pooling keeps its places in 16 bits instead of 64, where a plane has at most 32,768.

    Works on ALIF and on SpikingJelly's LIF, PLIF and IF; another neuron's output, or one without a
    spiking surrogate, need not be zeros and ones, and is kept as it is. Of a surrogate of one's own
    each output is looked at. In a graph of
    ``torch.compile`` nothing is packed: there the compiler decides what is kept.

    Returns:
        A :class:`.PackedSpikes`, which stays on until :meth:`.PackedSpikes.remove` or the end of
        ``with``. Only the forward pass has to lie inside.

    Raises:
        ValueError: ``net`` has no neuron, or no layer that saves its input.

    >>> from sj_taid import ALIFNode
    >>> net = nn.Sequential(nn.Linear(2, 3), ALIFNode(), nn.Linear(3, 1))
    >>> with packed_spikes(net):
    ...     loss = net(torch.rand(8, 2)).sum()
    >>> loss.backward()
    """
    check_net(net, "packed_spikes")
    return PackedSpikes(net)


class PackedSpikes:
    """What :func:`.packed_spikes` returns."""

    def __init__(self, net: nn.Module) -> None:
        neurons = [m for m in net.modules() if type(m) in _NEURONS]
        readers = [m for m in net.modules() if isinstance(m, _READERS)]
        if not neurons or not readers:
            raise ValueError(
                f"{type(net).__name__} has {len(neurons)} neurons and {len(readers)} layers "
                "that save their input; packing needs some of both"
            )
        self._summary = f"{len(neurons)} neurons' spikes for {len(readers)} layers"
        self._handles = [
            *(node.register_forward_pre_hook(_request) for node in neurons),
            # Before other hooks, which may give another output.
            *(
                node.register_forward_hook(_remember, always_call=True, prepend=True)
                for node in neurons
            ),
            *(reader.register_forward_pre_hook(_enter) for reader in readers),
            *(reader.register_forward_hook(_leave, always_call=True) for reader in readers),
        ]

    def __repr__(self) -> str:
        return f"PackedSpikes({self._summary})"

    def remove(self) -> None:
        """Keep spikes as they are again; what is packed already stays readable."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> PackedSpikes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


# The hooks are functions of this module and hold nothing, so that a net that packs can be copied
# and pickled like any other.


@dataclass
class _Output:
    """A neuron's output while it lives, and its bits."""

    spikes: TensorWeakRef
    version: int
    #: the output's memory as a sequence ``[T, *]``, which the bits stand for
    shape: torch.Size
    stride: tuple[int, ...]
    bits: Tensor | None

    def get_bits(self) -> Tensor:
        if self.bits is None:  # a neuron whose forward writes none
            self.bits = bits.pack(self.spikes().as_strided(self.shape, self.stride))
        return self.bits


#: address of the storage -> the neuron's output that lies there
_outputs: dict[int, _Output] = {}
_open = threading.local()


class _Packed(NamedTuple):
    """A saved view of a neuron's output, and all that is needed to make it again."""

    bits: Tensor
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    view: tuple[Any, ...]  # shape, strides and offset

    def restore(self) -> Tensor:
        spikes = torch.empty_strided(
            self.shape, self.stride, dtype=self.dtype, device=self.bits.device
        )
        bits.unpack_into(self.bits, spikes)
        return spikes.as_strided(*self.view)


class _Places(NamedTuple):
    """Where max pooling found the greatest values of a plane."""

    bits: Tensor

    def restore(self) -> Tensor:
        return self.bits.to(torch.int64)


def _request(node: Any, inputs: tuple[Tensor, ...]) -> None:
    if torch.is_grad_enabled():
        bits.request()


def _remember(node: Any, inputs: tuple[Tensor, ...], spikes: Tensor | None) -> None:
    written = bits.taken()
    if spikes is not None and _are_spikes(spikes, node.surrogate_function):
        _register(spikes, spikes.unsqueeze(0) if node.step_mode == "s" else spikes, written)


def _are_spikes(output: Tensor, surrogate_function: Any) -> bool:
    """Whether a neuron's output is zeros and ones."""
    if type(surrogate_function).__module__ == surrogate.__name__:
        return getattr(surrogate_function, "spiking", False)
    # One of the user's own may give anything.
    return not torch.compiler.is_compiling() and bool(((output == 0) | (output == 1)).all())


def _register(spikes: Tensor, sequence: Tensor, written: Tensor | None) -> None:
    """Remember ``spikes``, whose memory is that of ``sequence`` ``[T, *]``."""
    address = _address(spikes)
    for other in [a for a, output in list(_outputs.items()) if output.spikes() is None]:
        _outputs.pop(other, None)
    if address and torch.is_grad_enabled() and is_dense(sequence):
        _outputs[address] = _Output(
            TensorWeakRef(spikes), spikes._version, sequence.shape, sequence.stride(), written
        )


def _address(tensor: Any) -> int:
    """Where the tensor's storage is; 0 where there is none to speak of."""
    if torch.compiler.is_compiling() or not isinstance(tensor, Tensor):
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except NotImplementedError:  # a wrapper of torch.func's
        return 0


def _find(tensor: Any) -> tuple[_Output, Tensor] | None:
    """The neuron's output, unchanged since, that ``tensor`` is a view of."""
    output = _outputs.get(_address(tensor))
    spikes = None if output is None else output.spikes()
    if (
        output is None
        or spikes is None
        or tensor.dtype != spikes.dtype
        or tensor._version != output.version
    ):
        return None
    return output, spikes


def _enter(reader: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Before a layer's forward: from here on, what is saved of a neuron's output is packed."""
    if torch.compiler.is_compiling():
        return None
    found = _find(inputs[0]) if inputs else None
    changed = None
    if found and isinstance(reader, _CAST) and torch.is_autocast_enabled(inputs[0].device.type):
        # The layer would cast its input, and save a tensor that nobody knows.
        (output, spikes), lower = found, torch.get_autocast_dtype(inputs[0].device.type)
        if lower != spikes.dtype and inputs[0].numel() == spikes.numel():
            cast = inputs[0].to(lower)  # which keeps the order of its memory
            sequence = cast.as_strided(output.shape, output.stride)
            _register(cast, sequence, output.get_bits())
            changed = (cast, *inputs[1:])
    if found and isinstance(reader, _MAX_POOLING) and not _has_small_planes(reader, inputs[0]):
        found = None
    hooks = saved_tensors_hooks(_pack, _unpack) if found else nullcontext()
    hooks.__enter__()
    _stack().append((hooks, found))
    return changed


def _has_small_planes(reader: nn.Module, x: Tensor) -> bool:
    """Whether 16 bits hold a place in what is pooled."""
    kinds = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
    axes = next(n for n, kind in enumerate(kinds, 1) if isinstance(reader, kind))
    return x.shape[-axes:].numel() <= 1 << 15


def _leave(reader: Any, inputs: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    hooks, found = _stack().pop()
    hooks.__exit__(None, None, None)
    if found and isinstance(reader, _MAX_POOLING) and isinstance(output, Tensor):
        _register(output, output, None)


def _stack() -> list[Any]:
    """The hooks that are open in this thread."""
    if not hasattr(_open, "stack"):
        _open.stack = []
    return _open.stack


def _pack(tensor: Tensor) -> Tensor | _Packed | _Places:
    found = _find(tensor)
    if found is None:
        return _Places(tensor.to(torch.int16)) if tensor.dtype == torch.int64 else tensor
    output, spikes = found
    view = (tensor.shape, tensor.stride(), tensor.storage_offset() - spikes.storage_offset())
    return _Packed(output.get_bits(), spikes.dtype, output.shape, output.stride, view)


def _unpack(kept: Tensor | _Packed | _Places) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.restore()
