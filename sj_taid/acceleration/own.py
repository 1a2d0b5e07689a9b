"""Classes of a net's own, which run as :mod:`sj_taid.known` describes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from .. import _graph, neurons
from .._fused_neuron import Accelerated, FusedNeuron, restore_module
from ..known import LIF, BatchNorm, Neuron
from ..ops.alif.plan import Plans
from .compact import Known
from .modules import (
    AcceleratedALIF,
    AcceleratedNorm,
    Exchanged,
    accelerated_class,
    is_float_sequence,
)
from .report import ALREADY


class Function:
    """A function of ``known=``; pickled as ``None``, since a lambda cannot be."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __deepcopy__(self, memo: Any) -> Function:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()


class Own(Exchanged):
    """A module whose class is described.

    All that is added to it, besides ``forward``, begins with ``_taid_``: the class may have any
    other name.
    """

    _taid_description: Any
    #: gives the description at each call; None where known= has the description itself
    _taid_function: Function | None
    #: by values of ``training`` in which nothing has shown yet that the description is right, the
    #: number of calls; DataParallel's replicas share it
    _taid_unchecked: dict[bool, int]
    _taid_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        x: Any = given[0] if len(given) == 1 else None
        module: Any = self
        if not is_float_sequence(x) or not _graph.is_eager():
            return module._taid_kind.forward(module, *args, **kwargs)
        if module._taid_function is not None:
            module._taid_description = describe(module, module._taid_function.function)
        if module.training in self._taid_unchecked and not self._taid_try(x):
            return module._taid_kind.forward(module, x)
        return self._taid_run(x)

    def _taid_try(self, x: Tensor) -> bool:
        """Compare at calls 1, 2, 4, 8 and so on, until the output tells something."""
        module: Any = self
        calls = self._taid_unchecked.get(module.training, 0) + 1
        if calls & (calls - 1) or not _check(module, x):
            self._taid_unchecked[module.training] = calls
            return False
        self._taid_unchecked.pop(module.training, None)
        return True

    def __getstate__(self) -> Any:
        # A pickle has no function: it keeps the description of its moment.
        if self._taid_function is not None:
            self._taid_description = describe(self, self._taid_function.function)
        return super().__getstate__()

    def _taid_run(self, x: Any) -> Any:
        raise NotImplementedError

    def _taid_examples(self, x: Tensor) -> list[Tensor]:
        """The inputs of the two calls that are compared."""
        return [x, x]

    def _taid_state(self) -> dict[str, Any]:
        """What a call leaves, besides buffers."""
        return {}


@torch.inference_mode(False)
@torch.enable_grad()
def _check(module: Any, x: Tensor) -> bool:
    """Compare a module with its description; ``False`` if its output tells nothing yet."""
    x = x.values() if isinstance(x, Known) else x
    x = x.detach().float()
    plain = _results(module, lambda copy, x: copy._taid_kind.forward(copy, x), x)
    described = _results(module, lambda copy, x: copy._taid_run(x), x)
    if plain["output"].unique().numel() < 2:
        return False
    for name, value in plain.items():
        _compare(module, name, value, described[name])
    return True


