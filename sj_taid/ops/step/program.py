"""What a step is read as: lines of a neuron's values, and formulas of parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: the most states, operands, totals and constants that a kernel's arguments hold
MOST_STATES, MOST_OPERANDS, MOST_TOTALS, MOST_CONSTANTS = 4, 8, 8, 64


class NotRead(Exception):
    """Why a step is not read, in words that follow "its step"."""


class Program(NamedTuple):
    """The structure of a step: equal ones share compiled rows.

    Names are ``x``, ``s0`` (states), ``p0`` (operands), ``c0`` (constants), ``g`` and ``g0``
    (gradients of the output and the next states), ``t0`` (lines).
    """

    lines: tuple[tuple[str, tuple[str, ...]], ...]  #: line ``i`` makes ``ti``: operation, arguments
    outputs: tuple[str, ...]  #: the output and the next states
    grads: tuple[str, ...]  #: the gradients of the input and the states
    totals: tuple[str, ...]  #: what is summed over neurons
    #: to which of input, states and parameters gradients go from the output and each next state
    reach: tuple[tuple[bool, ...], ...]

    @property
    def states(self) -> int:
        return len(self.outputs) - 1

    def used(self, given: tuple[bool, ...], every: bool, steps: int) -> tuple[Any, tuple[Any, ...]]:
        """Where gradients are, in torch: at each step, and of input, states and parameters.

        ``given``: of the outputs and which last states there are some; ``every``: of each voltage.
        From the last step back, it is said of the output and the next states, until it stays so.
        """
        nowhere = (False,) * len(self.reach[0])
        now, found, reached = given, nowhere, nowhere
        each: list[tuple[bool, ...]] = []
        while len(each) < steps:
            now = *now[:1], *(used or (every and k == 0) for k, used in enumerate(now[1:]))
            if now in each[-1:]:
                break
            each.append(now)
            ways = [way for way, used in zip(self.reach, now, strict=True) if used]
            reached = tuple(map(any, zip(nowhere, *ways, strict=True)))
            found = tuple(map(or_, found, reached))
            now = *now[:1], *reached[1 : len(now)]
        first, rest = each[:MOST_STATES], each[MOST_STATES:]
        if rest:  # in turns, which a kernel has no lines for
            first.append(tuple(any(used) for used in zip(*rest, strict=True)))
        return first, (*found[:1], *reached[1 : len(now)], *found[len(now) :])

    def only(self, used: Sequence[bool]) -> Program:
        """The program where but these of output and next states have a gradient: not 0, none."""
        names = ["g", *(f"g{k}" for k in range(self.states))]
        gone = {name for name, is_used in zip(names, used, strict=True) if not is_used}
        gradients, same, lines = {*names}, dict.fromkeys(gone, "0"), []
        for k, (op, args) in enumerate(self.lines):
            name, found = f"t{k}", [a for a in args if a in gradients]
            left = tuple(same.get(a, a) for a in args)
            if found:
                gradients.add(name)
            if found and gone.issuperset(found):
                gone.add(name)
                same[name] = "0"
            elif op in ("add", "sub") and args[1] in gone:
                same[name] = left[0]
            elif op in ("add", "sub") and args[0] in gone:
                op, left = ("neg", left[1:]) if op == "sub" else ("add", (left[1], "0"))
            lines.append((op, left))
        grads = tuple(same.get(name, name) for name in self.grads)
        totals = tuple(same.get(name, name) for name in self.totals)
        return self._replace(lines=tuple(lines), grads=grads, totals=totals)

    def needed(self, roots: Sequence[str]) -> list[int]:
        """The lines that the ``roots`` are computed from, in order."""
        found: set[int] = set()
        stack = [root for root in roots if root[0] == "t"]
        while stack:
            line = int(stack.pop()[1:])
            if line not in found:
                found.add(line)
                stack += [arg for arg in self.lines[line][1] if arg[0] == "t"]
        return sorted(found)

    def most_live(self, roots: Sequence[str]) -> int:
        """The most values that are needed at a time where the ``roots`` are computed, in order."""
        live, most = {*roots}, 0
        for line in reversed(self.needed(roots)):
            live = live - {f"t{line}"} | {arg for arg in self.lines[line][1] if arg[0] in "xsgt"}
            most = max(most, len(live))
        return most


class Formulas(NamedTuple):
    """What torch computes of parameters: operands before the rows, gradients after them."""

    lines: tuple[tuple[str, str, tuple[str, ...]], ...]  #: name, text, the names that it uses
    parameters: tuple[str, ...]
    operands: tuple[str, ...]
    totals: tuple[str, ...]
    grads: tuple[str | None, ...]  #: of parameters; ``None`` for one that has none
    total_shapes: tuple[tuple[int, ...], ...]

    def before(self, device: Any) -> Callable[..., list[Tensor]]:
        """A function of the parameters that gives the operands."""
        return self._compile(self.parameters, self.operands, device)

    def after(self, needs: Sequence[bool], device: Any) -> Callable[..., list[Any]]:
        """A function of parameters, operands and totals that gives the gradients needed."""
        own = [f"_{k}" if name in self.parameters else name for k, name in enumerate(self.operands)]
        return self._compile((*self.parameters, *own, *self.totals), self._needed(needs), device)

    def totals_of(self, needs: Sequence[bool]) -> tuple[int, ...]:
        """Which totals these gradients need."""
        uses = self._uses(self._needed(needs), self.operands)
        return tuple(k for k, name in enumerate(self.totals) if name in uses)

    def _needed(self, needs: Sequence[bool]) -> list[str | None]:
        return [grad if need else None for grad, need in zip(self.grads, needs, strict=True)]

    def _uses(self, roots: Sequence[str | None], given: Collection[str]) -> set[str]:
        """The names that these names need, themselves included, back to what is ``given``."""
        found: set[str] = set()
        uses = {name: uses for name, _, uses in self.lines if name not in given}
        stack = [root for root in roots if root is not None]
        while stack:
            if (name := stack.pop()) not in found:
                found.add(name)
                stack += uses.get(name, ())
        return found

    def _compile(self, given: Sequence[str], results: Sequence[str | None], device: Any) -> Any:
        needed = self._uses(results, given) - {*given}
        lines = [f"    {name} = {text}" for name, text, _ in self.lines if name in needed]
        end = f"    return [{', '.join(map(str, results))}]"
        space: dict[str, Any] = {"aten": torch.ops.aten, "torch": torch}
        space["full"] = partial(torch.full, device=device)
        exec("\n".join([f"def function({', '.join(given)}):", *lines, end]), space)
        return space["function"]


class Reading(NamedTuple):
    """A step that has been read: all that a kernel needs of a neuron."""

    program: Program
    constants: tuple[float, ...]
    formulas: Formulas
    parameters: int
    operand_channels: tuple[bool, ...]  #: whether each operand is one per channel, not one number
    total_channels: tuple[bool, ...]
    #: the least and the most that the output can be, if it is a whole number or, where these are
    #: more than 1 apart, NaN; else ``None``
    least: int | None
    most: int | None
    exact: bool  #: whether its outputs are torch's to the bit
    #: the states before the first step, of a module that keeps none from call to call
    starts: tuple[float, ...] = ()
    keeps: tuple[tuple[str, int], ...] = ()  #: what it keeps for others to see, and of which state

    @property
    def states(self) -> int:
        return self.program.states

    @property
    def operands(self) -> int:
        return len(self.operand_channels)

    @property
    def per_channel(self) -> bool:
        """Whether a value of parameters, or a sum for them, is one per channel."""
        return any((*self.operand_channels, *self.total_channels))

    @property
    def levels(self) -> int:
        """How many values above the least the output can have; 0 if that is not known."""
        return 0 if self.most is None or self.least is None else self.most - self.least
