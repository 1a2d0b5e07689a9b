"""Spikes saved for backward as bits along time, not as numbers of two or four bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from . import _compat, _graph, _spikes
from ._checks import check_net
from ._forward import PackingForward
from ._fused_neuron import FusedNeuron

__all__ = ["PackedSpikes", "packed_spikes"]

#: The layers that save their input.
_LAYERS = (nn.Linear, _ConvNd, _AvgPoolNd, _MaxPoolNd)


def packed_spikes(net: nn.Module) -> PackedSpikes:
    r"""Save the spikes that the layers of ``net`` need for backward as bits.

    A convolution, linear or pooling layer saves its input. Where that is the output of ALIF, LIF,
    PLIF or IF, of max pooling of one, or a view of them, each spike takes one bit instead of 32 or
    16, and is restored in backward: gradients are equal bit for bit. Of any input of a pooling
    layer the shape alone is saved, and max pooling's indices take 16 bits instead of 64, where a
    plane has at most 32,768 pixels. Anything else is saved as it is.

    The output under a custom surrogate is packed if it is zeros and ones, which reads it once more.
    A module whose ``forward`` was replaced is left alone. Inside ``torch.utils.checkpoint`` and in
    a graph of ``torch.compile``, which decide themselves what is saved, nothing is packed.

    Returns:
        A :class:`.PackedSpikes`, on until its ``remove()`` or the end of ``with``. Only the forward
        pass has to lie inside.

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


class PackedSpikes(AbstractContextManager["PackedSpikes"]):
    """The handle that :func:`.packed_spikes` returns."""

    def __init__(self, net: nn.Module) -> None:
        kinds = PackingForward, type(None)
        modules = [m for m in net.modules() if isinstance(vars(m).get("forward"), kinds)]
        neurons = [
            m for m in modules if isinstance(m, FusedNeuron) or type(m) in _compat.PLAIN_NEURONS
        ]
        layers = [m for m in modules if isinstance(m, _LAYERS)]
        if not neurons or not layers:
            raise ValueError(
                f"{type(net).__name__} has {len(neurons)} neurons and {len(layers)} layers "
                "that save their input; packing needs some of both"
            )
        self._summary = f"{len(neurons)} neurons' spikes for {len(layers)} layers"
        self._packers = [_packer_of(module) for module in (*neurons, *layers)]
        for packer in self._packers:
            packer.packing += 1

    def __repr__(self) -> str:
        return f"PackedSpikes({self._summary})"

    def remove(self) -> None:
        """Save spikes as they are again; what is packed already stays readable."""
        while self._packers:
            packer = self._packers.pop()
            packer.packing -= 1
            if not packer.packing:
                packer.remove()

    def __exit__(self, *error: object) -> None:
        self.remove()


def _packer_of(module: Any) -> PackingForward:
    """What registers the spikes of a neuron, or packs what a layer saves."""
    if "forward" not in vars(module):
        kind = _LayerForward if isinstance(module, _LAYERS) else _NeuronForward
        module.forward = kind(module)
    return module.forward


class _NeuronForward(PackingForward):
    """Registers the spikes of a neuron of SpikingJelly's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        spikes = self.run(*args, **kwargs)
        node = self.module
        if self.is_on() and not isinstance(node, FusedNeuron):  # which registers them itself
            known = None if _spikes.is_patched(node, self) else node.surrogate_function
            if _spikes.are_spikes(spikes, known):
                _spikes.register(spikes, spikes.unsqueeze(0) if node.step_mode == "s" else spikes)
        return spikes


class _LayerForward(PackingForward):
    """Packs the spikes that a layer saves."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.is_on() and args and _graph.allows_hooks()):
            return self.run(*args, **kwargs)
        layer, spikes, outer = self.module, _spikes.find(args[0]), _graph.saving_hooks()
        # Only a forward of torch's or SpikingJelly's is known to pass its input on to one operator.
        known = type(layer).forward.__module__.startswith(("torch.nn.", "spikingjelly."))
        pools = known and isinstance(layer, _AvgPoolNd | _MaxPoolNd)
        if (spikes is None and not pools) or _graph.is_checkpointed():
            return self.run(*args, **kwargs)
        if spikes and known and isinstance(layer, nn.Linear | _ConvNd):
            args = (_cast(args[0], spikes), *args[1:])
        takes_greatest = pools and isinstance(layer, _MaxPoolNd)
        narrow = takes_greatest and _has_small_planes(layer, args[0])
        with saved_tensors_hooks(*_hooks(pools, narrow, outer)):
            output = self.run(*args, **kwargs)
        # The greatest of zeros and ones is one of them; a dilated window may lie in the padding.
        dense = takes_greatest and layer.dilation in (1, (1,), (1, 1), (1, 1, 1))
        if spikes is not None and dense and isinstance(output, Tensor):
            _spikes.register(output, output)
        return output


def _cast(x: Tensor, spikes: _spikes.Spikes) -> Tensor:
    """``x`` as autocast would cast it, which would save a tensor that nobody knows."""
    device = x.device.type
    lower = torch.get_autocast_dtype(device)
    if (
        not torch.is_autocast_enabled(device)
        or lower == x.dtype
        or x.numel() != spikes.shape.numel()
    ):
        return x
    cast = x.to(lower)  # in the same memory order
    _spikes.register(cast, cast.as_strided(spikes.shape, spikes.stride), spikes.bits)
    return cast


def _has_small_planes(pooling: nn.Module, x: Tensor) -> bool:
    """Whether 16 bits hold an index into the planes of ``x``."""
    kinds = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
    axes = next(n for n, kind in enumerate(kinds, 1) if isinstance(pooling, kind))
    return x.shape[-axes:].numel() <= 1 << 15


def _hooks(
    pools: bool, narrow: bool, outer: Any
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Hooks that save spikes as bits, what pooling reads as its shape, and, if ``narrow``, int64
    as int16.

    The hooks around them, ``outer``, save what these make.
    """
    outer_pack, outer_unpack = outer or (_same, _same)

    def pack(tensor: Tensor) -> Any:
        # On the devices whose backward is known to read no value of pooling's input.
        if pools and tensor.is_floating_point() and tensor.device.type in ("cpu", "cuda"):
            shape = (tensor.shape, tensor.stride())
            return outer_pack(tensor.new_empty(0)), lambda empty: empty.new_empty_strided(*shape)
        spikes = _spikes.find(tensor)
        if spikes is not None:
            return outer_pack(spikes.bits), spikes.restorer(tensor)
        if narrow and tensor.dtype == torch.int64:
            return outer_pack(tensor.to(torch.int16)), torch.Tensor.long
        return outer_pack(tensor), _same

    def unpack(saved: Any) -> Tensor:
        small, restore = saved
        return restore(outer_unpack(small))

    return pack, unpack


def _same(value: Any) -> Any:
    return value
