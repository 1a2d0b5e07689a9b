"""What the library knows of neurons: where they are in a net, and when two of them are equal."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._internal import compat
from ..fused_neuron import Accelerated
from ..neuron import ALIFNode
from ..ops.bits import LARGEST_COUNT
from ..ops.step.record import Neuron
from ..ops.surrogate import is_integer, levels_of
from .report import Row, State


class Site(NamedTuple):
    """A neuron, every path to it, and the device and dtype of the parameters before it."""

    node: Any
    paths: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype

    @property
    def path(self) -> str:
        return self.paths[0]

    def row(self, done: str, note: str, state: State = "left alone") -> Row:
        """The neuron's row in a report."""
        return Row(" = ".join(self.paths) or "net", type(self.node).__name__, done, note, state)


def need_neurons(net: nn.Module, change: str, kinds: Collection[type] = ()) -> list[Site]:
    """The sites of :func:`find_neurons`, or an error if there are none, or none of a kind.

    The error names what was to be done to them: ``change``, as in "swap".
    """
    check_net(net)
    sites = find_neurons(net, kinds)
    there = {type(site.node) for site in sites}
    if absent := [getattr(kind, "__name__", kind) for kind in kinds if kind not in there]:
        raise ValueError(
            f"replace= has {absent}, but {type(net).__name__} has no module of exactly this class"
        )
    if not sites:
        raise ValueError(
            f"{type(net).__name__} has no neuron of SpikingJelly's BaseNode or SimpleBaseNode to "
            f"{change}. Neurons of classes of its own first get successors: sj_taid.swap_neurons("
            "net, replace={Class: function}), see docs/swap.md"
        )
    return sites


def describe_single_steps(sites: Iterable[Site]) -> str:
    """What to do about neurons that all run step by step, or ""."""
    modes = {site.node.step_mode for site in sites if isinstance(site.node, compat.NEURONS)}
    if modes != {"s"}:
        return ""
    return (
        "all neurons are in step mode 's', one step a call, which no operator makes faster: if the "
        "net's forward takes a whole sequence [T, N, *], call functional.set_step_mode(net, 'm')"
    )


def check_net(net: Any) -> None:
    """Raise an error unless it is a module."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, but it is {net!r:.80}")


def as_inputs(example: Any) -> tuple[Any, ...]:
    """The inputs of a net: one, or a tuple of several."""
    if not isinstance(example, Tensor | tuple):
        raise TypeError(
            "the example must be a tensor, or a tuple for several inputs, but it is a "
            f"{type(example).__name__}"
        )
    return example if isinstance(example, tuple) else (example,)


def find_neurons(net: nn.Module, kinds: Collection[type] = ()) -> list[Site]:
    """Every neuron of ``net`` and module of exactly one of ``kinds``, once."""
    return find_sites(net, lambda m: isinstance(m, compat.NEURONS) or type(m) in kinds)


def find_sites(net: nn.Module, is_one: Callable[[nn.Module], bool]) -> list[Site]:
    """Every module of ``net`` that is one, once."""
    paths = defaultdict(list)
    for path, module in net.named_modules(remove_duplicate=False):
        paths[module].append(path)
    sites = []
    near = next(filter(Tensor.is_floating_point, net.parameters()), torch.empty(0))
    for module, names in paths.items():
        if not isinstance(module, ALIFNode):  # whose own are float32, whatever it reads
            near = next(filter(Tensor.is_floating_point, module.parameters(recurse=False)), near)
        if is_one(module):
            sites.append(Site(module, tuple(names), near.device, near.dtype))
    return sites


def as_read(node: Any) -> tuple[Neuron, list[tuple[int, ...]]]:
    """A neuron as its step is read, and shapes ``[N, *]`` of inputs that its parameters may fit."""
    kind: Any = type(node)
    run = getattr(node, "_taid_step", None) or compat.step_of(kind)
    neuron = Neuron(node, run)
    sizes = [t.numel() for t in neuron.tensors.values() if t.numel() > 1]
    channels = sizes[0] if sizes else 3
    return neuron, [(2, channels, *more) for more in ((5, 7), (), (5,), (5, 7, 9))]


def copy_net(net: nn.Module) -> nn.Module:
    """A deep copy; tensors with a graph, which torch refuses to copy, are copied without it."""
    with _CopyComputed():
        return copy.deepcopy(net)


class _CopyComputed(TorchFunctionMode):
    """Lets ``deepcopy`` copy tensors with a graph, wherever a net keeps them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def why_not_alif(node: Any) -> str | None:
    """Why no ALIF has the outputs of a neuron, or ``None``."""
    if isinstance(node, Accelerated):
        return "accelerated: sj_taid.unaccelerate(net) first, which gives the neuron back"
    if reason := compat.why_not_plain(node):
        return reason
    if is_integer(node.surrogate_function) and not isinstance(node, compat.INTEGER_LIF):
        return "its surrogate counts by H - V_th; ALIF counts by H / V_th"
    if (levels := levels_of(node.surrogate_function)) > LARGEST_COUNT:
        return f"it counts to {levels}; ALIF counts to {LARGEST_COUNT}, which four bits hold"
    if isinstance(node.v_threshold, Tensor):
        return "its threshold is a tensor; ALIF starts from a number"
    if isinstance(w := getattr(node, "w", None), Tensor) and w.dim():
        return f"its w has the shape {[*w.shape]}; ALIF takes over a scalar"
    if compat.has_precision_policy(node):
        return "it has a precision policy of its own"
    return why_not_tau(getattr(node, "tau", 2.0))


