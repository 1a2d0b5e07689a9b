"""Which neurons a net has: the equation of each as it is read, its surrogate and its numbers."""

from __future__ import annotations

import csv
import inspect
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

from .._internal import compat
from .._internal.context import forked
from ..neuron import ALIFNode
from ..ops.step.equations import equations
from ..ops.step.program import NotRead, Reading
from ..ops.step.record import Neuron, Notes
from .neurons import Site, as_inputs, as_read, check_net, copy_net, find_neurons, need_neurons

#: SpikingJelly's neurons that are no ``BaseNode``, such as PSN
_OTHERS = [
    kind
    for kind in vars(neuron).values()
    if inspect.isclass(kind)
    and issubclass(kind, nn.Module)
    and kind.__module__.startswith(neuron.__name__)
]


class Learned(NamedTuple):
    """A parameter of a neuron: how many values it has, and their range."""

    name: str
    values: int
    least: float
    most: float

    def __str__(self) -> str:
        least, most = f"{self.least + 0.0:.6g}", f"{self.most + 0.0:.6g}"
        several = f"{self.values} values, {least} to {most}"
        return f"{self.name}: {least if self.values == 1 else several}"


@dataclass(frozen=True)
class DescribedNeuron:
    """One neuron of a net; "" is what it does not have.

    Attributes:
        layer: its path, or several joined by " = " where it is used in several places.
        kind: its class, and where that is defined.
        equation: a step as it is read, one equation after the other, where ``x`` is the input,
            ``s`` the output, and ``v'`` the state ``v`` after the step; or why it is not read.
        numbers: the values of the attributes in the equation, and of parameters that do not learn.
        surrogate: its surrogate function, with numbers.
        options: whether the reset is detached, and the step mode.
        outputs: the range of its outputs, if they are whole numbers.
        learned: a :class:`Learned` of each parameter that learns.
    """

    layer: str
    kind: str
    equation: str
    numbers: str
    surrogate: str
    options: str
    outputs: str
    learned: tuple[Learned, ...]

    def cells(self) -> dict[str, str]:
        """The texts, by the names of the attributes."""
        texts = {field.name: getattr(self, field.name) for field in fields(self)}
        return texts | {"learned": "; ".join(map(str, self.learned))}


@dataclass(frozen=True)
class Description:
    """What :func:`.describe` found; ``print`` it, and compare two by ``==``.

    Attributes:
        rows: a :class:`DescribedNeuron` for each neuron.
        versions: of torch, SpikingJelly and this package.
        steps: how many time steps the neurons ran in the example, if there was one.
    """

    rows: tuple[DescribedNeuron, ...]
    versions: dict[str, str]
    steps: tuple[int, ...] = ()

    def differences(self, other: Description) -> list[str]:
        """What differs, a line each: versions, steps, and the neurons at each path."""
        mine, theirs = (
            {(row.layer, name): text for row in each.rows for name, text in row.cells().items()}
            | {("versions", name): text for name, text in each.versions.items()}
            | {("the example", "T"): _steps(each.steps)}
            for each in (self, other)
        )
        pairs = {key: (mine.get(key, "-"), theirs.get(key, "-")) for key in mine | theirs}
        return [f"{a}: {b}: {x} | {y}" for (a, b), (x, y) in pairs.items() if x != y]

    def to_csv(self, path: str | Path) -> None:
        """Write a row for each group of equal neurons, with all their layers."""
        temporary = Path(f"{path}.tmp")
        groups = self._groups()
        with temporary.open("w", encoding="utf-8", newline="") as file:
            rows = csv.DictWriter(file, [field.name for field in fields(DescribedNeuron)])
            rows.writeheader()
            rows.writerows(row.cells() | {"layer": ", ".join(layers)} for row, layers in groups)
        temporary.replace(path)

    def _groups(self) -> list[tuple[DescribedNeuron, list[str]]]:
        """Neurons that differ in what they have learned alone, as one, and their paths."""
        groups: dict[Any, list[DescribedNeuron]] = {}
        for row in self.rows:
            names = tuple(learned.name for learned in row.learned)
            groups.setdefault((replace(row, layer="", learned=()), names), []).append(row)
        found = []
        for rows in groups.values():
            learned = [
                Learned(name, sum(values), min(least), max(most))
                for (name, *_), values, least, most in (
                    zip(*each, strict=True) for each in zip(*(r.learned for r in rows), strict=True)
                )
            ]
            row = replace(rows[0], learned=tuple(learned))
            found.append((row, [r.layer for r in rows]))
        return found

    def __str__(self) -> str:
        groups = self._groups()
        lines = [f"neurons: {len(self.rows)}, kinds: {len(groups)}"]
        for row, layers in groups:
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            cells = row.cells() | {"layer": layers[0] + more}
            lines.append("\n".join(f"{name:9}  {text}" for name, text in cells.items() if text))
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        lines.append(", ".join(filter(None, (_steps(self.steps), versions))))
        return "\n\n".join(lines)

    __repr__ = __str__


