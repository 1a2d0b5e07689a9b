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
from typing import Any

from spikingjelly.activation_based import functional, neuron
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
        return {n: v.detach() if isinstance(v, Tensor) else v for n, v in values.items()}

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
