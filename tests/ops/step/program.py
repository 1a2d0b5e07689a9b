"""Runs a program's lines one by one, each by the text that the rows have, without its rows."""

import ctypes
from functools import cache

import numpy as np
import torch

from sj_taid.ops.step.cpu import rows
from sj_taid.ops.step.cpu.loops import PITCH, ROW
from sj_taid.ops.step.text import EXPRESSIONS

OPERATIONS = list(EXPRESSIONS)
#: the arguments that are conditions
CONDITIONS = {"and": (0, 1), "or": (0, 1), "not": (0,), "float": (0,), "where": (0,)}


@cache
def compiled():
    """One row that computes any of the operations on three rows of numbers."""
    lines = ["def row(scratch, given, states, out, after, constants, n):"]
    for k, (op, text) in enumerate(EXPRESSIONS.items()):
        arguments = [f"{name}[i]" for name in ("given", "states", "after")]
        for place in CONDITIONS.get(op, ()):
            arguments[place] += " != ZERO"
        names = [f"a{place}" for place in range(3)]
        loads = [f"{n} = {a}" for n, a in zip(names, arguments, strict=True)]
        used = [load for k, load in enumerate(loads) if f"{{{k}" in text or text.count("{}") > k]
        is_bool = op in ("ge", "gt", "le", "lt", "eq", "ne", "and", "or", "not")
        value = f"({text.format(*names)})"
        lines += [f"    if constants[0] == {k}:", "        for i in range(n):"]
        lines += [f"            {line}" for line in used]
        lines.append(f"            out[i] = {f'f32{value}' if is_bool else value}")
    return rows.compile_row("\n".join([*lines, ""]))


def compute(op, *arguments):
    """An operation on rows of numbers."""
    size = max(a.size for a in arguments)
    assert size <= ROW
    given = np.zeros((4, PITCH), np.float32)
    for row, a in zip(given, arguments, strict=False):
        row[:size] = a
    constants = np.array([OPERATIONS.index(op)], np.float32)
    rows_ = given, *given[:2], given[3], given[2], constants
    pointer = ctypes.POINTER(ctypes.c_float)
    compiled().ctypes(*(a.ctypes.data_as(pointer) for a in rows_), size)
    return given[3, :size].copy()


def run(reading, given):
    """All values of a program, by name, from those that it is given: arrays, or single numbers."""
    program = reading.program
    values = {k: np.atleast_1d(np.asarray(v, np.float32)) for k, v in given.items()}
    values |= {f"c{k}": np.float32([c]) for k, c in enumerate(reading.constants)}
    values |= {"0": np.float32([0]), "1": np.float32([1])}
    values |= {"TRUE": values["1"], "FALSE": values["0"]}
    for k, (op, names) in enumerate(program.lines):
        values[f"t{k}"] = compute(op, *np.broadcast_arrays(*(values[n] for n in names)))
    return values


def results(reading, given, shape):
    """The outputs and gradients of input and states that a program makes, as tensors."""
    values = run(reading, given)
    names = *reading.program.outputs, *reading.program.grads
    found = (np.broadcast_to(values[n], (int(np.prod(shape)),)).copy() for n in names)
    return [torch.from_numpy(v).view(shape) for v in found]