def describe(net: nn.Module, example: Any = None) -> Description:
    """Say which neurons ``net`` has, and what each computes: for a paper, or to compare two nets.

    Works on any net, on any device, in either step mode, accelerated or not; nothing is changed.
    The equation is read as :func:`.accelerate` reads it on a CPU; a name in it is the attribute or
    parameter that the number came from, where that is known.

    Args:
        net: any module with SpikingJelly neurons.
        example: an input of ``net`` (a tuple for several), which a copy runs to find the number of
            time steps.

    Raises:
        ValueError: ``net`` has no neuron.

    >>> net = nn.Sequential(nn.Linear(3, 3), ALIFNode(v_threshold=0.5))
    >>> row = describe(net).rows[0]
    >>> print(row.equation)
    h = v + (x - (v - v_reset)) * sigmoid(w); s = h >= v_threshold; v' = (1 - s) * h + s * v_reset
    >>> row.numbers, row.outputs
    ('v_reset = 0', '0 to 1')
    >>> other = nn.Sequential(net[0], ALIFNode())
    >>> describe(net).differences(describe(other))
    ['1: learned: w: 0; v_threshold: 0.5 | w: 0; v_threshold: 1']
    """
    check_net(net)
    sites = find_neurons(net, _OTHERS) or need_neurons(net, "describe")
    packages = "torch", "spikingjelly", "sj-taid"
    steps = () if example is None else _count_steps(net, as_inputs(example))
    rows = tuple(_describe(site) for site in sites)
    return Description(rows, {name: version(name) for name in packages}, steps)


def _steps(steps: Sequence[int]) -> str:
    return f"T = {', '.join(map(str, steps))}" if steps else ""


def _count_steps(net: nn.Module, inputs: Any) -> tuple[int, ...]:
    """How many time steps neurons run, found on a copy."""
    copied, found = copy_net(net), Counter[int]()

    def note(path: int, node: Any, args: Any) -> None:
        if getattr(node, "step_mode", "m") == "m":
            found[path] = max(found[path], args[0].shape[0])
        else:
            found[path] += 1

    with torch.no_grad(), forked((*net.parameters(), *net.buffers())), compat.quiet_triton():
        functional.reset_net(copied)
        for k, site in enumerate(find_neurons(copied)):
            site.node.register_forward_pre_hook(partial(note, k))
        copied(*inputs)
    return tuple(sorted({*found.values()}))


def _describe(site: Site) -> DescribedNeuron:
    node = site.node
    kind = getattr(node, "_taid_kind", type(node))
    function = getattr(node, "surrogate_function", None)
    options = [name for name in ("detach_reset", "step_mode") if hasattr(node, name)]
    equation, numbers, outputs = _equation_of(node, kind)
    parameters = [
        (p.requires_grad, Learned(name, p.numel(), *map(float, p.detach().aminmax())))
        for name, p in node.named_parameters()
        if p.numel()
    ]
    fixed = [str(p).replace(": ", " = ", 1) for learns, p in parameters if not learns]
    return DescribedNeuron(
        " = ".join(site.paths) or "net",
        f"{kind.__module__}.{kind.__qualname__}",
        equation,
        ", ".join(filter(None, (numbers, *fixed))),
        # that of a function has its address
        getattr(function, "__qualname__", "" if function is None else str(function)),
        ", ".join(f"{name} = {getattr(node, name)}" for name in options),
        outputs,
        tuple(p for learns, p in parameters if learns),
    )


def _equation_of(node: Any, kind: Any) -> tuple[str, str, str]:
    """The equation of a neuron, the numbers in it, and the range of its outputs."""
    is_ours = isinstance(node, ALIFNode)
    known = isinstance(node, compat.NEURONS)
    reason = None if known else "it is no BaseNode"
    if known and not is_ours:
        reason = compat.why_not_stepwise(kind)
    if reason:
        return f"not read: {reason}", "", ""
    read, shapes = as_read(node)
    for shape in shapes[:2]:
        try:
            reading = read.read(shape, notes := Notes())
            break
        except NotRead as error:
            reason = f"not read: its step {error}"
    else:
        return str(reason), "", ""
    found = _names_of_constants(node, read.run, shape, reading, notes)
    lines = equations(reading, read.states, [*read.tensors], found)
    named = [n for n in dict.fromkeys(found.values()) if any(_names(n, line) for line in lines)]
    numbers = ", ".join(f"{name} = {getattr(node, name):.6g}" for name in named)
    outputs = "" if reading.least is None else f"{reading.least} to {reading.most}"
    if is_ours and node.normalize:  # after its step
        lines.append(f"s = s / {node.levels}")
        outputs += f", divided by {node.levels}"
    return "; ".join(lines), numbers, outputs


def _names(name: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?![\w'])", text) is not None


def _names_of_constants(
    node: Any, run: Any, shape: tuple[int, ...], reading: Reading, notes: Notes
) -> dict[str, str]:
    """The attributes that constants are equal to, also when the attribute is another number."""
    found: dict[str, str] = {}
    for name in notes.numbers:
        value = vars(node).get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        other = object.__new__(type(node))
        vars(other).update(vars(node) | {name: 1.375 * value + 0.625})
        try:
            changed = Neuron(other, run).read(shape, Notes())
        except NotRead:
            continue
        if changed.program == reading.program:
            pairs = enumerate(zip(reading.constants, changed.constants, strict=True))
            found |= {
                f"c{k}": name
                for k, (old, new) in pairs
                if (old, new) == (value, vars(other)[name]) and old != new
            }
    return found
