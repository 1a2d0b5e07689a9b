"""Comparison of a fused backend with the definition, in float64 on the CPU, over many cases.

Outputs, final state and every gradient by name are compared, over combinations in which every pair
of options' values occurs. On a GPU launches are counted, which proves that the kernels answered.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from sj_taid._internal.compat import FUNCTIONAL_STATES
from sj_taid.ops import bits
from sj_taid.ops.step import reference
from sj_taid.ops.step.plan import Spec, spec_of
from sj_taid.ops.step.program import Reading
from sj_taid.ops.surrogate import MultiLevelSpikeCount, Rect, is_integer, levels_of
from tests.helpers import HALF, Case, Leaves, differences, results, tensors
from tests.ops.step.norm import read_unchecked

#: Name -> one step's shape and the order of a sequence's axes in memory. Images: neighbours share a
#: channel. Features and channels-last: they do not. Odd: no 16-byte accesses.
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "images": ((3, 4, 4, 4), None),
    "features": ((6, 8), None),
    "channels_last": ((2, 8, 3, 2), (0, 1, 3, 4, 2)),
    "transposed": ((4, 8, 6), (0, 3, 2, 1)),
    "odd": ((3, 5, 3), None),
}
#: float32 and float64 may rightly disagree about a spike this near the threshold.
MARGIN = 2e-5
_BASES = (
    surrogate.SurrogateFunctionBase,
    getattr(surrogate, "MultiArgsSurrogateFunctionBase", surrogate.SurrogateFunctionBase),
)
#: SpikingJelly's, without one that draws, and one whose backward raises on 0.0.0.0.14
SURROGATES = {
    name: kind
    for name, kind in (vars(surrogate) | {"Rect": Rect}).items()
    if isinstance(kind, type)
    and issubclass(kind, _BASES)
    and kind not in (*_BASES, MultiLevelSpikeCount)
    and name != "PoissonPass"
    and (FUNCTIONAL_STATES or kind is not surrogate.NonzeroSignLogAbs)
}
COUNTS = {
    "counts": partial(MultiLevelSpikeCount, 4),
    "window": partial(MultiLevelSpikeCount, 6, grad_window=(-0.5, 3.25)),
    "one": partial(MultiLevelSpikeCount, 1),
    "many": partial(MultiLevelSpikeCount, 14),
}
OPTIONS: dict[str, tuple[Any, ...]] = {
    "surrogate": ("ATan", "S2NN", "QPseudoSpike"),  # of all: test_fused.py
    "T": (1, 2, 7, 16, 17, 24, 29),
    "dtype": (torch.float32, *HALF),
    "layout": tuple(LAYOUTS),
    "v_reset": (0.0, -0.25, None),
    "detach_reset": (False, True),
    "decay_input": (False, True),
    "per_channel": (False, True),
    "v_init": (False, True),
    "through": (("spike_seq", "v", "v_seq"), ("spike_seq",), ("v",), ("v_seq",)),
    "frozen": ((), ("w",), ("v_threshold",), ("x",), ("w", "v_threshold")),
    "norm": (None, "batch", "fixed"),
    "lacks": ((), ("weight",), ("bias",)),
    "pack": (False, True),
    "moved": (False, True),
}
#: The same of neurons that count, in fewer combinations, since each compiles.
COUNT_OPTIONS = OPTIONS | {
    "T": (1, 4, 24),
    "layout": ("images", "features", "odd"),
    "through": OPTIONS["through"][:2],
    "frozen": ((), ("x",), ("w", "v_threshold")),
    "surrogate": tuple(COUNTS),
    "v_reset": (None,),
    "stateless": (False, True),
}
#: For a GPU, on which each case compiles kernels of its own.
COMPACT = OPTIONS | {
    "surrogate": tuple(SURROGATES),
    "T": (1, 4, 17),
    "layout": ("images", "features", "odd"),
    "through": OPTIONS["through"][:2],
    "frozen": ((), ("x",)),
}


def pairwise(options: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Few combinations in which every pair of values of two options occurs (greedy).

    >>> [list(row.values()) for row in pairwise({"a": "xy", "b": "xy", "c": "xy"})]
    [['x', 'x', 'x'], ['x', 'y', 'y'], ['y', 'x', 'y'], ['y', 'y', 'x']]
    """
    names = list(options)
    # A dict for its order.
    pairs = {
        frozenset({(a, x), (b, y)}): None
        for a, b in itertools.combinations(names, 2)
        for x in options[a]
        for y in options[b]
    }
    turns = {name: list(values) for name, values in options.items()}
    while pairs:
        row = dict(next(iter(pairs)))
        for name in names:
            if name not in row:
                row[name] = max(
                    turns[name],
                    key=lambda value: sum(
                        frozenset({(name, value), other}) in pairs for other in row.items()
                    ),
                )
                # Equally good values take turns.
                turns[name].append(turns[name].pop(turns[name].index(row[name])))
        for pair in itertools.combinations(row.items(), 2):
            pairs.pop(frozenset(pair), None)
        yield {name: row[name] for name in names}


