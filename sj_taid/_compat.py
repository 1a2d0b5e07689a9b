"""The only module that knows SpikingJelly's versions.

Two lines are on PyPI. In 2.x a neuron implements ``single_step_functional_forward`` and
``multi_step_functional_forward`` over explicit states, and ``BaseNode`` does the rest. In
0.0.0.0.14 ``BaseNode`` calls ``single_step_forward`` and ``multi_step_forward`` instead; the
``BaseNode`` exported here bridges the two, so that :class:`sj_taid.ALIFNode` is written once.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from spikingjelly.activation_based import neuron
from torch import Tensor

SPIKINGJELLY_VERSION: str = version("spikingjelly")
FUNCTIONAL_STATES: bool = hasattr(neuron.BaseNode, "single_step_functional_forward")

if FUNCTIONAL_STATES:
    BaseNode = neuron.BaseNode
else:

    class BaseNode(neuron.BaseNode):  # type: ignore[no-redef]
        """0.0.0.0.14's ``BaseNode`` driven by the functional forwards of 2.x."""

        def single_step_forward(self, x: Tensor) -> Tensor:
            states = self.materialize_states((x,), (self.v,), "s")
            (spike,), (self.v,) = self.single_step_functional_forward((x,), states)
            return spike

        def materialize_states(
            self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], step_mode: str
        ) -> tuple[Any, ...]:
            return states
