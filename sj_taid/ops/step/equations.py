"""A step as equations in plain text: :func:`equations`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from .program import Program, Reading

#: how an operation is written, and how tightly it binds; others are functions
_WRITTEN = {
    "or": ("{} or {}", 1), "and": ("{} and {}", 2), "not": ("not {}", 3),
    "ge": ("{} >= {}", 4), "gt": ("{} > {}", 4), "le": ("{} <= {}", 4), "lt": ("{} < {}", 4),
    "eq": ("{} == {}", 4), "ne": ("{} != {}", 4), "float": ("{}", 4),
    "add": ("{} + {}", 5), "sub": ("{} - {}", 5), "mul": ("{} * {}", 6), "scale": ("{} * {}", 6),
    "div": ("{} / {}", 6), "over": ("{} / {}", 6), "neg": ("-{}", 7), "pow": ("{} ** {}", 8),
}  # fmt: skip
_FUNCTIONS = {"at_least": "max", "at_most": "min", "minimum": "min", "maximum": "max"}
_COMPARISONS = ("ge", "gt", "le", "lt")
#: what leaves a parameter's values as they are
_SHAPES = ("view", "reshape", "unsqueeze", "squeeze", "expand", "_to_copy", "alias", "detach")


def equations(
    reading: Reading, states: Sequence[str], tensors: Sequence[str], constants: Mapping[str, str]
) -> list[str]:
    """The lines of a step up to its output ``s`` and its next states, ``v'`` of ``v``.

    A state that no step reads is left out.

    ``constants``: names of constants that stand in place of their numbers.
    """
    numbers = {f"c{k}": number for k, number in enumerate(reading.constants)}
    zeros = {name: "0" for name, number in numbers.items() if not (number or name in constants)}
    lines, same = _simplify(reading.program, zeros)
    texts = {f"s{k}": name for k, name in enumerate(states)}
    texts |= {name: f"{number:.6g}" for name, number in numbers.items()}
    texts |= {**constants, "TRUE": "1", "FALSE": "0"}
    parts = {name: (text, uses) for name, text, uses in reading.formulas.lines}
    own = {f"w{k}": name for k, name in enumerate(tensors)}
    for k, name in enumerate(reading.formulas.operands):
        texts[f"p{k}"] = _of_parameters(name, parts, own)
    names = ["s", *(f"{name}'" for name in states)]
    roots = [same.get(root, root) for root in reading.program.outputs]
    read = {arg for _, args in lines.values() for arg in args} | {*roots}
    kept = [k for k in range(len(roots)) if k == 0 or f"s{k - 1}" in read]
    roots, names = [roots[k] for k in kept], [names[k] for k in kept]
    ends = dict(reversed([*zip(roots, names, strict=True)]))
    uses = Counter(arg for _, args in lines.values() for arg in args)
    taken = {*texts.values(), *own.values(), "x", "s"}
    free = [f"{letter}{n or ''}" for n in range(9) for letter in "habcdefgijk"]
    free = [name for name in free if name not in taken]
    binds: dict[str, int] = {}
    written = []
    for name, (op, args) in lines.items():
        texts[name], binds[name] = _write(op, args, texts, binds)
        if name in ends or uses[name] > 1:
            short = ends.get(name) or free.pop(0)
            written.append(f"{short} = {texts[name]}")
            texts[name] = short
            del binds[name]
    for root, end in zip(roots, names, strict=True):
        if root not in lines or ends[root] != end:
            written.append(f"{end} = {texts.get(root, root)}")
    return written


def _simplify(
    program: Program, zeros: Mapping[str, str]
) -> tuple[dict[str, tuple[str, tuple[str, ...]]], dict[str, str]]:
    """The lines without zeros that surrogates add, and the names of equal values.

    ``h - v_threshold >= 0`` is ``h >= v_threshold``, and ``-s + 1`` is ``1 - s``.
    """
    lines: dict[str, tuple[str, tuple[str, ...]]] = {}
    same = dict(zeros)
    for k in program.needed(program.outputs):
        op, args = program.lines[k]
        args = tuple(same.get(arg, arg) for arg in args)
        if op in ("add", "sub") and args[1] == "0":
            same[f"t{k}"] = args[0]
        elif op == "add" and args[0] == "0":
            same[f"t{k}"] = args[1]
        elif (op == "sub" and args[0] == args[1]) or (op == "mul" and "0" in args):
            same[f"t{k}"] = "0"
        elif op in _COMPARISONS and args[1] == "0" and lines.get(args[0], ("",))[0] == "sub":
            lines[f"t{k}"] = op, lines[args[0]][1]
        elif op == "add" and lines.get(args[0], ("",))[0] == "neg":
            lines[f"t{k}"] = "sub", (args[1], *lines[args[0]][1])
        else:
            lines[f"t{k}"] = op, args
    needed = {same.get(root, root) for root in program.outputs}
    for name in reversed(lines):
        if name in needed:
            needed.update(lines[name][1])
    return {name: line for name, line in lines.items() if name in needed}, same


def _write(
    op: str, args: Sequence[str], texts: Mapping[str, str], binds: Mapping[str, int]
) -> tuple[str, int]:
    """An operation as text, and how tightly that binds."""
    plain = [texts.get(arg, arg) for arg in args]
    if op == "where":
        condition, yes, no = plain
        return f"where({condition}, {yes}, {no})", 9
    if op not in _WRITTEN:
        return f"{_FUNCTIONS.get(op, op)}({', '.join(plain)})", 9
    form, strength = _WRITTEN[op]
    if op == "float":
        return plain[0], binds.get(args[0], 9)
    inner = []
    for k, (arg, text) in enumerate(zip(args, plain, strict=True)):
        least = strength + (k > 0 and op in ("sub", "div", "over", "pow"))
        inner.append(f"({text})" if binds.get(arg, 9) < least else text)
    return form.format(*inner), strength


def _of_parameters(
    name: str, parts: Mapping[str, tuple[str, tuple[str, ...]]], own: Mapping[str, str]
) -> str:
    """What torch computes of parameters, in their names."""
    if name not in parts:
        return own.get(name, name)
    text, uses = parts[name]
    if text.split(".")[1] in _SHAPES:
        return _of_parameters(uses[0], parts, own)
    text = re.sub(r"^aten\.(\w+)\.\w+", r"\1", text)
    text = re.sub(r"float\('(.*?)'\)", r"\1", text)
    return re.sub(r"\b[vw]\d+\b", lambda found: _of_parameters(found[0], parts, own), text)
