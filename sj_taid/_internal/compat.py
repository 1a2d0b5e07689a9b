"""The two versions of SpikingJelly: which is installed, and one base class for both.

In 2.x a neuron implements ``single_step_functional_forward`` and ``multi_step_functional_forward``
over explicit states, and ``BaseNode`` does the rest. In 0.0.0.0.14 ``BaseNode`` calls
``single_step_forward`` and ``multi_step_forward`` instead; the ``BaseNode`` exported here bridges
the two, so that :class:`sj_taid.ALIFNode` is written once.
"""

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from spikingjelly.activation_based import base, functional, neuron
from torch import Tensor, nn

#: the bases of neurons with a voltage, a threshold and a reset; 0.0.0.0.14 has the first alone
NEURONS = (neuron.BaseNode, getattr(neuron, "SimpleBaseNode", neuron.BaseNode))
#: integer LIF, a subclass of LIF, which 0.0.0.0.14 lacks
INTEGER_LIF: tuple[Any, ...] = (neuron.ILIFNode,) if hasattr(neuron, "ILIFNode") else ()
#: the neurons whose dynamics are ALIF's; a subclass may do something else: why_not_plain
PLAIN_NEURONS = (*INTEGER_LIF, neuron.LIFNode, neuron.ParametricLIFNode, neuron.IFNode)
#: what 0.0.0.0.14 calls at each step, and 2.x does not call in a LIF, PLIF or IF
HOOKS = frozenset({"neuronal_charge", "neuronal_fire", "neuronal_reset"})
#: the parameters, modules and memories that a LIF, PLIF, IF or ALIF has
_PARTS = ("w", "v_threshold", "surrogate_function", "v", "v_seq")
FUNCTIONAL_STATES: bool = hasattr(neuron.BaseNode, "single_step_functional_forward")


def kind_of(node: nn.Module) -> Any:
    """The class of ``PLAIN_NEURONS`` that a neuron is of, or derived from, or ``None``."""
    return next((kind for kind in PLAIN_NEURONS if isinstance(node, kind)), None)


def why_not_plain(node: nn.Module) -> str | None:
    """Why a neuron may compute something other than a LIF, PLIF or IF, or ``None``.

    A subclass may override the constructor, what it prints and the backends that it names.
    """
    kind = kind_of(node)
    if kind is None:
        its = type(node)
        return (
            f"not a LIF, PLIF or IF of SpikingJelly's, but {its.__module__}.{its.__qualname__}; "
            f"swap_neurons(net, replace={{{its.__name__}: ...}}) gives it a successor"
        )
    own = {name for c in type(node).__mro__ if c not in kind.__mro__ for name in vars(c)}
    names = {name for name in own if name[:2] != "__" or name == "__call__"}
    known = {*dir(kind), *inspect.signature(kind).parameters, *HOOKS}
    if names & known - {"extra_repr", "supported_backends"}:
        return f"a subclass of {kind.__name__} that overrides methods: it may behave differently"
    return None


def added_names(node: Any, *kinds: type) -> list[str]:
    """What a neuron has, apart from plain attributes, that ``kinds`` have not.

    Public methods and properties, of a subclass or of the neuron alone, and parameters, buffers,
    modules and memories.
    """
    own, theirs = type(node), {name for kind in kinds for name in dir(kind)}
    names = [name for name in dir(own) if name[0] != "_" and name not in theirs]
    methods = [n for n in names if callable(v := getattr(own, n)) or isinstance(v, property)]
    functions = [name for name, value in vars(node).items() if name[0] != "_" and callable(value)]
    parts = (*functions, *node._parameters, *node._buffers, *node._modules, *states_of(node))
    return methods + [name for name in parts if name not in _PARTS]


def _owner(kind: type, name: str) -> Any:
    """The class that a class has a method from."""
    return next((c for c in kind.__mro__ if name in vars(c)), None)


#: the methods that run a sequence step by step, and need no look at
_SEQUENCES = (base.MemoryModule, neuron.BaseNode, neuron.BaseNode.__mro__[1])


def why_not_stepwise(kind: Any) -> str | None:
    """Why the sequences of a class may not be its steps, one after the other, or ``None``."""
    if (
        _owner(kind, "forward") is not base.MemoryModule
        or _owner(kind, "__call__") is not nn.Module
    ):
        return "it overrides forward"
    sequence = _owner(kind, "multi_step_forward")
    home = getattr(vars(sequence)["multi_step_forward"], "__globals__", {}).get("__name__", "")
    if home.partition(".")[0] not in ("spikingjelly", "sj_taid"):  # of a class of theirs, too
        return "it overrides the forward of a sequence"
    if not FUNCTIONAL_STATES:
        return None if sequence in _SEQUENCES else _why_not_stepwise_in_old(kind, sequence)
    if sequence is neuron.SimpleBaseNode:
        return None
    states = _owner(kind, "multi_step_functional_forward")
    step = _owner(kind, "single_step_functional_forward")
    if step in (None, base.MemoryModule, neuron.BaseNode):
        return "it has no step: no single_step_functional_forward"
    known = step if step.__module__.startswith("spikingjelly.") else None
    if sequence in (*_SEQUENCES, known) and states in (base.MemoryModule, known):
        return None
    return "it overrides the forward of a sequence"


