"""The text of a program's rows: a step of neighbouring neurons, forward or backward, for numba."""

from __future__ import annotations

from collections.abc import Sequence

from .program import Program

#: an operation -> its expression in numba, of arguments that are float32, or bool for conditions;
#: choices are written so that NaN and signed zeros come out as torch's
EXPRESSIONS = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "scale": "{} * {}",
    "div": "{} / {}",
    "over": "{0} / {1}",  # a number, whose reciprocal is {2}
    "neg": "-{}",
    "abs": "abs({})",
    "ge": "{} >= {}",
    "gt": "{} > {}",
    "le": "{} <= {}",
    "lt": "{} < {}",
    "eq": "{} == {}",
    "ne": "{} != {}",
    "and": "{} & {}",
    "or": "{} | {}",
    "not": "not {}",
    "float": "f32({})",
    "where": "{1} if {0} else {2}",
    "at_least": "{1} if {0} < {1} else {0}",
    "at_most": "{1} if {0} > {1} else {0}",
    "relu": "ZERO if {0} < ZERO else {0}",
    "minimum": "{0} if ({0} < {1}) | ({0} != {0}) else {1}",
    "maximum": "{0} if ({0} > {1}) | ({0} != {0}) else {1}",
    "sign": "f32({0} > ZERO) - f32({0} < ZERO)",
    "sqrt": "sqrt({})",
    "rsqrt": "ONE / sqrt({})",
    "reciprocal": "ONE / {}",
    "pow": "{} ** {}",
    "round": "rint({})",
    "floor": "floor({})",
    "ceil": "ceil({})",
    "trunc": "trunc({})",
    "exp": "exp({})",
    "expm1": "expm1({})",
    "log": "log({})",
    "log1p": "log1p({})",
    "sin": "sin({})",
    "cos": "cos({})",
    "erf": "erf({})",
    "atan": "atan({})",
    "sigmoid": "sigmoid({})",
    "tanh": "tanh({})",
    "sigmoid_backward": "{0} * ((ONE - {1}) * {1})",
    "tanh_backward": "{0} * (ONE - {1} * {1})",
    "threshold_backward": "ZERO if {1} <= {2} else {0}",
}


class Layout:
    """Which row of scratch memory holds what, for so many states, operands and totals.

    Rows that a loop is given come last: it checks that they lie outside of all of the above.
    """

    def __init__(self, states: int, operands: int, totals: int) -> None:
        self.states, self.operands, self.totals = states, operands, totals
        self.mean, self.gain, self.bias, self.a, self.b = range(operands, operands + 5)
        self.grad_states = operands + 5
        self.sums = self.grad_states + states  #: the totals, then two of a norm
        self.spike = self.sums + totals + 2
        self.bits, self.grad_y, self.spare, self.first_state = range(self.spike + 1, self.spike + 5)

    @property
    def key(self) -> tuple[int, int, int]:
        return self.states, self.operands, self.totals

    def fields(self) -> dict[str, int]:
        """As the members of the kernels' arguments."""
        names = "mean", "sums", "spike", "bits", "grad_y", "spare"
        rows = {f"{name}_row": getattr(self, name) for name in names}
        rows |= {"grad_row": self.grad_states, "state_row": self.first_state}
        return {"states": self.states, "operands": self.operands, "totals": self.totals, **rows}

    def rows(self, steps: int) -> int:
        return self.first_state + max(steps, 2) * self.states


def forward_row(program: Program, layout: Layout, norm: bool) -> str:
    """The body of a row forward, which writes ``out`` and the next states to ``after``."""
    lines = _lines(program, program.needed(program.outputs))
    stores = [f"out[i] = {_value(program.outputs[0])}"]
    for k, name in enumerate(program.outputs[1:]):
        stores.append(f"after[i + {k} * PITCH] = {_value(name)}")
    roots = program.outputs
    return _row(program, layout, norm, roots, [*lines, *stores], is_backward=False)


def backward_row(program: Program, layout: Layout, norm: bool, totals: Sequence[int]) -> str:
    """The body of a row backward, which adds to the sums of ``totals`` and writes ``out``.

    ``out`` gets the gradient of the input, the rows of states' gradients that before the step.
    """
    roots = [*program.grads, *(program.totals[k] for k in totals)]
    lines = _lines(program, program.needed(roots))
    stores = [f"grad_x = {_value(program.grads[0])}", "out[i] = grad_x"]
    for k in totals:
        stores.append(f"scratch[i + {layout.sums + k} * PITCH] += {_value(program.totals[k])}")
    if norm:
        y, y_x = layout.sums + layout.totals, layout.sums + layout.totals + 1
        stores.append(f"scratch[i + {y} * PITCH] += grad_x")
        stores.append(f"scratch[i + {y_x} * PITCH] += grad_x * (given[i] - mean)")
    for k, name in enumerate(program.grads[1:]):
        stores.append(f"scratch[i + {layout.grad_states + k} * PITCH] = {_value(name)}")
    return _row(program, layout, norm, roots, [*lines, *stores], is_backward=True)


def _lines(program: Program, needed: Sequence[int]) -> list[str]:
    found = []
    for k in needed:
        op, args = program.lines[k]
        found.append(f"t{k} = {EXPRESSIONS[op].format(*map(_value, args))}")
    return found


def _value(name: str) -> str:
    return {"0": "ZERO", "1": "ONE", "TRUE": "True", "FALSE": "False"}.get(name, name)


def _row(
    program: Program,
    layout: Layout,
    norm: bool,
    roots: Sequence[str],
    body: list[str],
    is_backward: bool,
) -> str:
    used = {a for k in program.needed(roots) for a in program.lines[k][1]} | set(roots)
    constants = sorted((n for n in used if n[0] == "c"), key=lambda n: int(n[1:]))
    loads = []
    if norm:
        loads += [
            f"{n} = scratch[i + {getattr(layout, n)} * PITCH]" for n in ("mean", "gain", "bias")
        ]
        loads.append("x = (given[i] - mean) * gain + bias")
    elif "x" in used:
        loads.append("x = given[i]")
    loads += [f"s{k} = states[i + {k} * PITCH]" for k in range(program.states) if f"s{k}" in used]
    loads += [f"p{k} = scratch[i + {k} * PITCH]" for k in range(layout.operands) if f"p{k}" in used]
    if is_backward:
        loads += ["g = upstream[i]"] if "g" in used else []
        rows = ((k, layout.grad_states + k) for k in range(program.states) if f"g{k}" in used)
        loads += [f"g{k} = scratch[i + {row} * PITCH]" for k, row in rows]
    head = [f"{name} = constants[{name[1:]}]" for name in constants]
    inner = "\n".join(f"        {line}" for line in (*loads, *body))
    arguments = (
        "scratch, given, states, upstream, out, constants, n"
        if is_backward
        else ("scratch, given, states, out, after, constants, n")
    )
    return "\n".join(
        [
            f"def row({arguments}):",
            *(f"    {line}" for line in head),
            "    for i in range(n):",
            inner,
            "",
        ]
    )
