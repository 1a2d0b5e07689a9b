"""Does a fused backend compute what the definition says? The cases, the tolerances, and a command.

    python -m tests.ops.alif.conformance

runs a compact set of cases in which every pair of options' values occurs, and compares outputs,
final state and every gradient by name with the definition in float64 on the CPU. On a GPU they get
the kernels of large inputs, and launches are counted, so that no other path can have answered. Each
case has a row in ``conformance-<dtype>.csv``. ``--tiny`` runs one small forward instead and
compares it bit for bit.

A norm is ``"batch"``, by the input's own statistics, or ``"fixed"``, by the running ones.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from sj_taid._compat import FUNCTIONAL_STATES
from sj_taid.functional import alif_multi_step
from sj_taid.ops import backends, bits
from sj_taid.ops.alif import reference
from sj_taid.ops.alif.norm import Norm
from sj_taid.ops.surrogate import DERIVATIVES

Leaves = dict[str, Tensor]

# Of what is held against the definition. ``value``: elementwise results, relative to the largest
# magnitude in the tensor. ``sum``: a parameter's gradient, a sum over all neurons and steps,
# relative to the sum of magnitudes, where rounding cancels less than the terms do.
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"value": 1e-12, "sum": 1e-12},
    torch.float32: {"value": 1e-5, "sum": 1e-6},
    torch.float16: {"value": 1e-3, "sum": 1e-6},  # one ulp; sums are made in float32
    torch.bfloat16: {"value": 8e-3, "sum": 1e-6},
}
SUMS = ("grad_w", "grad_v_threshold", "grad_weight", "grad_bias")

#: Name -> one step's shape and the order of its axes in memory. Images: neighbours share a channel.
#: Features and channels-last: neighbours are of different channels. Odd: no 16-byte accesses.
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "images": ((3, 4, 4, 4), None),
    "features": ((6, 8), None),
    "channels_last": ((2, 8, 3, 2), (0, 1, 3, 4, 2)),
    "transposed": ((4, 8, 6), (0, 3, 2, 1)),
    "odd": ((3, 5, 3), None),
}

#: float32 and float64 may rightly disagree about a spike this near the threshold.
MARGIN = 2e-5

SURROGATES = tuple(
    name
    for name in DERIVATIVES
    if hasattr(surrogate, name)
    # 0.0.0.0.14's own backward of it raises.
    and (FUNCTIONAL_STATES or name != "NonzeroSignLogAbs")
)

OPTIONS: dict[str, tuple[Any, ...]] = {
    "surrogate": SURROGATES,
    "T": (1, 2, 4, 7, 11, 16, 17, 24, 29),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "layout": tuple(LAYOUTS),
    "v_reset": (0.0, -0.25, None),
    "detach_reset": (False, True),
    "decay_input": (False, True),
    "per_channel": (False, True),
    "v_init": (False, True),
    "through": ("all", "spike_seq", "v", "v_seq"),
    "frozen": ((), ("w",), ("v_threshold",), ("x",), ("w", "v_threshold")),
    "norm": (None, "batch", "fixed"),
    "pack": (False, True),
}

#: For minutes, since each case compiles kernels of its own.
COMPACT = OPTIONS | {
    "T": (1, 4, 17),
    "layout": ("images", "features", "odd"),
    "through": ("all", "spike_seq"),
    "frozen": ((), ("x",)),
}


@dataclass(frozen=True)
class Case:
    """One point of the grid of options; ``shape`` is ``[T, N, C, ...]``."""

    v_reset: float | None = 0.0
    detach_reset: bool = False
    decay_input: bool = True
    channels: int | None = None
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (6, 3, 5)
    surrogate_function: Any = field(default_factory=surrogate.ATan)
    v_init: bool = True
    seed: int = 0

    def options(self) -> dict[str, Any]:
        return {
            "decay_input": self.decay_input,
            "v_reset": self.v_reset,
            "surrogate_function": self.surrogate_function,
            "detach_reset": self.detach_reset,
        }

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def __str__(self) -> str:
        reset = "soft" if self.v_reset is None else f"hard{self.v_reset:g}"
        parts = [
            reset,
            "detach" if self.detach_reset else "attach",
            "decay" if self.decay_input else "nodecay",
            "scalar" if self.channels is None else f"channels{self.channels}",
            str(self.dtype).removeprefix("torch."),
            "x".join(map(str, self.shape)),
            type(self.surrogate_function).__name__,
        ]
        return "-".join(parts)


def tensors(case: Case, device: str = "cpu") -> Leaves:
    """Leaves ``x``, ``v0``, ``w``, ``v_threshold`` for a case, reproducible from its seed."""
    g = torch.Generator().manual_seed(case.seed)
    parameter_shape = () if case.channels is None else (case.channels,)
    parameter_dtype = torch.promote_types(case.dtype, torch.float32)
    leaves = {
        "x": (torch.randn(case.shape, generator=g, dtype=torch.float64) * 1.5 + 0.4).to(case.dtype),
        "v0": (torch.randn(case.shape[1:], generator=g, dtype=torch.float64) * 0.3).to(
            parameter_dtype
        ),
        "w": torch.randn(parameter_shape, generator=g, dtype=torch.float64).to(parameter_dtype),
        "v_threshold": (torch.rand(parameter_shape, generator=g, dtype=torch.float64) + 0.5).to(
            parameter_dtype
        ),
    }
    return {name: t.to(device).requires_grad_() for name, t in leaves.items()}


def results(
    multi_step: Callable[..., tuple[Tensor, Tensor, Tensor | None]],
    case: Case,
    leaves: Leaves | None = None,
    store_v_seq: bool = True,
    through: tuple[str, ...] = ("spike_seq", "v", "v_seq"),
) -> dict[str, Tensor]:
    """Outputs and every gradient by name, under random cotangents for the outputs ``through``.

    The cotangents are rounded to the case's dtypes, so that leaves in float64 get the same ones.
    """
    leaves = leaves or tensors(case)
    v = leaves["v0"] if case.v_init else (case.v_reset or 0.0)
    spike_seq, v_last, v_seq = multi_step(
        leaves["x"],
        v,
        leaves["w"],
        leaves["v_threshold"],
        store_v_seq=store_v_seq,
        **case.options(),
    )
    outputs = {"spike_seq": spike_seq, "v": v_last}
    if v_seq is not None:
        outputs["v_seq"] = v_seq
    g = torch.Generator().manual_seed(case.seed + 1)
    dtypes = {"spike_seq": case.dtype}
    cotangents = {
        n: torch.randn(o.shape, generator=g, dtype=torch.float64)
        .to(dtypes.get(n, torch.promote_types(case.dtype, torch.float32)))
        .to(o)
        for n, o in outputs.items()
        if n in through
    }
    wanted = {n: t for n, t in leaves.items() if t.requires_grad and (n != "v0" or case.v_init)}
    grads = torch.autograd.grad(
        [outputs[n] for n in cotangents],
        list(wanted.values()),
        list(cotangents.values()),
        materialize_grads=True,
    )
    named = {f"grad_{n}": g for n, g in zip(wanted, grads, strict=True)}
    return {n: o.detach() for n, o in outputs.items()} | named


def differences(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], scale: float = 1.0
) -> Iterator[str]:
    """What of two :func:`results` differs beyond the table, by name; spikes must be equal.

    ``scale`` is the number of terms in a parameter's gradient, the size of their sum.
    """
    if got.keys() != expected.keys():
        yield f"there is {', '.join(got)}, expected {', '.join(expected)}"
    for name in got.keys() & expected.keys():
        have, want = got[name], expected[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            yield (
                f"{name}: {list(have.shape)} of {have.dtype}, "
                f"expected {list(want.shape)} of {want.dtype}"
            )
        elif name == "spike_seq":
            if count := int((have != want).sum()):
                yield f"{count} spikes differ"
        elif want.numel():
            # Voltages and their gradients are float32 even for half input.
            tolerance, largest = TOLERANCE[want.dtype], float(want.abs().max())
            if name in SUMS:
                bound = tolerance["sum"] * max(scale, largest)
            else:
                bound = tolerance["value"] * max(1.0, largest)
            error = float((have.double() - want.double()).abs().max())
            if not error <= bound:  # NaN is a difference
                yield f"{name}: error {error:.3g} > {bound:.3g}"


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


class Conformance:
    """One combination of :data:`OPTIONS`: what to run, and what the definition says in float64."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        step, self.axes = LAYOUTS[row["layout"]]
        self.case = Case(
            v_reset=row["v_reset"],
            detach_reset=row["detach_reset"],
            decay_input=row["decay_input"],
            channels=step[1] if row["per_channel"] else None,
            dtype=row["dtype"],
            shape=(row["T"], *step),
            surrogate_function=getattr(surrogate, row["surrogate"])(),
            v_init=row["v_init"],
        )
        self.through, self.frozen = row["through"], row["frozen"]
        self.norm, self.pack = row["norm"], row["pack"]
        self.packed: Tensor | None = None  # the bits that the latest forward returned
        self.name = "-".join(str(value).removeprefix("torch.") for value in row.values())
        #: terms in the sum that is a parameter's gradient
        self.terms = math.prod(self.case.shape) / (self.case.channels or 1)

    def __str__(self) -> str:
        return self.name

    def differences(
        self,
        multi_step: Callable[..., Any],
        device: str = "cpu",
        launches: Counter[str] | None = None,
    ) -> list[str]:
        """What ``multi_step`` gives on a device, beside the definition; empty where they agree.

        ``launches`` counts those of the CUDA kernels.
        """
        leaves = self.leaves()
        moved = {
            n: t.detach().to(device).requires_grad_(t.requires_grad) for n, t in leaves.items()
        }
        if launches is not None:
            launches.clear()
        got = {name: t.cpu() for name, t in self.results(multi_step, moved).items()}
        packed = self.packed
        doubled = self.results(reference.multi_step, _doubled(leaves))
        expected = {n: t.to(got[n].dtype) if n in got else t for n, t in doubled.items()}
        found = [*differences(got, expected, self.terms)]
        if packed is not None and not torch.equal(packed.cpu(), bits.pack(got["spike_seq"])):
            found.append("the bits are not the spikes'")
        if launches is not None:
            found += _other_launches(launches, self.launches())
        return found

    def launches(self) -> dict[str, int]:
        """The launches that the CUDA kernels take."""
        if self.norm != "batch":
            return {"forward": 1, "backward": 1}
        # The input's gradient needs sums over all of the input first.
        return {"statistics": 1, "forward": 1, "backward": 1 if "x" in self.frozen else 2}

    def drawn(self) -> Leaves:
        """Fresh tensors."""
        return self._arranged(self._tensors())

    def leaves(self) -> Leaves:
        """Fresh tensors; neurons that come near their threshold are drawn again."""
        leaves = self._tensors()
        for seed in itertools.count(1):
            near = self._least_distance(leaves) < MARGIN
            if not near.any():
                break
            again = tensors(self.case.with_(seed=seed))
            with torch.no_grad():
                leaves["x"].copy_(torch.where(near, again["x"], leaves["x"]))
        return self._arranged(leaves)

    def results(self, multi_step: Callable[..., Any], leaves: Leaves) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        all_outputs = ("spike_seq", "v", "v_seq")

        def run(*arguments: Any, **options: Any) -> Any:
            norm, pack = self._norm_of(leaves), self.pack
            outputs = multi_step(*arguments, norm=norm, return_bits=pack, **options)
            self.packed = outputs[3] if pack else None
            return outputs[:3]

        return results(
            run,
            self.case,
            leaves,
            store_v_seq=self.through in ("all", "v_seq"),
            through=all_outputs if self.through == "all" else (self.through,),
        )

    def _tensors(self) -> Leaves:
        leaves = tensors(self.case)
        if self.norm:
            # Of the kind that batch norms hold: y's spread is x's, and so are the spikes' odds.
            for i, (name, low) in enumerate((("weight", 1.0), ("bias", 0.0))):
                values = torch.linspace(low, low + 0.6, self.case.shape[2]).roll(i)
                leaves[name] = values.requires_grad_()
        return leaves

    def _norm_of(self, leaves: Leaves) -> Norm | None:
        if not self.norm:
            return None
        weight, bias = leaves["weight"], leaves["bias"]
        mean = torch.linspace(-0.3, 0.9, len(weight)).to(weight)
        return Norm(weight, bias, mean, (1 + mean).square(), self.norm == "batch", 0.1, 1e-5)

    def _arranged(self, leaves: Leaves) -> Leaves:
        if self.axes is not None:
            leaves["x"] = _in_memory_order(leaves["x"], self.axes)
        for name in self.frozen:
            leaves[name].requires_grad_(False)
        return leaves

    def _least_distance(self, leaves: Leaves) -> Tensor:
        """``|H - V_th|`` at each neuron's step nearest to its threshold."""
        distances: list[Tensor] = []

        def fire(x: Tensor) -> Tensor:
            distances.append(x.detach().abs())
            return surrogate.heaviside(x)

        case = self.case.with_(surrogate_function=fire)
        doubled = _doubled(leaves)
        v = doubled["v0"] if case.v_init else case.v_reset or 0.0
        with torch.no_grad():
            reference.multi_step(
                doubled["x"],
                v,
                doubled["w"],
                doubled["v_threshold"],
                store_v_seq=False,
                norm=self._norm_of(doubled),
                **case.options(),
            )
        return torch.stack(distances).amin(0)