def _results(module: Any, run: Any, x: Tensor) -> dict[str, Any]:
    """What two calls of a copy in a row give: outputs, gradients, buffers and state."""
    module = neurons.copy_net(module).float()
    leaf = x.clone().requires_grad_()
    inputs = module._taid_examples(leaf)
    outputs = [run(module, example) for example in inputs]
    for example, y in zip(inputs, outputs, strict=True):
        if not isinstance(y, Tensor) or y.shape != example.shape or not y.requires_grad:
            raise TypeError(
                f"{_label(module)} must give a tensor of its input's shape that has a gradient, "
                "to be compared with its description: sj_taid.unaccelerate(net), then accelerate "
                "without it in known="
            )
    y = torch.cat([y.flatten() for y in outputs])
    leaves = {"the input": leaf, **dict(module.named_parameters())}
    factors = torch.linspace(-1, 1, y.numel()).to(y)
    grads = torch.autograd.grad(y, [*leaves.values()], factors, allow_unused=True)
    values = {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    buffers = {n: b for n, b in module.named_buffers() if n != "num_batches_tracked"}
    return {"output": y.detach()} | values | buffers | module._taid_state()


def _compare(module: Any, name: str, value: Any, described: Any) -> None:
    if value is None and described is None:
        return
    pair = (torch.as_tensor(0.0 if t is None else t) for t in (value, described))
    value, described = torch.broadcast_tensors(*(t.detach().float().cpu() for t in pair))
    scale = float(value.abs().max())
    differs = ~torch.isclose(described, value, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)
    # A voltage that rounds to the other side of the threshold changes a spike, and all after.
    if (share := float(differs.float().mean())) > 0.01:
        ours, theirs = (float(t[differs].flatten()[0]) for t in (described, value))
        raise ValueError(
            f"{_label(module)} is not {module._taid_description}: {share:.0%} of its {name} "
            f"differ, as {theirs:.4g} of the class, {ours:.4g} of the description; correct "
            "known= and accelerate again, or sj_taid.unaccelerate(net)"
        )


def _label(module: Any) -> str:
    return f"{type(module).__name__} at {module._taid_name!r}"


class OwnNeuron(Own):
    """A neuron of a net's own."""

    def _taid_run(self, x: Any) -> Any:
        described = self._taid_description
        axis, voltage = described.time_axis, described.voltage
        plans = Plans.of(self)
        key = described.key
        node = plans.get(key) or plans.keep(key, DescribedNeuron(described, self._taid_name))
        if isinstance(described, LIF):  # an equal surrogate, but that of now
            node.surrogate_function = described.surrogate_function
        x_seq = x.transpose(0, axis) if axis else x
        v = 0.0 if voltage is None else getattr(self, voltage)
        v = 0.0 if v is None else v
        if isinstance(v, Tensor) and v.shape != x_seq.shape[1:]:
            with suppress(RuntimeError):  # other shapes are refused
                v = v.expand(x_seq.shape[1:])
        y, v, *_ = node._taid_run(x_seq, v, False)
        if voltage is not None:
            setattr(self, voltage, v)
        return y.transpose(0, axis) if axis else y

    def _taid_examples(self, x: Tensor) -> list[Tensor]:
        # The second is so large that every count comes, and has several steps.
        described = self._taid_description
        most = abs(described.v_threshold) * getattr(described, "levels", 1)
        large = x * (2 * most / x.detach().abs().mean().clamp(min=1e-6))
        axis = described.time_axis
        if described.tau is not None and large.shape[axis] == 1:
            large = torch.cat([large] * 3, axis)
        return [x, large]

    def _taid_state(self) -> dict[str, Any]:
        name = self._taid_description.voltage
        return {} if name is None else {f"attribute {name!r}": getattr(self, name)}


class DescribedNeuron(AcceleratedALIF, FusedNeuron):
    """Runs a description on the fused operator; no module, so that keys stay the net's."""

    store_v_seq = False
    _taid_numbers = attrgetter("v_reset", "detach_reset")  # the rest never changes

    def __init__(self, described: Any, name: str) -> None:
        self._described, self._taid_divisor, self._taid_name = described, described.divisor, name
        self.v_reset, self.detach_reset = described.v_reset, described.detach_reset
        self.surrogate_function = described.surrogate_function

    @cached_property
    def _w(self) -> float:
        tau = self._described.tau
        return math.inf if tau is None else neurons.nearest_w(tau, torch.float32)

    def _taid_constants(self, dtype: torch.dtype) -> tuple[float | None, bool, float | None]:
        return self._w, self._described.decay_input, self._described.threshold

    def _taid_operands(self) -> tuple[None, None]:
        return None, None

    def extra_repr(self) -> str:
        return repr(self._described)


class OwnNorm(Own, AcceleratedNorm):
    """A norm of a net's own; what it does with its buffers and parameters is torch's."""

    _taid_is_torchs = False
    _taid_channel_axis: Any = property(attrgetter("_taid_description.channel_axis"))

    def _taid_run(self, x: Any) -> Any:
        return AcceleratedNorm.forward(self, x)

    def _check_input_dim(self, x: Tensor) -> None:
        """Take any shape, as the class does."""

    @staticmethod
    def _taid_tensors(module: Any) -> tuple[Any, ...]:
        weight, bias, mean, var = AcceleratedNorm._taid_tensors(module)
        scale, scales_bias = module._taid_description.scale, module._taid_description.scales_bias
        if scale != 1.0:
            weight = torch.full_like(mean, scale) if weight is None else weight * scale
        if scales_bias and bias is not None:
            bias = bias * scale
        return weight, bias, mean, var


def class_of(module: Any) -> type:
    """The class of a module, accelerated or not."""
    return module._taid_kind if isinstance(module, Accelerated) else type(module)


def why_not_described(module: nn.Module, known: Mapping[type, Any]) -> str | None:
    """Why a module is not run by a description of its class or a parent of it, or ``None``."""
    if class_of(module) in known:
        if is_parametrized(module):
            return "it is parametrized"
        return "its forward was replaced" if "forward" in vars(module) else None
    if isinstance(module, Accelerated):
        return ALREADY if isinstance(module, OwnNeuron) else None
    parent = next((kind for kind in type(module).__mro__ if kind in known), None)
    return f"a subclass of {parent.__name__}, which known= names: name it too" if parent else None


def describe(module: Any, given: Any) -> Any:
    """The description of a module, given as such or by a function of the module."""
    is_function = not isinstance(given, Neuron | BatchNorm) and callable(given)
    description = given(module) if is_function else given
    if not isinstance(description, Neuron | BatchNorm):
        raise TypeError(f"known= takes descriptions of sj_taid.known, not {description!r:.80}")
    return description


def find_described(net: nn.Module, known: Mapping[type, Any]) -> dict[str, tuple[Any, ...]]:
    """The modules of ``net`` whose class is described, by path.

    With each its description, and the function that gave it or ``None``.
    """
    found = {}
    for path, module in net.named_modules():
        kind = class_of(module)
        if kind not in known or why_not_described(module, known):
            continue
        description = known[kind]
        function = None if isinstance(description, Neuron | BatchNorm) else Function(description)
        description = describe(module, description)
        if isinstance(description, BatchNorm):
            if not isinstance(module, _BatchNorm):
                raise TypeError(
                    "known.BatchNorm describes subclasses of torch's batch norms, but "
                    f"{type(module).__name__} is none; batch norms within it are known as they are"
                )
            if description.scale != 1.0 and module.weight is module.running_mean is None:
                raise TypeError(
                    f"known.BatchNorm scales a weight or running statistics, and {path!r} has none"
                )
        voltage = getattr(description, "voltage", None)
        if voltage is not None and not hasattr(module, voltage):
            raise AttributeError(
                f"known= says voltage={voltage!r}, but the {type(module).__name__} at {path!r} has "
                "no such attribute"
            )
        found[path] = module, description, function
    return found


def describe_module(module: Any, description: Any, function: Any, path: str, check: bool) -> None:
    """Let a module run as its description says."""
    if isinstance(module, Accelerated):
        restore_module(module)  # what it was before, by another description or none
    own: Any = OwnNorm if isinstance(description, BatchNorm) else OwnNeuron
    kind: Any = type(module)
    module.__class__ = accelerated_class(kind, own)
    module._taid_function, module._taid_name = function, path
    module._taid_description = description
    if own is OwnNorm:
        module._taid_readers = {}
    module._taid_unchecked = {True: 0, False: 0} if check else {}