def make_case(row: Mapping[str, Any]) -> Case:
    """One combination of :data:`OPTIONS`."""
    row = dict(row)
    step, axes = LAYOUTS[row.pop("layout")]
    return Case(
        channels=step[1] if row.pop("per_channel") else None,
        shape=(row.pop("T"), *step),
        surrogate_function=(SURROGATES | COUNTS)[row.pop("surrogate")](),
        axes=axes,
        **row,
    )


def make_spec(case: Case, x: Tensor | None = None, **changes: Any) -> Spec:
    """The spec of a case's call, in which w and the threshold learn."""
    x = tensors(case)["x"] if x is None else x
    norm = (case.norm is not None, case.norm == "fixed")
    options = ("v_seq" in case.through, case.pack, True)
    return spec_of(x, make_reading(case), *norm, *options)._replace(**changes)


def make_reading(case: Case) -> Reading:
    """The reading of a case's neuron."""
    leaves = tensors(case)
    parameters = [leaves[n] for n in ("w", "v_threshold") if not (n == "w" and case.stateless)]
    return read_unchecked(case.shape[1:], parameters, case.options())


def tensors_off_threshold(case: Case) -> Leaves:
    """:func:`tensors` in which no neuron comes near its threshold."""
    leaves = tensors(case)
    for seed in itertools.count(1):
        near = _least_distance(case, leaves) < MARGIN
        if not near.any():
            return leaves
        again = tensors(case.with_(seed=seed))["x"]
        with torch.no_grad():
            leaves["x"].copy_(torch.where(near, again, leaves["x"]))
    raise AssertionError


def _least_distance(case: Case, leaves: Leaves) -> Tensor:
    """``|H - V_th|`` at each neuron's step nearest to its threshold.

    Of counts, that of ``H / V_th`` from a half or a bound of the window.
    """
    distances: list[Tensor] = []

    def fire(x: Tensor) -> Tensor:
        distances.append(x.detach().abs())
        return surrogate.ATan()(x)

    def watch(module: Any, inputs: Any) -> None:
        x = inputs[0].detach()
        edges = (x.floor() + 0.5, module.grad_min, module.grad_max)
        distances.append(torch.stack([(x - edge).abs() for edge in edges]).amin(0))

    if is_integer(case.surrogate_function):
        fire = copy.deepcopy(case.surrogate_function)
        fire.register_forward_pre_hook(watch)
    case = case.with_(surrogate_function=fire, through=("spike_seq",))
    results(reference.multi_step, case, _double(leaves))
    return torch.stack(distances).amin(0)


def _double(leaves: Leaves) -> Leaves:
    return {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in leaves.items()}


def _most_packed(case):
    """The most of counts is 2 at least: one bit has no NaN."""
    return max(levels_of(case.surrogate_function), 1 + is_integer(case.surrogate_function))


def compare(
    case: Case,
    multi_step: Callable[..., Any],
    device: str = "cpu",
    launches: Counter[str] | None = None,
) -> list[str]:
    """The differences of ``multi_step`` on a device from the definition.

    ``launches`` counts those of the CUDA kernels.
    """
    leaves = tensors_off_threshold(case)
    moved = {n: t.detach().to(device).requires_grad_(t.requires_grad) for n, t in leaves.items()}
    if launches is not None:
        launches.clear()
    got = {name: t.cpu() for name, t in results(multi_step, case, moved).items()}
    packed = got.pop("bits", None)
    exact = results(reference.multi_step, case.with_(pack=False), _double(leaves))
    expected = {n: t.to(got[n].dtype) if n in got else t for n, t in exact.items()}
    found = [*differences(got, expected, case, leaves)]
    most = _most_packed(case)
    if packed is not None and not torch.equal(packed, bits.pack(got["spike_seq"], most)):
        found.append("the bits are not the spikes'")
    if launches is not None:
        found += _compare_launches(launches, expected_launches(case))
    return found


def expected_launches(case: Case) -> dict[str, int]:
    """The launches that the CUDA kernels take, by name."""
    expected = {"neuron_forward": 1, "neuron_backward": 1}
    if case.norm:
        expected["norm_gradients"] = 1
    if case.norm == "batch":
        # The input's gradient needs sums over all of the input first.
        expected["neuron_backward"] = 2 - ("x" in case.frozen)
    if case.pack and _most_packed(case) > 1:
        expected["pack"] = 1
    if {"w", "v_threshold"} - {*case.frozen, *(["w"] if case.stateless else [])}:
        expected["parameter_gradients"] = 1
    return expected


def _compare_launches(launches: Counter[str], expected: Mapping[str, int]) -> list[str]:
    same = launches == expected
    return [] if same else [f"launches {dict(launches)}, expected {dict(expected)}"]


def use_large_kernels(cuda: Any) -> AbstractContextManager[Any]:
    """Give inputs of any size the kernels of large ones, with several neurons per thread."""
    return mock.patch.object(cuda, "_capacity", lambda device: 0)