def _doubled(leaves: Leaves) -> Leaves:
    return {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in leaves.items()}


def _in_memory_order(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    inverse = sorted(range(len(axes)), key=axes.__getitem__)
    return x.detach().permute(axes).contiguous().permute(inverse).requires_grad_()


def _other_launches(launches: Counter[str], expected: Mapping[str, int]) -> list[str]:
    same = launches == expected
    return [] if same else [f"launches {dict(launches)}, expected {dict(expected)}"]


# ---- the command ----


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; 1 if one of them fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=backends.PREFERENCE, default=device)
    parser.add_argument("--tiny", action="store_true", help="one small forward, bit for bit")
    dtypes = [str(dtype).removeprefix("torch.") for dtype in OPTIONS["dtype"]]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--cases", type=int, help="at most so many of each dtype")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"), help="a folder")
    options = parser.parse_args(arguments)
    (backend,) = backends.PREFERENCE[options.device]
    backends.resolve(backend, torch.zeros(2, 3, device=options.device), surrogate.ATan())
    launches: Counter[str] | None = None
    threads: AbstractContextManager[Any] = nullcontext()
    if options.device == "cuda":
        from sj_taid.ops.alif import cuda

        launches, threads = cuda.launches, as_of_many(cuda)
        print(cuda.compiler())
    if options.tiny:
        found = tiny(backend, options.device, launches)
        print("\n".join(found) or f"{backend}: equal to the definition, bit for bit")
        return bool(found)
    multi_step = partial(alif_multi_step, backend=backend)
    cases = [Conformance(row) for row in pairwise(COMPACT)]
    failed = 0
    with threads:
        for name in options.dtypes:
            chosen = [case for case in cases if case.case.dtype == getattr(torch, name)]
            run = partial(Conformance.differences, multi_step=multi_step, device=options.device)
            failed += write(
                chosen[: options.cases],
                partial(run, launches=launches),
                options.out / f"conformance-{name}.csv",
            )
    return bool(failed)


