"""Batch norms joined with the neurons that read them: one operator, as ``fuse_norm`` finds them."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import layer, neuron
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._checks import check_net
from ._table import table
from .neuron import ALIFNode, PassOn

__all__ = ["Join", "JoinReport", "fuse_norm", "split_norm"]

#: What a norm's forward must be for its meaning to be known: torch's batch norm over time and
#: batch, whatever the class is called.
KNOWN = frozenset(
    getattr(home, name)
    for home in (nn, layer)
    for name in (
        *(f"BatchNorm{n}d" for n in (1, 2, 3)),
        *(f"ThresholdDependentBatchNorm{n}d" for n in (1, 2, 3)),
        "SyncBatchNorm",
    )
    if hasattr(home, name)
)


@dataclass(frozen=True)
class Join:
    """What :func:`.fuse_norm` did with one batch norm.

    Attributes:
        norm: its path in the net.
        neuron: the path of the neuron that applies it now, or ``""``.
        note: why it was left alone, or ``""``.
    """

    norm: str
    neuron: str
    note: str


@dataclass(frozen=True)
class JoinReport:
    """What :func:`.fuse_norm` did, one :class:`Join` a batch norm; ``print`` it for a table."""

    rows: tuple[Join, ...]

    @property
    def joined(self) -> tuple[Join, ...]:
        """The norms that a neuron applies now."""
        return tuple(row for row in self.rows if row.neuron)

    @property
    def kept(self) -> tuple[Join, ...]:
        """The norms that were left alone, with the reason in ``note``."""
        return tuple(row for row in self.rows if not row.neuron)

    def __str__(self) -> str:
        head = f"{len(self.joined)} norms joined, {len(self.kept)} kept"
        rows = [(row.norm, row.neuron or "-", row.note) for row in self.rows]
        return f"{head}\n{table(('norm', 'neuron', 'note'), rows)}" if rows else head


def fuse_norm(net: nn.Module) -> JoinReport:
    r"""Let every :class:`~sj_taid.ALIFNode` apply the batch norm before it, in place.

    .. math::
        Y[t] = \gamma\,\frac{X[t] - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta, \qquad
        S = \mathrm{ALIF}(Y)

    as one operator that never writes :math:`Y` and keeps nothing of it for backward. The outputs
    and gradients are equal to rounding. The norm stays where it is, with its parameters and running
    statistics under the same keys of ``state_dict``, but only passes its input on to the neuron.

    A norm is joined where an ALIF in step mode ``"m"`` is its only reader. That is found by tracing
    the ``forward`` of each module that holds some (``torch.fx``, in training and in eval mode, its
    children taken as wholes; what a ``forward`` that cannot be traced reads is not seen), so
    in ``nn.Sequential`` and in blocks that call ``self.bn1`` and then ``self.sn1`` alike; the norm
    may be the last module of a ``SeqToANNContainer``. Known are torch's norms, SpikingJelly's and
    tdBN.

    What else than the mode a ``forward`` branches on has to stay as it is: a neuron whose norm was
    not called before it raises an error, and a norm that is called without its neuron passes its
    input on.

    Convert to ``SyncBatchNorm`` first and join then; :func:`.split_norm` is the way back.

    Returns:
        The report: ``print`` it.

    >>> net = nn.Sequential(layer.Conv2d(1, 4, 3), layer.BatchNorm2d(4), ALIFNode())
    >>> for module in net:
    ...     module.step_mode = "m"
    >>> print(fuse_norm(net))
    1 norms joined, 0 kept
    norm  neuron  note
    1     2
    """
    check_net(net, "fuse_norm")
    paths = {module: path for path, module in net.named_modules()}
    traced = trace(net, is_norm)
    containers = [m for m in paths if isinstance(m, layer.SeqToANNContainer)]
    folded = {norm for container in containers for norm in container.modules()}
    rows = []
    for norm in filter(is_norm, paths):
        reader: Any = traced.readers.get(norm)
        note = _why_not(norm, reader, norm in folded)
        if note is None:
            reader.apply_norm(norm)
            rows.append(Join(paths[norm], paths[reader], ""))
        else:
            rows.append(
                Join(paths[norm], "", note or traced.obstacles.get(norm, "nothing calls it"))
            )
    return JoinReport(tuple(rows))


def split_norm(net: nn.Module) -> None:
    """Undo :func:`.fuse_norm`: every norm is applied by itself again, in place.

    >>> net = nn.Sequential(layer.BatchNorm2d(4, step_mode="m"), ALIFNode(step_mode="m"))
    >>> len(fuse_norm(net).joined), split_norm(net), net[1].norm
    (1, None, None)
    """
    check_net(net, "split_norm")
    for module in net.modules():
        if isinstance(module, ALIFNode):
            module.apply_norm(None)
        elif isinstance(vars(module).get("forward"), PassOn):  # its neuron is gone
            del module.forward


def _why_not(norm: Any, reader: Any, folded: bool) -> str | None:
    """Why ``norm`` cannot be joined with ``reader``, the only module that reads its output.

    ``""`` where there is none. ``folded``: in a container that folds time into the batch.
    """
    if isinstance(vars(norm).get("forward"), PassOn):
        return "joined already"
    if type(norm) not in KNOWN:
        return f"what a {type(norm).__name__} computes is not known to be torch's batch norm"
    if has_hooks(norm):
        return "it has hooks, which would see its input instead of its output"
    if reader is None:
        return ""
    if type(reader) is not ALIFNode:
        return f"its reader is a {type(reader).__name__}, not an ALIFNode"
    if has_hooks(reader, "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        return "its reader has a hook on its input, which would act before the norm"
    if reader.norm is not None:
        return "its reader applies another norm already"
    if reader.step_mode != "m" or not (folded or getattr(norm, "step_mode", "s") == "m"):
        return "it does not run on [T, N, C, *]; functional.set_step_mode(net, 'm') first"
    return None


def has_hooks(
    module: nn.Module,
    *kinds: str,
) -> bool:
    """Whether hooks see what goes in or comes out."""
    kinds = kinds or (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    )
    return any(getattr(module, kind) for kind in kinds)


class _Tracer(fx.Tracer):
    """Follows one forward; the modules that it calls are taken as wholes."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True


class Traced(NamedTuple):
    """Who reads whom, as far as the forwards of a net can be traced."""

    #: the only reader of each source
    readers: dict[nn.Module, nn.Module]
    #: for sources without one what stands in the way
    obstacles: dict[nn.Module, str]
    #: the module that makes the input of each neuron that was seen, or what else does
    inputs: dict[nn.Module, nn.Module | str]
    #: the modules whose forward cannot be traced
    untraced: list[nn.Module]


def trace(net: nn.Module, is_source: Callable[[nn.Module], bool]) -> Traced:
    """Find the readers of the modules that ``is_source`` names."""
    found: dict[nn.Module, list[nn.Module | str]] = defaultdict(list)
    calls: Counter[nn.Module] = Counter()
    inputs: dict[nn.Module, nn.Module | str] = {}
    untraced = []
    for parent in net.modules():
        # A container that folds time is found where it is called.
        folds = type(parent) is layer.SeqToANNContainer
        if folds or is_source(parent) or not any(map(is_source, parent.modules())):
            continue
        try:
            graphs = [_graph(parent, training) for training in (True, False)]
        except Exception as error:  # whatever a forward does that symbols cannot follow
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            note = f"the forward of {type(parent).__name__} cannot be traced ({why})"
            for source in filter(is_source, chain.from_iterable(map(ends, parent.children()))):
                found[source].append(note)
            untraced.append(parent)
            inputs |= {child: note for child in parent.children() if child not in inputs}
            continue
        counts: Counter[nn.Module] = Counter()
        for graph in graphs:
            nodes = (node for node in graph.nodes if node.op == "call_module")
            called = {node: parent.get_submodule(node.target) for node in nodes}
            counts |= Counter(called.values())
            for node, module in called.items():
                for source in filter(is_source, ends(module)):
                    found[source].append(_only_reader(node, called))
                if isinstance(module, neuron.BaseNode):
                    inputs[module] = _input(node, called)
        calls += counts
    calls |= Counter(module for _, module in net.named_modules(remove_duplicate=False))
    readers: dict[nn.Module, nn.Module] = {}
    obstacles: dict[nn.Module, str] = {}
    for source, entries in found.items():
        # What a container's last source gives leaves it, to be read where that is called.
        inside = any(isinstance(entry, nn.Module) for entry in entries)
        distinct = list(dict.fromkeys(e for e in entries if not (inside and e == _LEAVES)))
        notes = [entry for entry in distinct if isinstance(entry, str)]
        notes += [
            f"{type(m).__name__} is called in {calls[m]} places"
            for m in (source, *distinct)
            if isinstance(m, nn.Module) and calls[m] > 1
        ]
        if notes:
            obstacles[source] = notes[0]
        elif len(distinct) == 1 and isinstance(distinct[0], nn.Module):
            readers[source] = distinct[0]
        else:
            obstacles[source] = f"{len(distinct)} modules read its output"
    return Traced(readers, obstacles, inputs, untraced)


def _graph(parent: nn.Module, training: bool) -> fx.Graph:
    """What the forward of ``parent`` calls in that mode; the module is left as it was."""
    before = dict(vars(parent))
    filled = [held for held in _held(before, set()) if isinstance(held, list | set | dict)]
    containers = [(held, copy.copy(held)) for held in filled]
    parent.training = training
    try:
        with torch.random.fork_rng(devices=[]):  # a forward may draw
            graph = _Tracer().trace(parent)
        kept = [name for name, value in vars(parent).items() if _holds_proxy(value)]
    finally:
        vars(parent).clear()
        vars(parent).update(before)
        for container, content in containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
    if kept:
        raise TypeError(f"it keeps what it computes as {', '.join(kept)}")
    return graph


def _held(value: Any, walked: set[int]) -> Iterator[Any]:
    """A value, and where it is a container all that it holds; ``walked`` has the ids of those."""
    yield value
    if isinstance(value, list | tuple | set | dict) and id(value) not in walked:
        walked.add(id(value))
        for child in value.values() if isinstance(value, dict) else value:
            yield from _held(child, walked)


def _holds_proxy(value: Any) -> bool:
    return any(isinstance(held, fx.Proxy) for held in _held(value, set()))


#: the note where the output is that of the module that calls the norm
_LEAVES = "its output leaves the module that calls it"


def _only_reader(node: fx.Node, called: Mapping[fx.Node, nn.Module]) -> nn.Module | str:
    """The module that alone reads what ``node`` gives, or what else reads it."""
    users = list(node.users)
    if len(users) != 1:
        return f"{len(users)} places read its output"
    (user,) = users
    if user.op == "output":
        return _LEAVES
    if user not in called or user.all_input_nodes != [node]:
        return f"a function, {user.name}, reads its output"
    first = called[user]
    while type(first).forward is nn.Sequential.forward and any(first.children()):
        first = next(first.children())
    return first


def _input(node: fx.Node, called: Mapping[fx.Node, nn.Module]) -> nn.Module | str:
    """The module that makes what ``node`` reads, or what else does."""
    (made, *_) = node.all_input_nodes
    if made.op == "placeholder":
        return "its input comes from outside the module that calls it"
    return called.get(made, f"a function, {made.name}, makes its input")


def ends(module: nn.Module) -> Iterator[nn.Module]:
    """``module``, and for a sequential container its last module, whose output is the same."""
    yield module
    sequential = type(module).forward is nn.Sequential.forward
    if sequential or type(module) is layer.SeqToANNContainer:
        for last in list(module.children())[-1:]:
            yield from ends(last)


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm)
