"""Accelerated norms and neurons: subclasses that a module's class is exchanged for, and back."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from .. import _compat, _graph, neurons
from .._fused_neuron import Accelerated, FusedNeuron
from ..neuron import ALIFNode
from ..ops import backends, surrogate
from ..ops.alif import norm as norms
from ..ops.alif.autograd import arranged
from ..ops.alif.norm import Norm
from ..ops.alif.reference import state_dtype
from ..ops.bits import is_dense
from .compact import Compact, Counts, Known, compact, saving
from .norm_output import NormOutput, memory_order, wait


class _Exchanged(Accelerated):
    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made when needed: copy and pickle would not find it by its name.
        return _new, (self.kind,), self.__getstate__()


def _new(kind: type) -> Any:
    made: Any = accelerated_class(kind)
    return made.__new__(made)


@cache
def accelerated_class(kind: Any) -> type:
    """The accelerated subclass of a class of norms or neurons, with the same name."""
    if issubclass(kind, _BatchNorm):
        mixin: type = AcceleratedNorm
    else:
        mixin = AcceleratedALIF if issubclass(kind, ALIFNode) else AcceleratedNeuron
    names = {"kind": kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (mixin, kind), names)


def accelerate_module(module: Any) -> Any:
    """Give a norm or a neuron its accelerated class; the caller must set a norm's ``readers``."""
    kind: Any = type(module)
    module.__class__ = accelerated_class(kind)
    return module


#: a subclass that overrides one of these may compute something other than batch norm
_NORM_METHODS = ("forward", "super_forward", "__call__", "_check_input_dim")
#: the norms whose output can wait
_KNOWN_NORMS = {
    kind
    for home in (nn, layer)
    for name, kind in vars(home).items()
    if re.fullmatch(r"(ThresholdDependent)?BatchNorm\dd", name)
}


def why_no_norm(module: nn.Module) -> str | None:
    """Why the output of a norm cannot wait, or ``None``."""
    if isinstance(module, nn.SyncBatchNorm):
        return "its statistics are those of all processes"
    kinds = type(module).__mro__
    known = next((n for n, kind in enumerate(kinds) if kind in _KNOWN_NORMS), None)
    own = {name for kind in kinds[:known] for name in _NORM_METHODS if name in vars(kind)}
    if known is None or own:
        return f"{type(module).__name__} is not known to compute torch's batch norm"
    if is_parametrized(module):
        return "it is parametrized"
    return "its forward was replaced" if "forward" in vars(module) else None


def _steps_aside() -> bool:
    """Whether something traces, counts or transforms operations, and needs the plain module's."""
    traces = torch.jit.is_tracing() or torch.compiler.is_exporting()
    return traces or _graph.is_watched() or _graph.is_transformed()


class AcceleratedNorm(_Exchanged):
    """A batch norm whose output waits for its reader."""

    #: what has read the output, for the report, and whether as one operation
    readers: dict[str, bool]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        module: Any = self
        if isinstance(x, NormOutput):
            x = x.plain("batch_norm")
        if torch.compiler.is_compiling() or type(x) not in (Tensor, Compact) or _steps_aside():
            return super().forward(x)  # type: ignore[misc]
        if x.is_inference():  # its changes are not counted, so the output cannot wait
            return super().forward(x)  # type: ignore[misc]
        folds = getattr(self, "step_mode", "s") == "m"
        statistics = backends.resolve(backends.AUTO, x, None).statistics
        if statistics is None or x.dim() < 2 + folds or x.shape[1 + folds] != module.num_features:
            return super().forward(x)  # type: ignore[misc]
        flat = x.flatten(0, 1) if folds else x
        module._check_input_dim(flat)
        least = flat.shape[1] if module.training or module.running_mean is None else 0
        if flat.numel() <= least:
            return super().forward(x)  # type: ignore[misc]  # torch's error, or an empty batch
        if not is_dense(flat):
            flat = flat.contiguous()
        norm = Norm.of(module)
        norm = norm._replace(affine=norms.affine(norm, flat.unsqueeze(0), statistics))
        output = wait(flat, norm, self.readers, x.shape)
        if module._backward_hooks:
            output.watch()
        return output


