"""Which module reads the output of which, found by tracing the forwards of a net."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import layer, neuron
from torch import fx, nn

#: why a module has no reader if its output is that of the module that calls it
_LEAVES = "its output leaves the module that calls it"


class Traced(NamedTuple):
    """The readers of a net's sources, as far as its forwards can be traced."""

    #: the only reader of each source
    readers: dict[nn.Module, nn.Module]
    #: for each source without one, the reason
    obstacles: dict[nn.Module, str]
    #: for each neuron that was seen, the module that makes its input, or why none does
    inputs: dict[nn.Module, nn.Module | str]
    #: the modules whose forward cannot be traced
    untraced: list[nn.Module]


def trace(net: nn.Module, is_source: Callable[[nn.Module], bool]) -> Traced:
    """Find the readers of the modules for which ``is_source`` holds.

    The ``forward`` of each module that holds some is traced by ``torch.fx``, in training and in
    eval mode, with its children taken as wholes.
    """
    tracing = _Tracing(is_source)
    for parent in net.modules():
        # A container that folds time is found where it is called.
        folds = type(parent) is layer.SeqToANNContainer
        if not folds and not is_source(parent) and any(map(is_source, parent.modules())):
            tracing.look_into(parent)
    tracing.calls |= Counter(m for _, m in net.named_modules(remove_duplicate=False))
    return tracing.resolve()


class _Tracing:
    """The forwards traced so far."""

    def __init__(self, is_source: Callable[[nn.Module], bool]) -> None:
        self.is_source = is_source
        self.readers: dict[nn.Module, list[nn.Module | str]] = defaultdict(list)
        self.inputs: dict[nn.Module, nn.Module | str] = {}
        self.calls: Counter[nn.Module] = Counter()
        self.untraced: list[nn.Module] = []

    def look_into(self, parent: nn.Module) -> None:
        """Note who reads what in the forward of ``parent``."""
        try:
            graphs = [_graph(parent, training) for training in (True, False)]
        except Exception as error:  # whatever a forward does that symbols cannot follow
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            note = f"the forward of {type(parent).__name__} cannot be traced ({why})"
            self.untraced.append(parent)
            for child in parent.children():
                self._note(child, note)
                self.inputs.setdefault(child, note)
            return
        calls: Counter[nn.Module] = Counter()
        for graph in graphs:
            nodes = (node for node in graph.nodes if node.op == "call_module")
            called = {node: parent.get_submodule(node.target) for node in nodes}
            calls |= Counter(called.values())
            for node, module in called.items():
                self._note(module, _only_reader(node, called))
                if isinstance(module, neuron.BaseNode):
                    self.inputs[module] = _input(node, called)
        self.calls += calls

    def _note(self, module: nn.Module, reader: nn.Module | str) -> None:
        for source in filter(self.is_source, same_output(module)):
            self.readers[source].append(reader)

    def resolve(self) -> Traced:
        """Sort the sources into those with one reader and those without."""
        readers: dict[nn.Module, nn.Module] = {}
        obstacles: dict[nn.Module, str] = {}
        for source, found in self.readers.items():
            reader = self._reader(source, found)
            if isinstance(reader, str):
                obstacles[source] = reader
            else:
                readers[source] = reader
        return Traced(readers, obstacles, self.inputs, self.untraced)

    def _reader(self, source: nn.Module, found: list[nn.Module | str]) -> nn.Module | str:
        """The only reader of ``source``, or why there is none."""
        modules = list(dict.fromkeys(entry for entry in found if isinstance(entry, nn.Module)))
        # What a container's last source gives leaves it, to be read where that is called.
        for entry in found:
            if isinstance(entry, str) and not (modules and entry == _LEAVES):
                return entry
        for module in (source, *modules):
            if self.calls[module] > 1:
                return f"{type(module).__name__} is called in {self.calls[module]} places"
        return modules[0] if len(modules) == 1 else f"{len(modules)} modules read its output"


class _Tracer(fx.Tracer):
    """Follows one forward; the modules that it calls are taken as wholes."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True


def _graph(parent: nn.Module, training: bool) -> fx.Graph:
    """The calls in the forward of ``parent`` in that mode; the module is left as it was."""
    before = dict(vars(parent))
    containers = [
        (held, copy.copy(held))
        for held in _held(before, set())
        if isinstance(held, list | set | dict)
    ]
    parent.training = training
    try:
        with torch.random.fork_rng(devices=[]):  # a forward may draw
            graph = _Tracer().trace(parent)
        stored = [name for name, value in vars(parent).items() if _holds_proxy(value)]
    finally:
        vars(parent).clear()
        vars(parent).update(before)
        for container, content in containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
    if stored:
        raise TypeError(f"it keeps what it computes as {', '.join(stored)}")
    return graph


def _held(value: Any, seen: set[int]) -> Iterator[Any]:
    """A value and, if it is a container, all that it holds; ``seen`` has the ids of those."""
    yield value
    if isinstance(value, list | tuple | set | dict) and id(value) not in seen:
        seen.add(id(value))
        for child in value.values() if isinstance(value, dict) else value:
            yield from _held(child, seen)


def _holds_proxy(value: Any) -> bool:
    return any(isinstance(held, fx.Proxy) for held in _held(value, set()))


def _only_reader(node: fx.Node, called: Mapping[fx.Node, nn.Module]) -> nn.Module | str:
    """The module that alone reads the result of ``node``, or what else reads it."""
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


def same_output(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` and, for a sequential container, its last module, whose output is the same."""
    yield module
    sequential = type(module).forward is nn.Sequential.forward
    if sequential or type(module) is layer.SeqToANNContainer:
        for last in list(module.children())[-1:]:
            yield from same_output(last)


def has_hooks(module: nn.Module, *kinds: str) -> bool:
    """Whether hooks of the module, or of these ``kinds``, see its input or output."""
    kinds = kinds or (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    )
    return any(getattr(module, kind) for kind in kinds)
