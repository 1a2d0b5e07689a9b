"""Accelerated norms and neurons: subclasses that a module's class is exchanged for, and back."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from .. import _compat, _graph, neurons
from .._fused_neuron import Accelerated, FusedNeuron
from ..neuron import ALIFNode
from ..ops.alif.autograd import arranged
from ..ops.alif.plan import Plans
from ..ops.bits import is_dense
from ..ops.surrogate import levels_of
from . import sums as sums
from .compact import Compact, Counts, Known, compact, saving
from .norm_output import NormOutput, Recomputed, decide, memory_order, wait


class Exchanged(Accelerated):
    """An accelerated module: ``_taid_mixin`` is what its class adds to its own."""

    _taid_mixin: type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What type(module)(...) makes is a module of the net's class.
        self.__class__ = self._taid_kind
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def __init_subclass__(cls) -> None:
        """Leave out the hook of the net's class, which may keep a list of subclasses."""

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
    if mixin is AcceleratedNeuron:
        names["_taid_numbers"] = attrgetter(
            "v_reset", "detach_reset", "v_threshold", *_charges(kind)
        )
    return type(kind.__name__, (mixin, kind), names)


def _charges(kind: type) -> tuple[str, ...]:
    """The plain attributes that a LIF, PLIF or IF charges by."""
    if issubclass(kind, neuron.LIFNode):
        return "decay_input", "tau"
    return ("decay_input",) if issubclass(kind, neuron.ParametricLIFNode) else ()


def accelerate_module(module: Any) -> Any:
    """Give a norm or a neuron its accelerated class."""
    kind: Any = type(module)
    if issubclass(kind, _BatchNorm):
        mixin: type = AcceleratedNorm
        module._taid_readers = {}
    else:
        mixin = AcceleratedALIF if issubclass(kind, ALIFNode) else AcceleratedNeuron
    module.__class__ = accelerated_class(kind, mixin)
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
    """A batch norm whose output waits for its reader."""

    #: what has read the output, for the report, and whether as one operation
    _taid_readers: dict[str, bool]
    #: the running statistics of the last call, if nobody knows yet who reads its output
    _taid_trial: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        if self._taid_trial is not None:
            self._taid_trial.close()
        if type(x) is NormOutput:
            x = x.plain("batch_norm")
        # Where the input has no graph, waiting saves nothing.
        waits = type(x) in _WAITS and x.requires_grad and torch.is_grad_enabled()
        if not (waits and _graph.is_eager()):
            if torch.is_grad_enabled() and not x.requires_grad:
                self._taid_readers.setdefault(NO_GRADIENT, False)
            return super().forward(x)  # type: ignore[misc]
        module: Any = self
        # Whether the input is [T, N, C, *], not [M, C, *].
        folds = vars(module).get("_step_mode") == "m"
        tensors = _TENSORS(module)
        with torch._C.DisableTorchFunctionSubclass():
            forms = [x.stride(), x.is_inference(), folds, _NORM_NUMBERS(module)]
            for tensor in tensors:  # neither comprehension nor function, which take as long
                forms.append(tensor if tensor is None else (_FORM(tensor), tensor.stride()))
            key = (_FORM(x), *forms)
            plans = Plans.of(self)
            waiting = plans.get(key, key)
            if waiting is key:
                waiting = plans.keep(key, decide(module, x, folds, tensors))
            if waiting is not None:
                if waiting.pays():
                    return wait(module, x, waiting, *tensors)
                if waiting.is_marked:
                    y = super().forward(x)  # type: ignore[misc]
                    return compact(y, Recomputed(y, x, waiting, tensors))
        return super().forward(x)  # type: ignore[misc]


#: stands for the readers of a norm that did not wait
NO_GRADIENT = "its input requires no gradient"
#: the inputs whose norm can wait
_WAITS = (Tensor, Compact)
_FORM = attrgetter("__class__", "shape", "dtype", "device")
_TENSORS = attrgetter("weight", "bias", "running_mean", "running_var")
_NORM_NUMBERS = attrgetter("training", "momentum", "eps", "track_running_stats", "num_features")


