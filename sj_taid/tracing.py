"""Which module reads the output of which, found by tracing the forwards of a net."""

from __future__ import annotations

import copy
import operator
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from ._forward import Forward

#: A forward with more branches, or more ways through them, is not followed.
_MOST_BRANCHES = 32


class Traced(NamedTuple):
    """The readers of a net's sources, as far as its forwards can be traced."""

    #: the only reader of each source, which reads nothing else
    readers: dict[nn.Module, nn.Module]
    #: for each source without one, the reason
    obstacles: dict[nn.Module, str]
    #: the sources that see time folded into the batch, and whose readers do not
    folded: set[nn.Module]
    #: for each sum of a source and another module's output: the source, that module and the reader
    sums: list[tuple[nn.Module, nn.Module, nn.Module]]


def trace(net: nn.Module, is_source: Callable[[nn.Module], bool]) -> Traced:
    """Find the readers of the modules for which ``is_source`` holds.

    The ``forward`` of each module that holds some, or neurons, is traced by ``torch.fx`` with its
    children taken as wholes: in training and in eval mode, and on each way through the branches
    that depend on the input.
    """

    def is_end(module: nn.Module) -> bool:
        return is_source(module) or isinstance(module, neuron.BaseNode)

    tracing = _Tracing()
    with _same_tensors(net):
        for parent in net.modules():
            has_forward = type(parent).forward is not nn.Module.forward  # a ModuleList has none
            if has_forward and not is_end(parent) and any(map(is_end, parent.modules())):
                tracing.look_into(parent)
    tracing.calls |= Counter(m for _, m in net.named_modules(remove_duplicate=False))
    return tracing.resolve(filter(is_source, net.modules()))


class _Port(NamedTuple):
    """The input or output of a module."""

    module: nn.Module
    is_output: bool


_Links = dict[_Port | str, dict[_Port | str, None]]