def why_not_firing(node: Any) -> str | None:
    """Why a neuron never fires, such as one that is read out by its voltage, or ``None``."""
    threshold = torch.as_tensor(node.v_threshold, device="cpu")  # not the default device
    return "its threshold is infinite: it never fires" if threshold.eq(math.inf).all() else None


def why_not_tau(tau: float) -> str | None:
    """Why no ``w`` gives a LIF's tau, or ``None``."""
    return None if tau > 1.0 else f"its tau is {tau}, and sigmoid(w) = 1/tau needs more than 1"


@lru_cache
def nearest_w(tau: float, dtype: torch.dtype) -> float:
    """The ``w`` of ``dtype`` whose sigmoid is nearest to ``1/tau``.

    ``-log(tau - 1)`` rounded to ``dtype`` can be a few units in the last place off; a neighbour
    is often exact.
    """
    w = torch.tensor(-math.log(tau - 1.0), dtype=dtype, device="cpu")  # not the default device
    candidates = [w]
    for direction in (-math.inf, math.inf):
        neighbour = w
        for _ in range(16):
            neighbour = torch.nextafter(neighbour, torch.full_like(w, direction))
            candidates.append(neighbour)
    return min(candidates, key=lambda c: abs(c.sigmoid().item() - 1.0 / tau)).item()


def describe_equality(site: Site) -> str:
    """How equal the outputs of an ALIF are to a neuron's."""
    node, equal = site.node, True
    if site.dtype.itemsize < 4:
        return f"equal outputs to rounding; voltages and computation are float32, not {site.dtype}"
    if isinstance(node, neuron.ParametricLIFNode):
        equal = compat.FUNCTIONAL_STATES or node.decay_input
    elif isinstance(node, neuron.LIFNode):
        w = torch.tensor(nearest_w(node.tau, site.dtype), dtype=site.dtype, device="cpu")
        equal = math.frexp(node.tau)[0] == 0.5 and w.sigmoid().item() * node.tau == 1.0
        if isinstance(node, compat.INTEGER_LIF):  # multiplies by 1 - 1/tau
            equal = bool(1.0 - w.sigmoid() == torch.tensor(1.0 - 1.0 / node.tau, dtype=w.dtype))
    return f"equal outputs{'' if equal else ' to rounding'}"
