"""Accelerated norms and neurons: subclasses that a module's class is exchanged for, and back."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from .._internal import compat, graph
from ..fused_neuron import Accelerated, FusedNeuron
from ..kept.kept import Kept
from ..kept.norms import normalize, place_of
from ..kept.saving import run_saving
from ..neuron import ALIFNode
from ..ops.step.plan import Plans
from ..ops.step.record import is_state


class Exchanged(Accelerated):
    """An accelerated module, of a class that :func:`accelerated_class` makes."""

    _taid_mixin: type  #: AcceleratedNorm, AcceleratedALIF or AcceleratedNeuron

    def __init_subclass__(cls) -> None:
        """Do nothing, in place of a hook of the net's class, which may list subclasses."""

    def extra_repr(self) -> str:
        kind: Any = self._taid_kind
        return ", ".join(filter(None, (kind.extra_repr(self), "accelerated")))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made when needed: copy and pickle would not find it by its name.
        return _new, (self._taid_kind, self._taid_mixin), self.__getstate__()


def _new(kind: type, mixin: type) -> Any:
    made: Any = accelerated_class(kind, mixin)
    return made.__new__(made)


@cache
def accelerated_class(kind: Any, mixin: Any) -> type:
    """The subclass of a class of norms or neurons that adds ``mixin``, with the same name."""
    names = {"_taid_kind": kind, "_taid_mixin": mixin}
    names |= {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    names["_taid_stores_states"] = hasattr(kind, "store_state_seqs")
    names["_taid_starts_at_numbers"] = compat.starts_at_numbers(kind)
    return type(kind.__name__, (mixin, kind), names)


def accelerate_module(module: Any) -> Any:
    """Give a norm or a neuron its accelerated class."""
    kind: Any = type(module)
    if issubclass(kind, _BatchNorm):
        mixin: type = AcceleratedNorm
    elif issubclass(kind, ALIFNode):
        mixin = AcceleratedALIF
    else:
        mixin = AcceleratedNeuron
    module.__class__ = accelerated_class(kind, mixin)
    return module


def why_not_own(node: nn.Module) -> str | None:
    """Why a module does not run as its class does, or ``None``."""
    if any(map(callable, (v for n, v in vars(node).items() if hasattr(type(node), n)))):
        return "a function of its own, which the fused operator would not call"
    return None


#: a subclass that overrides one of these may compute something other than batch norm
_NORM_METHODS = ("forward", "super_forward", "__call__", "_check_input_dim")
#: the norms whose input a neuron may take
_KNOWN_NORMS = {
    kind
    for home in (nn, layer)
    for name, kind in vars(home).items()
    if re.fullmatch(r"(ThresholdDependent)?BatchNorm\dd", name)
}


def why_not_fused(module: nn.Module) -> str | None:
    """Why no neuron can take the input of a norm, or ``None``."""
    if isinstance(module, nn.SyncBatchNorm):
        return "its statistics are taken over all processes"
    kinds = type(module).__mro__
    known = next((n for n, kind in enumerate(kinds) if kind in _KNOWN_NORMS), None)
    own = {name for kind in kinds[:known] for name in _NORM_METHODS if name in vars(kind)}
    if known is None or own:
        return f"{type(module).__name__} is not known to compute torch's batch norm"
    if is_parametrized(module):
        return "it is parametrized"
    return "its forward was replaced" if "forward" in vars(module) else None


class AcceleratedNorm(Exchanged):
    """A batch norm whose input a neuron may take in place of its output."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        if torch.is_grad_enabled() and type(x) in (Tensor, Kept) and graph.is_eager():
            with graph.plain_functions():
                if x.requires_grad and self.eps > 0:  # type: ignore[attr-defined]
                    folds = getattr(self, "step_mode", "s") == "m"
                    key, plans = (x.shape, x.stride(), x.dtype, x.device, folds), Plans.of(self)
                    place = plans.get(key, key)
                    if place is key:
                        place = plans.store(key, place_of(self, x, folds))
                    if place is not None:
                        kept = (x,) if type(x) is Kept else ()
                        if kept and x._source is not None:
                            x._source.note(torch.batch_norm)
                        return run_saving(kept, normalize, (self, x, place, folds), {})
        return super().forward(x)  # type: ignore[misc]


class AcceleratedALIF(Exchanged):
    """An ALIF that takes the input of the norm before it, and whose spikes are saved as bits."""


class AcceleratedNeuron(Exchanged, FusedNeuron):
    """A neuron on the fused operator; all else is its own."""

    _taid_stores_states: bool  #: whether its class can store each step's states, as CLIF
    _taid_starts_at_numbers: bool  #: :func:`..compat.starts_at_numbers` of its class

    @property
    def _taid_step(self) -> Any:
        return compat.step_of(self._taid_kind)

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Any:
        node: Any = self
        with graph.plain_functions():  # asked without torch's slow dispatch
            fits = isinstance(x_seq, Tensor) and x_seq.is_floating_point() and x_seq.dim() > 1
            fits = fits and x_seq.shape[0] > 0
        fits = fits and not (self._taid_stores_states and node.store_state_seqs)
        aside = not graph.is_eager() and graph.steps_aside()
        if fits and not (args or kwargs or aside):
            store_v_seq, states = getattr(node, "store_v_seq", False), self._taid_start(x_seq)
            results = self._taid_run(x_seq, states, store_v_seq)
            if results is not None:
                spike_seq, *after, v_seq = results
                node._memories.update(zip(states, after, strict=True))
                if store_v_seq:
                    self.v_seq = v_seq
                # 0.0.0.0.14 computes, and gives spikes, in float32 under autocast.
                lowers = not compat.FUNCTIONAL_STATES
                lowers = lowers and torch.is_autocast_enabled(x_seq.device.type)
                return spike_seq.float() if lowers else spike_seq
        return self._taid_kind.multi_step_forward(self, x_seq, *args, **kwargs)  # type: ignore[attr-defined]

    def _taid_strides(self, shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
        # torch.stack of its steps keeps channels last alone.
        step = torch.empty_like(torch.empty_strided(shape[1:], strides[1:], device="meta"))  # dense
        inner = torch.empty_like(step, memory_format=_memory_order(step)).stride()
        return step.numel(), *inner

    def _taid_start(self, x_seq: Tensor) -> dict[str, Any]:
        """The states that a sequence starts from, as its class makes them."""
        node: Any = self
        states: dict[str, Any] = {}
        are_numbers = True
        for name, value in node._memories.items():
            if is_state(name, value):
                states[name] = value
                are_numbers &= not isinstance(value, Tensor)
        if compat.FUNCTIONAL_STATES and not (are_numbers and self._taid_starts_at_numbers):
            made = node.materialize_states((x_seq,), tuple(node._memories.values()), "m")
            states |= {n: v for n, v in zip(node._memories, made, strict=True) if n in states}
        return states


def _memory_order(x: Tensor) -> torch.memory_format:
    """The memory format of torch's batch norm of ``x``: channels last, or contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    is_last = last is not None and x.is_contiguous(memory_format=last)
    return last if last and is_last and not x.is_contiguous() else torch.contiguous_format