class _Tracing:
    """The forwards traced so far."""

    def __init__(self) -> None:
        #: what reads the tensor at a port, and what makes it: ports, or notes on what else does
        self.reads: _Links = defaultdict(dict)
        self.makes: _Links = defaultdict(dict)
        #: of a tensor that is added to one other: what makes that, and what reads the sum
        self.sums: dict[_Port | str, list[tuple[_Port, _Port]]] = defaultdict(list)
        self.unfolded: set[_Port | str] = set()
        self.calls: Counter[nn.Module] = Counter()
        self.traced: set[nn.Module] = set()

    def look_into(self, parent: nn.Module) -> None:
        """Note who reads what in the forward of ``parent``."""
        try:
            graphs = [graph for training in (True, False) for graph in _graphs(parent, training)]
        except Exception as error:  # whatever a forward does that symbols cannot follow
            why = shorten(f"{type(error).__name__}: {error}", 80)
            note = f"the forward of {type(parent).__name__} cannot be traced ({why})"
            for child in parent.children():
                self.link(_Port(child, True), note)
                self.link(note, _Port(child, False))
            return
        self.traced.add(parent)
        calls: Counter[nn.Module] = Counter()
        for graph in graphs:
            calls |= Counter(self._note(parent, graph))
        self.calls += calls

    def link(self, maker: _Port | str, reader: _Port | str) -> None:
        self.reads[maker][reader] = self.makes[reader][maker] = None

    def _note(self, parent: nn.Module, graph: fx.Graph) -> Iterable[nn.Module]:
        """Note who reads what in ``graph``, and return the modules that it calls."""
        calls = [node for node in graph.nodes if node.op == "call_module"]
        called = {node: parent.get_submodule(node.target) for node in calls}
        makers = {next(iter(graph.nodes)): _Port(parent, False)}
        makers |= {node: _Port(module, True) for node, module in called.items()}
        readers = {next(reversed(graph.nodes)): _Port(parent, True)}
        readers |= {node: _Port(module, False) for node, module in called.items()}
        for node in graph.nodes:
            for read in () if _unfolds(node) or _reads_shape(node) else node.all_input_nodes:
                made = read
                while _unfolds(made):
                    made = made.all_input_nodes[0]
                function = f"a function, {_name(made)}, makes its input"
                maker = makers.get(made, function)
                reader: _Port | str = f"a function, {_name(node)}, reads its output"
                if node in readers and node.args == (read,) and not node.kwargs:
                    reader = readers[node]
                elif node in readers:  # with others
                    self.link(function, readers[node])
                self.link(maker, reader)
                self.unfolded |= {maker} if made is not read else set()
                if node.target is operator.add and made is read and len(node.users) == 1:
                    others = makers.keys() & {*node.all_input_nodes} - {read}
                    totals = readers.keys() & node.users
                    self.sums[maker] += [(makers[o], readers[t]) for o in others for t in totals]
        return called.values()

    def resolve(self, sources: Iterable[nn.Module]) -> Traced:
        """Sort the sources into those with one reader and those without."""
        result = Traced({}, {}, set(), [])
        for module in sources:
            passed: list[_Port] = []
            reader = self._find_reader(_Port(module, True), passed)
            is_folded = bool(self.unfolded.intersection(passed))
            if isinstance(reader, str):
                result.obstacles[module] = reader
                # Only if the sum is the norm's single reader.
                several = any(len(self.reads[port]) > 1 for port in passed)
                for port in () if is_folded or several else passed:
                    result.sums.extend(self._find_sums(module, port))
            elif self._find_maker(_Port(reader, False)) is not module:
                result.obstacles[module] = f"a {type(reader).__name__} reads its output, or another"
            else:
                result.readers[module] = reader
                if is_folded:
                    result.folded.add(module)
        return result

    def _find_sums(
        self, source: nn.Module, port: _Port
    ) -> Iterator[tuple[nn.Module, nn.Module, nn.Module]]:
        """The sums with the tensor at ``port``, where one module each makes and reads the rest."""
        for other, total in self.sums[port]:
            maker = self._find_maker(other) if other.module in self.traced else other.module
            reader = self._find_reader(total) if total.module in self.traced else total.module
            if isinstance(maker, nn.Module) and isinstance(reader, nn.Module):
                yield source, maker, reader

    def _find_reader(self, port: _Port, passed: list[_Port] | None = None) -> nn.Module | str:
        """The only reader of the tensor at ``port``, or why there is none."""
        return self._follow(port, self.reads, "reads its output", [] if passed is None else passed)

    def _find_maker(self, port: _Port) -> nn.Module | str:
        """The only module that makes the tensor at ``port``, or why there is none."""
        return self._follow(port, self.makes, "makes its input", [])

    def _follow(
        self, port: _Port, links: _Links, what: str, passed: list[_Port]
    ) -> nn.Module | str:
        """The only end of the ``links`` from ``port``; ``passed`` receives the ports on the way."""

        def find_ends(port: _Port) -> Iterator[nn.Module | str]:
            passed.append(port)
            if len(passed) > 1 and has_hooks(port.module):
                yield f"{type(port.module).__name__}, which it passes, has hooks"
            for near in links.get(port, [f"nothing that can be traced {what}"]):
                if isinstance(near, _Port) and near.module in self.traced:
                    yield from find_ends(near)
                else:
                    yield near if isinstance(near, str) else near.module

        ends = dict.fromkeys(find_ends(port))
        notes = [end for end in ends if isinstance(end, str)]
        modules = [end for end in ends if isinstance(end, nn.Module)]
        for module in (*(near.module for near in passed), *modules):
            if self.calls[module] > 1:
                notes.append(f"{type(module).__name__} is called in {self.calls[module]} places")
        if len(modules) > 1:
            notes.append(f"more than one module {what}")
        return notes[0] if notes else modules[0]


def _unfolds(node: fx.Node) -> bool:
    """Whether the node restores time, ``[T * N, *]`` to ``[T, N, *]``."""
    if (node.op, node.target) != ("call_method", "unflatten"):
        return False
    given: Any = {**dict(zip(("dim", "sizes"), node.args[1:], strict=False)), **node.kwargs}
    sizes = given["sizes"]
    if given["dim"] != 0:
        return False
    if isinstance(sizes, fx.Node):  # a slice of a shape
        return sizes.target is operator.getitem and sizes.args[1] in (slice(2), slice(0, 2))
    return len(sizes) == 2


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _reads_shape(node: fx.Node) -> bool:
    attribute = node.args[1] if node.target is getattr else node.target
    return attribute in ("shape", "size", "ndim", "dim", "dtype", "device")


class _Tracer(fx.Tracer):
    """Follows one way through a forward; the modules that it calls are taken as wholes.

    ``answers`` are those of its branches; it appends ``False`` for each further one.
    """

    def __init__(self, answers: list[bool]) -> None:
        super().__init__()
        self.answers = answers
        self.asked = 0

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True

    def to_bool(self, obj: fx.Proxy) -> bool:
        if self.asked == _MOST_BRANCHES:
            raise TypeError(f"it has more than {_MOST_BRANCHES} branches that depend on its input")
        self.answers += [False] * (self.asked == len(self.answers))
        self.asked += 1
        return self.answers[self.asked - 1]