def _why_not_stepwise_in_old(kind: type, sequence: Any) -> str | None:
    """The same for 0.0.0.0.14, whose classes run a sequence by functions of their own in eval."""
    if not sequence.__module__.startswith("spikingjelly."):
        return "it overrides the forward of a sequence"
    below = kind.__mro__[: kind.__mro__.index(sequence)]
    own = {name for c in below for name in vars(c) if name[:2] != "__"}
    if own & {*dir(sequence)} - {"extra_repr", "supported_backends"}:
        name = sequence.__name__
        return f"a subclass of {name} that overrides methods: it may behave differently"
    return None


@cache
def step_of(kind: Any) -> Any:
    """How a class runs a step on a copy: ``run(copy, x, states)`` gives the output and states.

    A class of SpikingJelly's with a function of its own for sequences, which may round otherwise
    than its step, runs a sequence of one.
    """
    sequence = _owner(kind, "multi_step_forward")
    if not FUNCTIONAL_STATES:
        return _stateful_step if sequence in _SEQUENCES else _stateful_sequence
    if sequence is neuron.SimpleBaseNode:
        return _stateful_step
    states = _owner(kind, "multi_step_functional_forward")
    return _functional_step if states is base.MemoryModule else _functional_sequence


def _functional_sequence(node: Any, x: Tensor, states: dict[str, Any]) -> Any:
    given = (x.unsqueeze(0),), tuple(states.values())
    (output,), after = node.multi_step_functional_forward(*given)
    return output[0], dict(zip(states, after, strict=True))


def _stateful_sequence(node: Any, x: Tensor, states: dict[str, Any]) -> Any:
    output = node.multi_step_forward(x.unsqueeze(0))
    return output[0], vars(node)["_memories"]


def _functional_step(node: Any, x: Tensor, states: dict[str, Any]) -> Any:
    outputs, after = node.single_step_functional_forward((x,), tuple(states.values()))
    (output,) = outputs
    return output, dict(zip(states, after, strict=True))


def _stateful_step(node: Any, x: Tensor, states: dict[str, Any]) -> Any:
    output = node.single_step_forward(x)
    return output, vars(node)["_memories"]


#: in evaluation these classes give the same values by functions that give no gradients
_stateful_sequence.as_in_training = True  # type: ignore[attr-defined]


@cache
def starts_at_numbers(kind: Any) -> bool:
    """Whether a class's states that are numbers start as tensors of that number."""
    owner = _owner(kind, "materialize_states")
    return owner is None or owner.__module__.startswith("spikingjelly.")


def forget_reset_cache() -> None:
    """Clear 2.x's cache of the modules that ``reset_net`` resets, after a swap.

    All of it, as the net may be a part of others.
    """
    cache = getattr(getattr(functional, "net_config", None), "_RESET_MODULE_CACHE", None)
    if cache is not None:
        cache.clear()
    elif FUNCTIONAL_STATES:
        warnings.warn(
            "this SpikingJelly keeps no cache of the modules to reset where sj-taid clears it: if "
            "functional.reset_net(net) ran before the swap, check that it resets the new neurons",
            stacklevel=3,
        )


@contextmanager
def quiet_triton() -> Iterator[None]:
    """Keep torch from saying that there is no Triton, where a neuron of 2.x first runs for us."""
    logger = logging.getLogger("torch._library.triton")

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Triton not available")

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def reset_value(node: Any, name: str) -> Any:
    """The value that ``reset`` gives the state ``name`` of a neuron."""
    return node.get_reset_value(name) if FUNCTIONAL_STATES else node._memories_rv[name]


def states_of(node: Any) -> dict[str, Any]:
    """The states of a neuron by name; what is written into it is the neuron's."""
    return node._memories


def has_precision_policy(node: Any) -> bool:
    """Whether SpikingJelly 2.x's ``precision`` has set the dtypes that a neuron computes in."""
    return getattr(node, "_neuron_precision", None) is not None


def detach_state(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a neuron for a copy or pickle, without the graphs of its voltages."""

    def detach(values: dict[str, Any]) -> dict[str, Any]:
        return {
            n: v.detach() if isinstance(v, Tensor) and not v.is_leaf else v
            for n, v in values.items()
        }

    return detach(state) | {"_memories": detach(state["_memories"])}


if FUNCTIONAL_STATES:
    BaseNode = neuron.BaseNode
else:

    class BaseNode(neuron.BaseNode):  # type: ignore[no-redef]
        """0.0.0.0.14's ``BaseNode`` over the functional forwards of 2.x."""

        v: Any

        def __init_subclass__(cls) -> None:
            overridden = HOOKS & vars(cls).keys()
            if overridden:
                raise TypeError(
                    f"{cls.__name__} overrides {', '.join(sorted(overridden))}, which ALIF does "
                    "not call: override single_step_functional_forward and "
                    "multi_step_functional_forward, as on SpikingJelly 2.x"
                )

        def single_step_forward(self, x: Tensor) -> Tensor:
            states = self.materialize_states((x,), (self.v,), "s")
            (spike,), (self.v,) = self.single_step_functional_forward((x,), states)
            return spike

        def materialize_states(
            self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], step_mode: str
        ) -> tuple[Any, ...]:
            return states
