"""Neurons that are modules of a net's own, whose forward loops over time by itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .._internal import compat, graph
from ..fused_neuron import FusedNeuron
from ..ops.step.code import instructions_of
from ..ops.step.program import Reading
from ..ops.step.readings import read_neuron
from ..ops.step.sequence import Layout, Loop
from .modules import Exchanged, accelerated_class, why_not_own
from .neurons import Site, find_sites

#: packages whose classes are no net's own
_KNOWN = {"torch", "torchvision", "spikingjelly", "sj_taid", "builtins", *sys.stdlib_module_names}
#: reasons that may be another's where time lies elsewhere
_VAGUE = (
    "several steps",
    "could not be traced",
    "gives no sequence",
    "has no state",
    "gives at step",
)
#: the most steps that a module's number may mean
_MOST_STEPS = 32


def find_loops(net: nn.Module) -> list[Site]:
    """Every module of ``net`` that may be a neuron with a loop over time, once."""
    return find_sites(net, lambda m: may_loop(m) and not isinstance(m, compat.NEURONS))


def may_loop(module: nn.Module) -> bool:
    """Whether a module is of a class of the net's own with a loop, and all it has is its own."""
    kind: Any = getattr(module, "_taid_kind", type(module))
    if kind.__module__.partition(".")[0] in _KNOWN - {"__main__"} or not _has_loop(kind):
        return False
    within = [m for m in module.modules() if m is not module]
    return not any(
        next(m.parameters(False), None) is not None
        or next(m.buffers(False), None) is not None
        or isinstance(m, compat.NEURONS)
        for m in within
    )


@cache
def _has_loop(kind: Any) -> bool:
    """Whether a function of a class, or of a base of its that is no library's, has a loop."""
    own = [c for c in kind.__mro__ if c.__module__.partition(".")[0] not in _KNOWN - {"__main__"}]
    codes = [f.__code__ for c in own for f in vars(c).values() if isinstance(f, FunctionType)]
    is_own = any(name in vars(c) for c in own for name in ("forward", "multi_step_forward"))
    return is_own and any(i.opname == "FOR_ITER" for c in codes for i in instructions_of(c))


def read_loop(site: Site, engine: Any) -> tuple[Layout, dict[int, Reading]] | str:
    """How a module's sequence lies, and its step for inputs of several numbers of axes."""
    node: Any = site.node
    if is_parametrized(node):
        return "it is parametrized"
    if reason := why_not_own(node):
        return reason
    sizes = [t.numel() for t in Loop(node, Layout(0)).tensors.values() if t.numel() > 1]
    channels = sizes[0] if sizes else 3
    shapes = [(2, channels, *more) for more in ((5, 7), (), (5,), (5, 7, 9))]
    reasons = []
    for layout in _layouts(node):
        for shape in shapes[:2]:
            found = read_neuron(node, shape, layout, engine, site.device)
            if isinstance(found, Reading):
                read = {len(s): read_neuron(node, s, layout, engine, site.device) for s in shapes}
                return layout, {n: one for n, one in read.items() if isinstance(one, Reading)}
            reasons.append(found)
            if not any(words in found for words in _VAGUE):
                return found
    return reasons[0]


def _layouts(node: Any) -> Iterator[Layout]:
    """Where time may be: first, second or last, or folded into the first axis."""
    yield from (Layout(0), Layout(1), Layout(-1))
    forward: Any = getattr(type(node), "forward", None)
    code, space = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    named = [space.get(name) for name in getattr(code, "co_names", ())]
    numbers = [n for n in (*vars(node).values(), *named) if type(n) is int]
    for steps in dict.fromkeys(n for n in numbers if 2 < n <= _MOST_STEPS):
        yield from (Layout(0, steps, True), Layout(0, steps), Layout(1, steps), Layout(-1, steps))


def accelerate_loop(module: Any, layout: Layout, reading: Reading) -> Any:
    """Give a module with a loop its accelerated class."""
    module._taid_layout, module._taid_keeps = layout, reading.keeps
    module._taid_states = dict.fromkeys((f"s{k}" for k in range(reading.states)), 0.0)
    kind: Any = type(module)
    module.__class__ = accelerated_class(kind, AcceleratedLoop)
    return module


class AcceleratedLoop(Exchanged, FusedNeuron):
    """A module with a loop over time on the fused operator."""

    _taid_layout: Layout
    _taid_states: dict[str, float]
    _taid_keeps: tuple[tuple[str, int], ...]  #: :attr:`.Reading.keeps`

    @property
    def _taid_step(self) -> Any:
        return self._taid_layout

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and graph.is_eager():
            x, layout = args[0], self._taid_layout
            with graph.plain_functions():
                fits = x.is_floating_point() and layout.fits(x) and self._taid_is_new()
            if fits and not torch.is_autocast_enabled(x.device.type):
                results = self._taid_run(layout.enter(x), self._taid_states, False)
                if results is not None:
                    for name, k in self._taid_keeps:
                        compat.states_of(self)[name] = results[1 + k]
                    y = layout.leave(results[0])
                    return y if y.is_contiguous() else y.contiguous()
        return self._taid_kind.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    def _taid_is_new(self) -> bool:
        """Whether it begins as after a reset, and keeps the last states alone."""
        node: Any = self
        memories = vars(self).get("_memories", {})
        for name, value in memories.items():
            if isinstance(value, Tensor) or value != compat.reset_value(node, name):
                return False
        return not memories or (node.step_mode == "m" and not getattr(node, "store_v_seq", False))

    def _taid_label(self) -> str:
        return f"the neuron {self._taid_name!r}"

    def _taid_strides(self, shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
        return strides  # of an input that is contiguous, with time where the module has it

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        return compat.detach_state(state) if "_memories" in state else state
