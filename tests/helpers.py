"""What the numeric tests share: a table of tolerances, the option grid and named gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

# Of what is held against the definition. ``value``: elementwise results, relative to the largest
# magnitude in the tensor. ``sum``: a parameter's gradient, a sum over all neurons and steps,
# relative to the sum of magnitudes, where rounding cancels less than the terms do.
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"value": 1e-12, "sum": 1e-12},
    torch.float32: {"value": 1e-5, "sum": 1e-6},
    torch.float16: {"value": 1e-3, "sum": 1e-6},  # one ulp; sums are made in float32
    torch.bfloat16: {"value": 8e-3, "sum": 1e-6},
}

HALF = (torch.float16, torch.bfloat16)


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


def grid(
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16),
    base: Case | None = None,
) -> list[Case]:
    """reset x detach x decay x granularity x dtype."""
    base = base or Case()
    return [
        base.with_(
            v_reset=v_reset,
            detach_reset=detach,
            decay_input=decay,
            channels=base.shape[2] if per_channel else None,
            dtype=dtype,
        )
        for v_reset, detach, decay, per_channel, dtype in itertools.product(
            (0.0, -0.25, None), (False, True), (False, True), (False, True), dtypes
        )
    ]


def tensors(case: Case, device: str = "cpu") -> dict[str, Tensor]:
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
    leaves: dict[str, Tensor] | None = None,
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


def assert_close(
    got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, scale: float = 1.0
) -> None:
    """Compare two :func:`results` name by name; spikes must be equal.

    ``scale`` is the number of terms in a parameter's gradient, the size of their sum.
    """
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        have = got[name]
        assert have.shape == want.shape and have.dtype == want.dtype, name
        if want.numel() == 0:
            continue
        if name == "spike_seq":
            assert torch.equal(have, want), f"{int((have != want).sum())} spikes differ"
            continue
        # Voltages and their gradients are float32 even for half input.
        tolerance = TOLERANCE[want.dtype]
        if name in ("grad_w", "grad_v_threshold", "grad_weight", "grad_bias"):
            bound = tolerance["sum"] * max(scale, float(want.abs().max()))
        else:
            bound = tolerance["value"] * max(1.0, float(want.abs().max()))
        error = float((have.double() - want.double()).abs().max())
        assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g} ({dtype})"


def assert_equals_a_float32_copys(
    multi_step: Callable[..., Any], case: Case, leaves: dict[str, Tensor]
) -> None:
    """Results on half leaves are those on a float32 copy, rounded at the end, bit for bit."""
    got = results(multi_step, case, leaves)
    copied = leaves | {"x": leaves["x"].detach().float().requires_grad_(leaves["x"].requires_grad)}
    expected = results(multi_step, case, copied)
    assert got.keys() == expected.keys()
    for name, have in got.items():
        state = name not in ("spike_seq", "grad_x")
        assert have.dtype == (torch.float32 if state else case.dtype), name
        want = expected[name].to(have.dtype)
        assert have.stride() == want.stride(), name
        assert_same_bits(have, want, name)


def assert_same_bits(got: Tensor, expected: Tensor, name: str = "") -> None:
    """Equal bits, but for NaN, of which there are many."""
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan), name
    bits = {2: torch.int16, 4: torch.int32}[expected.itemsize]
    have, want = (t.masked_fill(nan, 0).view(bits) for t in (got, expected))
    assert torch.equal(have, want), f"{name}: {int((have != want).sum())} differ"


def assert_not_finite_alike(
    multi_step: Callable[..., Any], reference: Callable[..., Any], case: Case
) -> None:
    """From infinite and NaN inputs and voltages the same outputs, and gradients, NaN for NaN."""
    leaves = tensors(case)
    g = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for leaf in (leaves["x"], leaves["v0"]):
            kind = torch.randint(0, 12, leaf.shape, generator=g)
            kind[..., 0] = 3  # a channel stays as it is
            for i, value in enumerate((torch.inf, -torch.inf, torch.nan)):
                leaf.masked_fill_(kind == i, value)
    got, expected = (results(f, case, leaves) for f in (multi_step, reference))
    assert expected["grad_x"].isfinite().any() and expected["grad_x"].isnan().any()
    for name, want in expected.items():
        bound = 0.0 if name in ("spike_seq", "v", "v_seq") else TOLERANCE[want.dtype]["value"]
        torch.testing.assert_close(got[name], want, rtol=bound, atol=bound, equal_nan=True)