class AcceleratedALIF(_Exchanged):
    """An ALIF that computes the norm before it too, and gives spikes that are saved as bits."""

    def _multi_step(
        self, x_seq: Tensor, v: Tensor | float, store_v_seq: bool, **options: Any
    ) -> tuple[Any, ...]:
        node: Any = self
        if torch.compiler.is_compiling() and isinstance(x_seq, NormOutput):
            x_seq = _plain(x_seq)
        if torch.compiler.is_compiling() or _steps_aside():
            return super()._multi_step(x_seq, v, store_v_seq)  # type: ignore[misc]
        strides = self._strides(x_seq)
        if isinstance(x_seq, NormOutput):
            x_seq, options = _read(node, x_seq)
        return_bits = torch.is_grad_enabled()
        known = [x_seq] if isinstance(x_seq, Known) else []
        with torch._C.DisableTorchFunctionSubclass(), saving(known):
            spike_seq, v_last, v_seq, *bits = super()._multi_step(  # type: ignore[misc]
                x_seq, v, store_v_seq, return_bits=return_bits, **options
            )
            fired, spike_seq = spike_seq, arranged(spike_seq, strides)
        if spike_seq is not fired:  # the bits have the other memory order
            bits = []
        # A surrogate with spiking=False gives no spikes.
        if not spike_seq.is_inference() and not surrogate.unsupported(node.surrogate_function):
            compact(spike_seq, Counts(spike_seq, 1, *bits))
        return spike_seq, v_last, v_seq

    def _strides(self, x_seq: Tensor) -> tuple[int, ...]:
        """The strides of the plain neuron's spikes."""
        dense = x_seq if is_dense(x_seq) else torch.empty(x_seq.shape, device="meta")
        return dense.stride()


@torch._disable_dynamo
def _plain(output: NormOutput) -> Tensor:
    return output.plain("a compiled neuron")


def _read(node: Any, output: NormOutput) -> tuple[Tensor, dict[str, Any]]:
    """What a neuron computes of a norm's output: the input of the operator, and its options."""
    name = node._name or type(node).__name__
    backend = node.backend if isinstance(node, ALIFNode) else backends.AUTO
    if backends.resolve(backend, output, node.surrogate_function).statistics is None:
        return output.plain(f"{name}, which is not on a fused operator"), {}
    reading = output.read_as_one(name, has_channels=getattr(node, "channels", None) is not None)
    return (output.plain(f"{name}: {reading}"), {}) if isinstance(reading, str) else reading


class AcceleratedNeuron(AcceleratedALIF, FusedNeuron):
    """A LIF, PLIF or IF neuron on the fused operator; all else is its own."""

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_sequence = isinstance(x_seq, NormOutput) or (
            isinstance(x_seq, Tensor) and x_seq.is_floating_point() and x_seq.dim() > 1
        )
        if args or kwargs or not is_sequence or _steps_aside():
            return self.kind.multi_step_forward(self, x_seq, *args, **kwargs)  # type: ignore[attr-defined]
        spike_seq = super().multi_step_forward(x_seq)
        # 0.0.0.0.14 computes, and gives spikes, in float32 under autocast.
        lowers = not _compat.FUNCTIONAL_STATES and torch.is_autocast_enabled(x_seq.device.type)
        return spike_seq.float() if lowers else spike_seq

    def _strides(self, x_seq: Tensor) -> tuple[int, ...]:
        # torch.stack of its steps keeps channels last alone.
        if x_seq.is_contiguous():
            return x_seq.stride()
        step = torch.empty_strided(x_seq.shape[1:], x_seq.stride()[1:], device="meta")
        step = torch.empty_like(step)  # dense
        strides = torch.empty_like(step, memory_format=memory_order(step)).stride()
        return step.numel(), *strides

    def _start(self, x_seq: Tensor) -> Tensor | float:
        """As in SpikingJelly: 2.x moves a voltage, and starts again if its shape is another."""
        v = self.v
        if isinstance(v, Tensor) and _compat.FUNCTIONAL_STATES:
            v = v.to(x_seq.device) if v.shape == x_seq.shape[1:] else self.v_reset or 0.0
        return v

    def _operands(self, x_seq: Tensor) -> dict[str, Any]:
        node: Any = self
        dtype = state_dtype(x_seq.dtype)
        w = getattr(node, "w", neurons.NO_LEAK_W)  # PLIF's own, or IF's
        if isinstance(node, neuron.LIFNode):
            tau = float(node.tau)
            if reason := neurons.why_no_w(tau):
                raise ValueError(f"{self._label()}: {reason}; sj_taid.unaccelerate(net) first")
            w = neurons.nearest_w(tau, dtype)
        operands = {
            name: value if isinstance(value, Tensor) else x_seq.new_full((), value, dtype=dtype)
            for name, value in {"w": w, "v_threshold": node.v_threshold}.items()
        }
        return operands | {"decay_input": getattr(node, "decay_input", False)}