class AcceleratedALIF(Exchanged):
    """An ALIF that computes the norm before it too, and gives spikes that are saved as bits."""

    _taid_takes = Tensor, nn.Parameter, Compact

    def _taid_run(
        self, x_seq: Tensor, v: Tensor | float, store_v_seq: bool, *unused: Any
    ) -> tuple[Any, ...]:
        if not _graph.is_eager():
            x_seq = _plain(x_seq) if isinstance(x_seq, NormOutput) else x_seq
            return super()._taid_run(x_seq, v, store_v_seq)  # type: ignore[misc]
        output: Any = x_seq
        norm, source, pack = None, x_seq, torch.is_grad_enabled()
        if type(x_seq) is NormOutput:
            found = x_seq.read_as_one(getattr(self, "channels", None) is not None)
            if isinstance(found, str):
                source = x_seq = x_seq.plain(f"{self._taid_reader()}: {found}")
            else:
                norm, source = found, found.x
        hooks = saving([source]) if isinstance(source, Known) else nullcontext()
        with torch._C.DisableTorchFunctionSubclass(), hooks:
            spike_seq, v_last, v_seq, bits = super()._taid_run(  # type: ignore[misc]
                x_seq, v, store_v_seq, pack, norm
            )
            if bits is None:
                return spike_seq, v_last, v_seq, None
            # Bits of spikes have an axis of time, counts have not.
            peak = 1 if bits.dim() == 2 else levels_of(self.surrogate_function)  # type: ignore[attr-defined]
            if norm is not None:
                output.mark_read(self._taid_reader())
            strides = x_seq.stride()
            if not x_seq.is_contiguous():
                strides = self._taid_strides(x_seq.shape, strides)
            if spike_seq.stride() != strides:  # the bits have the other memory order
                fired, spike_seq = spike_seq, arranged(spike_seq, strides)
                bits = bits if spike_seq is fired else None
        compact(spike_seq, Counts(spike_seq, peak, bits))
        return spike_seq, v_last, v_seq, None

    def _taid_run_operators(self, x_seq: Tensor, *arguments: Any) -> tuple[Any, ...]:
        if isinstance(x_seq, NormOutput):
            x_seq = x_seq.plain(f"{self._taid_reader()}, which is not on a fused operator")
        return super()._taid_run_operators(x_seq, *arguments)  # type: ignore[misc]

    def _taid_reader(self) -> str:
        node: Any = self
        return node._taid_name or type(node).__name__

    def _taid_strides(self, shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
        """The strides of the plain neuron's spikes for an input of these."""
        x_seq = torch.empty_strided(shape, strides, device="meta")
        return strides if is_dense(x_seq) else torch.empty(shape, device="meta").stride()


def is_float_sequence(x: Any) -> bool:
    """Whether ``x`` is a float tensor of several axes; asked without torch's slow dispatch."""
    with torch._C.DisableTorchFunctionSubclass():
        return isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1


@torch._disable_dynamo
def _plain(output: NormOutput) -> Tensor:
    return output.plain("a compiled neuron")


class AcceleratedNeuron(AcceleratedALIF, FusedNeuron):
    """A LIF, PLIF or IF neuron on the fused operator; all else is its own."""

    def _taid_constants(self, dtype: torch.dtype) -> tuple[float | None, bool, float | None]:
        node: Any = self
        v_threshold = None if isinstance(node.v_threshold, Tensor) else float(node.v_threshold)
        if isinstance(node, neuron.ParametricLIFNode):
            return None, node.decay_input, v_threshold
        if not isinstance(node, neuron.LIFNode):  # IF
            return -math.inf, False, v_threshold
        tau = float(node.tau)
        if reason := neurons.why_no_w(tau):
            raise ValueError(f"{self._taid_label()}: {reason}; sj_taid.unaccelerate(net) first")
        return neurons.nearest_w(tau, dtype), node.decay_input, v_threshold

    def _taid_operands(self) -> tuple[Tensor | None, Tensor | None]:
        node: Any = self
        v_threshold = node.v_threshold if isinstance(node.v_threshold, Tensor) else None
        return getattr(node, "w", None), v_threshold

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_sequence = isinstance(x_seq, NormOutput) or is_float_sequence(x_seq)
        aside = not _graph.is_eager() and _graph.steps_aside()
        if args or kwargs or not is_sequence or aside:
            return self._taid_kind.multi_step_forward(self, x_seq, *args, **kwargs)  # type: ignore[attr-defined]
        spike_seq = super().multi_step_forward(x_seq)
        # 0.0.0.0.14 computes, and gives spikes, in float32 under autocast.
        lowers = not _compat.FUNCTIONAL_STATES and torch.is_autocast_enabled(x_seq.device.type)
        return spike_seq.float() if lowers else spike_seq

    def _taid_strides(self, shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
        # torch.stack of its steps keeps channels last alone.
        step = torch.empty_like(torch.empty_strided(shape[1:], strides[1:], device="meta"))  # dense
        inner = torch.empty_like(step, memory_format=memory_order(step)).stride()
        return step.numel(), *inner

    def _taid_start(self, x_seq: Tensor) -> Tensor | float:
        """As in SpikingJelly: 2.x moves a voltage, and starts again if its shape is another."""
        v = self.v
        if isinstance(v, Tensor) and _compat.FUNCTIONAL_STATES:
            v = v.to(x_seq.device) if v.shape == x_seq.shape[1:] else self.v_reset or 0.0
        return v
