"""The text of a program in CUDA C: a step of one neuron, forward or backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache

from .program import Program
from .text import EXPRESSIONS

#: those that differ from numba's, of arguments that are float, or bool for conditions
_EXPRESSIONS = EXPRESSIONS | {
    "abs": "fabsf({})",
    "over": "{0} * {2}",  # as torch's CUDA, which divides by no number
    "and": "{} && {}",
    "or": "{} || {}",
    "not": "!{}",
    "float": "float({})",
    "where": "{0} ? {1} : {2}",
    "at_least": "{0} < {1} ? {1} : {0}",
    "at_most": "{0} > {1} ? {1} : {0}",
    "relu": "{0} < 0.0f ? 0.0f : {0}",
    "minimum": "{0} < {1} || {0} != {0} ? {0} : {1}",
    "maximum": "{0} > {1} || {0} != {0} ? {0} : {1}",
    "sign": "float({0} > 0.0f) - float({0} < 0.0f)",
    "rsqrt": "1.0f / sqrtf({})",
    "reciprocal": "1.0f / {}",
    "round": "rintf({})",
    "pow": "powf({}, {})",
    **{
        name: f"{name}f({{}})"
        for name in ("sqrt", "floor", "ceil", "trunc", "exp", "expm1", "log", "log1p", "sin", "cos")
    },
    **{name: f"{name}f({{}})" for name in ("erf", "atan", "tanh")},
    "sigmoid": "1.0f / (1.0f + expf(-{}))",
    "sigmoid_backward": "{0} * ((1.0f - {1}) * {1})",
    "tanh_backward": "{0} * (1.0f - {1} * {1})",
    "threshold_backward": "{1} <= {2} ? 0.0f : {0}",
}
#: those of values that forward does not have, which need not round as torch's: a division is a call
_OF_GRADIENTS = {
    "div": "{} * reciprocal({})",
    "reciprocal": "reciprocal({})",
    "sigmoid": "reciprocal(1.0f + expf(-{}))",
}
_CONDITIONS = frozenset(["ge", "gt", "le", "lt", "eq", "ne", "and", "or", "not"])
_NUMBERS = {"0": "0.0f", "1": "1.0f", "TRUE": "true", "FALSE": "false"}

_FORWARD = """\
template <int VEC, int LANES>
__device__ __forceinline__ float step_forward(float x, float (&v)[room(STATES)][VEC],
                                              const float (&p)[room(OPERANDS)][LANES],
                                              const float* c, int i, int lane) {
"""
_BACKWARD = """\
template <int NEEDS, int VEC, int LANES>
__device__ __forceinline__ float step_backward(float x, const float (&v)[room(STATES)][VEC],
                                               const float (&p)[room(OPERANDS)][LANES],
                                               const float* c, float g,
                                               float (&grad)[room(STATES)][VEC],
                                               float (&total)[room(TOTALS)][LANES], int i,
                                               int lane) {
"""


@cache
def step_text(program: Program) -> str:
    """Both functions: the output of a step, and the gradient of its input.

    They write the states, their gradients and the sums of ``NEEDS`` where they are given them.
    """
    outputs, grads = program.outputs, program.grads
    exact = {*program.needed(outputs)}
    forward = [*_head(program, outputs), *_lines(program, outputs, exact)]
    forward += [f"v[{k}][i] = {_value(name)};" for k, name in enumerate(outputs[1:])]
    forward.append(f"return {_value(outputs[0])};")
    roots = [*grads, *program.totals]
    backward = [*_head(program, roots), *_lines(program, roots, exact)]
    for k, name in enumerate(program.totals):
        backward.append(f"if (NEEDS & NEED_TOTAL << {k}) total[{k}][lane] += {_value(name)};")
    backward += [f"grad[{k}][i] = {_value(name)};" for k, name in enumerate(grads[1:])]
    backward.append(f"return {_value(grads[0])};")
    return _FORWARD + _body(forward) + "\n" + _BACKWARD + _body(backward)


def _body(lines: Sequence[str]) -> str:
    return "".join(f"  {line}\n" for line in lines) + "}\n"


def _head(program: Program, roots: Sequence[str]) -> list[str]:
    """The states, operands and gradients that are read, by their names."""
    used = {a for k in program.needed(roots) for a in program.lines[k][1]} | set(roots)
    homes = {"s": "v[{}][i]", "p": "p[{}][lane]", "g": "grad[{}][i]"}
    names = sorted(name for name in used if name[0] in homes and name != "g")
    return [f"const float {name} = {homes[name[0]].format(name[1:])};" for name in names]


def _value(name: str) -> str:
    return f"c[{name[1:]}]" if name[0] == "c" else _NUMBERS.get(name, name)


def _lines(program: Program, roots: Sequence[str], exact: Collection[int]) -> list[str]:
    """The lines of ``roots``; of those that are not ``exact`` a product and a sum are one."""
    needed, found = program.needed(roots), []
    products: dict[str, str] = {}
    uses = Counter(a for k in needed for a in program.lines[k][1])
    uses.update(roots)
    for k in needed:
        op, args = program.lines[k]
        if op == "over" and k not in exact:
            op, args = "mul", (args[0], args[2])
        name, values = f"t{k}", [products.get(a, _value(a)) for a in args]
        text = _EXPRESSIONS[op]
        if op == "div" and args[1][0] in "pc":  # of all neurons of a thread
            text = "quotient({}, {})"
        if k not in exact:
            text = _OF_GRADIENTS.get(op, text)
            if op == "mul" and uses[name] == 1 and _is_added(program, needed, name, exact):
                products[name] = "{}, {}".format(*values)
                continue
            text, values = _fused(op, args, values, products, text)
        kind = "bool" if op in _CONDITIONS else "float"
        found.append(f"const {kind} {name} = {text.format(*values)};")
    return found


def _is_added(program: Program, needed: Sequence[int], name: str, exact: Collection[int]) -> bool:
    """Whether a product's one use is a sum, which takes no other product."""
    for k in needed:
        op, args = program.lines[k]
        if name in args:
            return op in ("add", "sub") and k not in exact and args[0] != args[1]
    return False


def _fused(
    op: str, args: Sequence[str], values: list[str], products: dict[str, str], text: str
) -> tuple[str, list[str]]:
    """A sum with a product that was left to it."""
    first, second = (a in products for a in (*args, "", "")[:2])
    sign = "-" if op == "sub" else ""
    if first and second:  # one of them is rounded by itself
        a, b = values[0].split(", ")
        values, first = [f"({a} * {b})", values[1]], False
    if second:
        return f"fmaf({sign}{{1}}, {{0}})", values
    return (f"fmaf({{0}}, {sign}{{1}})", values) if first else (text, values)