def as_of_many(cuda: Any) -> AbstractContextManager[Any]:
    """The kernels that large inputs get, several neurons a thread, for inputs of any size."""
    return mock.patch.object(cuda, "_capacity", lambda device: 0)


def write(
    cases: Sequence[Conformance], differences_of: Callable[[Conformance], list[str]], path: Path
) -> int:
    """A row for each case, as soon as it is through; how many are not as the definition says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["case", "outcome", "difference"])
        broken = False
        for case in cases:
            # Before it runs, so that one that never ends is named.
            print(case, end=": ", flush=True)
            if broken:
                outcome, found = "not run", ["the GPU takes no more work of this process"]
            else:
                try:
                    found = differences_of(case)
                except Exception as error:  # whatever a kernel does is the answer here
                    traceback.print_exc()
                    found = [f"{type(error).__name__}: {error}"]
                    broken = not _usable()
                outcome = "failed" if found else "equal"
            failed += outcome != "equal"
            print(f"{outcome} {'; '.join(found)}", flush=True)
            rows.writerow([case, outcome, "; ".join(found)])
            file.flush()
    print(f"{len(cases) - failed} of {len(cases)} cases equal the definition; wrote {path}")
    return failed


def _usable() -> bool:
    """Whether the GPU goes on: after an illegal access it refuses whatever the process asks."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def tiny(backend: str, device: str, launches: Counter[str] | None = None) -> list[str]:
    """What one small forward gives beside the definition on the CPU, bit for bit.

    With ``w = 0``, so that ``q`` is 1/2 wherever a sigmoid is computed.
    """
    x_seq = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    w, v_threshold = torch.zeros(()), torch.ones(())
    options = Case().options() | {"store_v_seq": True}
    expected: Any = reference.multi_step(x_seq, 0.0, w, v_threshold, **options)
    if launches is not None:
        launches.clear()
    moved = (x_seq.to(device), 0.0, w.to(device), v_threshold.to(device))
    outputs: Any = alif_multi_step(*moved, backend=backend, **options)
    found = []
    for name, output, want in zip(("spike_seq", "v", "v_seq"), outputs, expected, strict=True):
        if count := int((output.cpu() != want).sum()):
            found.append(f"{name}: {count} of {want.numel()} values differ")
    return found + ([] if launches is None else _other_launches(launches, {"forward": 1}))


if __name__ == "__main__":
    raise SystemExit(main())