def _graphs(parent: nn.Module, training: bool) -> list[fx.Graph]:
    """The calls in the forward of ``parent`` in that mode, on each way through its branches.

    Ways on which the forward refuses its input are left out, unless all are.
    """
    graphs: list[fx.Graph] = []
    answers: list[bool] = []
    for _ in range(_MOST_BRANCHES):
        try:
            graphs.append(_graph(parent, training, answers))
        except (AssertionError, ValueError) as error:
            is_last = all(answers)
            if isinstance(error, fx.proxy.TraceError) or (is_last and not graphs):
                raise
        while answers and answers[-1]:
            answers.pop()
        if not answers:
            return graphs
        answers[-1] = True  # the next way: what was last answered False
    raise TypeError(f"there are more than {_MOST_BRANCHES} ways through it")


def _graph(parent: nn.Module, training: bool, answers: list[bool]) -> fx.Graph:
    """The calls on one way through the forward of ``parent``."""
    if not isinstance(vars(parent).get("forward"), Forward | None):
        raise TypeError("its forward was replaced")
    with _same_attributes(parent):
        parent.training = training
        seq_to_ann_forward, functional.seq_to_ann_forward = functional.seq_to_ann_forward, _fold
        try:
            with torch.random.fork_rng(devices=[]):  # a forward may draw
                graph = _Tracer(answers).trace(parent)
        finally:
            functional.seq_to_ann_forward = seq_to_ann_forward
        stored = [name for name, value in vars(parent).items() if _holds_proxy(value)]
        for name, child in parent.named_modules():
            if child is not parent and any(isinstance(v, fx.Proxy) for v in _attributes(child)):
                stored.append(f"an attribute of {name}")
    if stored:
        raise TypeError(f"it keeps what it computes as {', '.join(stored)}")
    return graph


@contextmanager
def _same_attributes(parent: nn.Module) -> Iterator[None]:
    """Restore the attributes of ``parent``, with all containers in them, and of its children."""
    held = [*_held(vars(parent), set())]
    for module in parent.modules():
        held += [vars(module), *filter(_is_dict, vars(module).values())]
    before = [(each, copy.copy(each)) for each in held if isinstance(each, list | set | dict)]
    try:
        yield
    finally:
        for container, content in before:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


@contextmanager
def _same_tensors(net: nn.Module) -> Iterator[None]:
    """Restore the values of all tensors that modules of ``net`` hold, but for parameters."""
    tensors = {
        id(held): held
        for module in net.modules()
        for held in _attributes(module)
        if isinstance(held, Tensor) and not (isinstance(held, nn.Parameter) or is_lazy(held))
    }
    before = [
        (tensor, tensor._version, tensor.detach().clone())
        for tensor in tensors.values()
        if not tensor.is_inference()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, version, value in before:
                if tensor._version != version:
                    tensor.copy_(value)


def _attributes(module: nn.Module) -> Iterator[Any]:
    """The attributes of a module, and what torch and SpikingJelly keep in dictionaries."""
    for value in vars(module).values():
        yield from value.values() if _is_dict(value) else (value,)


def _is_dict(value: Any) -> bool:
    return type(value) in (dict, OrderedDict)


def _fold(x_seq: Tensor, modules: Any) -> Tensor:
    """``seq_to_ann_forward``; symbols cannot follow SpikingJelly's on every version."""
    x = x_seq.flatten(0, 1)
    for module in modules if isinstance(modules, list | tuple | nn.Sequential) else [modules]:
        x = module(x)
    return x.unflatten(0, x_seq.shape[:2])


def _held(value: Any, seen: set[int]) -> Iterator[Any]:
    """A value and, if it is a container, all that it holds; ``seen`` has the ids of those."""
    yield value
    if isinstance(value, list | tuple | set | dict) and id(value) not in seen:
        seen.add(id(value))
        for child in value.values() if isinstance(value, dict) else value:
            yield from _held(child, seen)


def _holds_proxy(value: Any) -> bool:
    return any(isinstance(held, fx.Proxy) for held in _held(value, set()))


def has_hooks(module: nn.Module, *kinds: str) -> bool:
    """Whether hooks of the module, or of these ``kinds``, see its input or output."""
    kinds = kinds or (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    )
    return any(getattr(module, kind) for kind in kinds)
