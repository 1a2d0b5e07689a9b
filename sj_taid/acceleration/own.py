"""Classes of a net's own, which run as :mod:`sj_taid.known` describes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import _graph, neurons
from .._fused_neuron import FusedNeuron
from ..known import BatchNorm, Neuron
from ..ops.alif.plan import Plans
from .compact import Known
from .modules import AcceleratedALIF, AcceleratedNorm, Exchanged, accelerated_class


class Own(Exchanged):
    """A module whose class is described."""

    _description: Any
    #: empty once a call has shown that the description is right; DataParallel's replicas share it
    _unchecked: list[str]
    _name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        takes = isinstance(x, Tensor) and x.is_floating_point() and _graph.is_eager()
        if not takes or (self._unchecked and not self._check(x)):
            return self.kind.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        return self._run_described(x)

    def _run_described(self, x: Any) -> Any:
        raise NotImplementedError

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _check(self, x: Tensor) -> bool:
        """Compare the description with the module; ``False`` if its output tells nothing yet."""
        x = x.plain("check") if isinstance(x, Known) else x
        found = []
        for run in (_run_plain, _run_described):
            module: Any = neurons.copy_net(self).float()  # type: ignore[arg-type]
            leaf = x.detach().float().clone().requires_grad_()
            y = run(module, leaf)
            if not isinstance(y, Tensor) or y.shape != x.shape or not y.requires_grad:
                raise TypeError(
                    f"{self._label()} must give a tensor of its input's shape that has a gradient, "
                    "to be compared with its description; leave it out of known="
                )
            leaves = {"the input": leaf, **dict(module.named_parameters())}
            factors = torch.linspace(-1, 1, y.numel()).to(y).view(y.shape)
            grads = torch.autograd.grad(y, [*leaves.values()], factors, allow_unused=True)
            values = {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
            found.append({"output": y.detach()} | values | dict(module.named_buffers()))
        plain, described = found
        if plain["output"].unique().numel() < 2:
            return False
        for name, value in plain.items():
            if (other := described[name]) is not None and value is not None:
                self._compare(name, value, other)
        self._unchecked.clear()
        return True

    def _compare(self, name: str, value: Tensor, described: Tensor) -> None:
        scale = float(value.abs().max())
        described, value = described.float(), value.float()
        differs = ~torch.isclose(described, value, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)
        # A voltage that rounds to the other side of the threshold changes a spike, and all after.
        if (share := float(differs.float().mean())) > 0.01:
            ours, theirs = (float(t[differs].flatten()[0]) for t in (described, value))
            raise ValueError(
                f"{self._label()} is not {self._description}: {share:.0%} of its {name} differ, as "
                f"{theirs:.4g} of the class, {ours:.4g} of the description; mend it, or leave the "
                "class out of known="
            )

    def _label(self) -> str:
        return f"{type(self).__name__} at {self._name!r}"


def _run_plain(module: Any, x: Tensor) -> Any:
    module.__class__ = module.kind
    return module(x)


def _run_described(module: Any, x: Tensor) -> Any:
    return module._run_described(x)


class OwnNeuron(Own):
    """A neuron of a net's own."""

    def _run_described(self, x: Any) -> Any:
        described = self._description
        axis, voltage = described.time_axis, described.voltage
        plans = Plans.of(self)
        node = plans.get("node") or plans.keep("node", DescribedNeuron(described, self._name))
        x_seq = x.transpose(0, axis) if axis else x
        v = 0.0 if voltage is None else getattr(self, voltage)
        v = 0.0 if v is None else v
        y, v, *_ = node._run(x_seq, v, False)
        if voltage is not None:
            setattr(self, voltage, v)
        y = y.transpose(0, axis) if axis else y
        return y if described.divisor == 1.0 else y / described.divisor


class DescribedNeuron(AcceleratedALIF, FusedNeuron):
    """Runs a description on the fused operator; no module, so that keys stay the net's."""

    store_v_seq = False
    _numbers = attrgetter("v_reset", "detach_reset")  # the rest never changes

    def __init__(self, described: Any, name: str) -> None:
        self._described, self._name = described, name
        self.v_reset, self.detach_reset = described.v_reset, described.detach_reset
        self.surrogate_function = described.surrogate_function

    @cached_property
    def _w(self) -> float:
        tau = self._described.tau
        return math.inf if tau is None else neurons.nearest_w(tau, torch.float32)

    def _constants(self, dtype: torch.dtype) -> tuple[float | None, bool, float | None]:
        return self._w, self._described.decay_input, self._described.threshold

    def _operands(self) -> tuple[None, None]:
        return None, None

    def extra_repr(self) -> str:
        return repr(self._described)


class OwnNorm(Own, AcceleratedNorm):
    """A norm of a net's own; what it does with its buffers and parameters is torch's."""

    def _run_described(self, x: Any) -> Any:
        return AcceleratedNorm.forward(self, x)

    def _check_input_dim(self, x: Tensor) -> None:
        """Take any shape, as the class does."""

    @property
    def _folds(self) -> bool:
        return self._description.channel_axis == 2

    @staticmethod
    def _tensors(module: Any) -> tuple[Any, ...]:
        weight, bias, mean, var = AcceleratedNorm._tensors(module)
        scale, scales_bias = module._description.scale, module._description.scales_bias
        if scale != 1.0:
            weight = torch.full_like(mean, scale) if weight is None else weight * scale
        if scales_bias and bias is not None:
            bias = bias * scale
        return weight, bias, mean, var


def find_described(net: nn.Module, known: Mapping[type, Any]) -> dict[str, tuple[Any, Any]]:
    """The modules of ``net`` whose class is described, and their descriptions, by path."""
    found = {}
    for path, module in net.named_modules():
        if (description := known.get(type(module))) is None:
            continue
        if not isinstance(description, Neuron | BatchNorm) and callable(description):
            description = description(module)
        if not isinstance(description, Neuron | BatchNorm):
            raise TypeError(f"known= takes descriptions of sj_taid.known, not {description!r:.80}")
        if isinstance(description, BatchNorm) and not isinstance(module, _BatchNorm):
            raise TypeError(
                "known.BatchNorm describes subclasses of torch's batch norms, but "
                f"{type(module).__name__} is none; batch norms within it are known as they are"
            )
        found[path] = module, description
    return found


def describe_module(module: Any, description: Any, path: str, check: bool) -> None:
    """Let a module run as its description says."""
    own: Any = OwnNorm if isinstance(description, BatchNorm) else OwnNeuron
    kind: Any = type(module)
    module.__class__ = accelerated_class(kind, own)
    module._description, module._name = description, path
    module._unchecked = ["outputs, gradients and buffers"] if check else []
