"""The two versions of SpikingJelly: the only file that knows them and their private names.

In 2.x a neuron implements ``single_step_functional_forward`` and ``multi_step_functional_forward``
over explicit states, and ``BaseNode`` does the rest. In 0.0.0.0.14 ``BaseNode`` calls
``single_step_forward`` and ``multi_step_forward`` instead; the ``BaseNode`` exported here bridges
the two, so that :class:`sj_taid.ALIFNode` is written once.
"""

import warnings
from importlib.metadata import version
from typing import Any

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from .ops.alif import reference

SPIKINGJELLY_VERSION: str = version("spikingjelly")
FUNCTIONAL_STATES: bool = hasattr(neuron.BaseNode, "single_step_functional_forward")


def warn_if_untested(spikingjelly_version: str) -> None:
    """Warn of a SpikingJelly version that this package is not tested on."""
    if spikingjelly_version == "0.0.0.0.14" or spikingjelly_version.startswith("2."):
        return
    warnings.warn(
        f"sj-taid is tested on SpikingJelly 0.0.0.0.14 and 2.x, but {spikingjelly_version} is "
        "installed; it may work. To be safe: pip install 'spikingjelly>=2' (Python 3.11 or "
        "later), or pip install 'spikingjelly==0.0.0.0.14'",
        stacklevel=2,
    )


warn_if_untested(SPIKINGJELLY_VERSION)


def forget_reset_cache(net: nn.Module) -> None:
    """Clear 2.x's cache of the modules that ``reset_net`` resets, after a swap."""
    if FUNCTIONAL_STATES:
        for module in net.modules():
            functional.invalidate_reset_cache(module)


def reset_value(node: neuron.BaseNode, memory: str) -> Any:
    """The value to which ``reset`` sets a memory."""
    return node._memories_rv[memory]


def detach_state(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a neuron for a copy or pickle, without the graphs of its voltages."""
    memories = {name: _detach(value) for name, value in state["_memories"].items()}
    return {name: _detach(value) for name, value in state.items()} | {"_memories": memories}


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def has_default_precision(node: neuron.BaseNode) -> bool:
    """Whether a neuron computes in its input's dtype; 2.x can give it a policy of its own."""
    return getattr(node, "_neuron_precision", None) is None


if FUNCTIONAL_STATES:
    BaseNode = neuron.BaseNode
else:

    class BaseNode(neuron.BaseNode):  # type: ignore[no-redef]
        """0.0.0.0.14's ``BaseNode`` over the functional forwards of 2.x.

        The hooks ``neuronal_charge``, ``neuronal_fire`` and ``neuronal_reset`` work on ``self.v``
        as in 0.0.0.0.14. A subclass that overrides one of them is run by them, step by step.
        """

        v: Any

        def single_step_forward(self, x: Tensor) -> Tensor:
            if self._overrides_a_hook():
                return super().single_step_forward(x).to(x.dtype)
            states = self.materialize_states((x,), (self.v,), "s")
            (spike,), (self.v,) = self.single_step_functional_forward((x,), states)
            return spike

        def forward(self, x: Tensor) -> Tensor:
            if self.step_mode == "m" and self._overrides_a_hook():
                return neuron.BaseNode.multi_step_forward(self, x)
            return super().forward(x)

        def neuronal_charge(self, x: Tensor) -> None:
            """Charge ``self.v`` with one step of input ``[N, *]``."""
            self.v_float_to_tensor(x)
            q = reference.per_channel(self.w.to(self.v.dtype).sigmoid(), x.unsqueeze(0))
            self.v = reference.charge(x, self.v, q, self.decay_input, self.v_reset)

        def neuronal_fire(self) -> Tensor:
            """The spikes of the charged ``self.v``."""
            return self.surrogate_function(self.v - self._threshold())

        def neuronal_reset(self, spike: Tensor) -> None:
            """Reset ``self.v`` where ``spike`` is one."""
            self.v = reference.reset(
                self.v, spike, self._threshold(), self.v_reset, self.detach_reset
            )

        def v_float_to_tensor(self, x: Tensor) -> None:
            """Start from a tensor in the dtype of the state, float32 for half-precision input."""
            if not isinstance(self.v, Tensor):
                self.v = torch.full_like(x.data, self.v, dtype=reference.state_dtype(x.dtype))

        def materialize_states(
            self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], step_mode: str
        ) -> tuple[Any, ...]:
            return states

        def _threshold(self) -> Tensor:
            threshold = self.effective_v_threshold.to(self.v.dtype)
            return reference.per_channel(threshold, self.v.unsqueeze(0))

        def _overrides_a_hook(self) -> bool:
            return any(
                getattr(type(self), hook) is not getattr(BaseNode, hook)
                for hook in ("neuronal_charge", "neuronal_fire", "neuronal_reset")
            )
