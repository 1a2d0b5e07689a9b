"""Shared by the numeric tests: cases, the one table of tolerances, and comparisons."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sj_taid.ops.step import reference
from sj_taid.ops.surrogate import MultiLevelSpikeCount, is_integer
from tests.ops.step.norm import BatchNorm, batch_norm, with_norm

Leaves = dict[str, Tensor]
HALF = (torch.float16, torch.bfloat16)

# ``value``: elementwise results, relative to the largest magnitude in the tensor. ``sum``: a
# parameter's gradient, a sum over all neurons and steps, relative to :func:`sizes_of_sums`. In
# float32 it is 16 roundings, about what a step takes.
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"value": 1e-12, "sum": 1e-12},
    torch.float32: {"value": 1e-5, "sum": 1e-6},
    torch.float16: {"value": 1e-3, "sum": 1e-6},  # one ulp; sums are made in float32
    torch.bfloat16: {"value": 8e-3, "sum": 1e-6},
}
SUMS = {"grad_w", "grad_v_threshold", "grad_weight", "grad_bias"}


@dataclass(frozen=True)
class Case:
    """One combination of the operator's options; ``shape`` is ``[T, N, C, ...]``."""

    v_reset: float | None = 0.0
    detach_reset: bool = False
    decay_input: bool = True
    channels: int | None = None
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (6, 3, 5)
    surrogate_function: Any = field(default_factory=surrogate.ATan)
    v_init: bool = True
    seed: int = 0
    axes: tuple[int, ...] | None = None  # of x in memory
    through: tuple[str, ...] = ("spike_seq", "v", "v_seq")  # the outputs that have a gradient
    frozen: tuple[str, ...] = ()
    norm: str | None = None  # by the "batch"'s statistics or "fixed" ones
    lacks: tuple[str, ...] = ()  # the norm's weight or bias
    pack: bool = False
    moved: bool = False  # what is saved for backward comes back in another layout
    stateless: bool = False  # of counts

    def options(self) -> dict[str, Any]:
        names = ("decay_input", "v_reset", "surrogate_function", "detach_reset")
        return {name: getattr(self, name) for name in names}

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def __str__(self) -> str:
        """What differs from the defaults."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given["surrogate_function"] = type(self.surrogate_function).__name__
        default = {f.name: f.default for f in fields(self)} | {"surrogate_function": "ATan"}
        parts = (f"{name}={value}" for name, value in given.items() if value != default[name])
        return "-".join(parts).replace("torch.", "").replace(" ", "") or "default"


def grid(dtypes: tuple[torch.dtype, ...], base: Case = Case()) -> list[Case]:
    """reset x detach x decay x granularity x dtype."""
    names = ("v_reset", "detach_reset", "decay_input", "channels", "dtype")
    booleans = (False, True)
    values = ((0.0, -0.25, None), booleans, booleans, (None, base.shape[2]), dtypes)
    return [base.with_(**dict(zip(names, row, strict=True))) for row in itertools.product(*values)]


def count_grid(dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """The same of counts: detach x charge x granularity x dtype."""
    fires = MultiLevelSpikeCount(4, grad_window=(-0.5, 3.75))
    cases = grid(dtypes, Case(surrogate_function=fires))
    cases = [case for case in cases if case.v_reset is None]
    return cases + [case.with_(stateless=True) for case in cases if case.decay_input]


def tensors(case: Case, device: str = "cpu") -> Leaves:
    """Leaves by name, reproducible from the case's seed."""
    g = torch.Generator().manual_seed(case.seed)
    dtype = torch.promote_types(case.dtype, torch.float32)
    parameter = () if case.channels is None else (case.channels,)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    leaves = {
        "x": (draw(case.shape) * 1.5 + 0.4).to(case.dtype),
        "v0": (draw(case.shape[1:]) * 0.3).to(dtype),
        "w": draw(parameter).to(dtype),
        "v_threshold": (torch.rand(parameter, generator=g, dtype=torch.float64) + 0.5).to(dtype),
    }
    if case.axes is not None:
        inverse = sorted(range(len(case.axes)), key=case.axes.__getitem__)
        leaves["x"] = leaves["x"].permute(case.axes).contiguous().permute(inverse)
    if case.norm:  # the spread of the norm's output is x's, and so are the odds of spikes
        for i, (name, low) in enumerate((("weight", 1.0), ("bias", 0.0))):
            if name not in case.lacks:
                leaves[name] = torch.linspace(low, low + 0.6, case.shape[2]).roll(i)
    return {n: t.to(device).requires_grad_(n not in case.frozen) for n, t in leaves.items()}


def reverse(t: Tensor) -> Tensor:
    """A copy whose axes have the opposite order in memory."""
    axes = tuple(reversed(range(t.dim())))
    return t.permute(axes).clone(memory_format=torch.contiguous_format).permute(axes)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Another default dtype of torch, for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def norm_of(case: Case, leaves: Leaves) -> BatchNorm | None:
    """The case's norm, by statistics of its own where they are fixed."""
    if not case.norm:
        return None
    mean = torch.linspace(-0.3, 0.9, case.shape[2]).to(leaves["v_threshold"])
    moments = (mean, (1 + mean).square(), case.norm == "batch", 0.1, 1e-5)
    return BatchNorm(leaves.get("weight"), leaves.get("bias"), *moments)


def results(
    multi_step: Callable[..., Any], case: Case, leaves: Leaves | None = None
) -> dict[str, Tensor]:
    """Outputs and every gradient by name, under random cotangents for the case's outputs.

    The cotangents are rounded to the case's dtypes, so that leaves in float64 get the same ones.
    """
    leaves = leaves or tensors(case)
    if case.norm or case.pack:
        multi_step = with_norm(multi_step, norm_of(case, leaves), case.pack)
    with saved_tensors_hooks(reverse, lambda t: t) if case.moved else nullcontext():
        spike_seq, v_last, v_seq, *bits = multi_step(
            leaves["x"],
            leaves["v0"] if case.v_init else (case.v_reset or 0.0),
            None if case.stateless else leaves["w"],
            leaves["v_threshold"],
            store_v_seq="v_seq" in case.through,
            **case.options(),
        )
    outputs = {"spike_seq": spike_seq, "v": v_last}
    if v_seq is not None:
        outputs["v_seq"] = v_seq
    g = torch.Generator().manual_seed(case.seed + 1)
    of_state = torch.promote_types(case.dtype, torch.float32)
    cotangents = {
        n: torch.randn(o.shape, generator=g, dtype=torch.float64)
        .to(case.dtype if n == "spike_seq" else of_state)
        .to(o)
        for n, o in outputs.items()
        if n in case.through
    }
    given = {"v0": case.v_init, "w": not case.stateless}
    wanted = {n: t for n, t in leaves.items() if t.requires_grad and given.get(n, True)}
    grads = torch.autograd.grad(
        [outputs[n] for n in cotangents],
        list(wanted.values()),
        list(cotangents.values()),
        materialize_grads=True,
    )
    found = outputs | {f"grad_{n}": g for n, g in zip(wanted, grads, strict=True)}
    return {n: t.detach() for n, t in found.items()} | ({"bits": bits[0]} if bits else {})


def step_by_step(
    x_seq: Tensor, v: Tensor | float, w: Tensor | None, v_threshold: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """The definition, where each neuron has a ``w`` and a threshold of its own at each step."""
    shape, outputs = x_seq.shape[1:], []
    v = v.reshape(1, -1) if isinstance(v, Tensor) else v
    options["store_v_seq"] = False
    for t, x in enumerate(x_seq):
        parameters = w if w is None else w[t].flatten(), v_threshold[t].flatten()
        spikes, v, _ = reference.multi_step(x.reshape(1, 1, -1), v, *parameters, **options)
        outputs.append((spikes.view(shape), v.view(shape)))
    spike_seq, v_seq = map(torch.stack, zip(*outputs, strict=True))
    return spike_seq, v_seq[-1], v_seq


def sizes_of_sums(case: Case, leaves: Leaves) -> dict[str, Tensor]:
    """What the rounding of a parameter's gradient is relative to, by name, in float64.

    The gradient is a sum of terms, one for each step and neuron. Each was rounded at every step
    that it went back through, relative to its magnitude; a surrogate's derivative is right relative
    to its largest value, about one.
    """
    leaves = {name: leaf.detach().double() for name, leaf in leaves.items()}
    x, norm = leaves["x"], norm_of(case, leaves)
    every = {n: reference.per_channel(leaves[n], x[0]).expand_as(x) for n in ("w", "v_threshold")}
    if norm is not None:
        every["x"], *moments = batch_norm(x, norm)
        mean, rstd = (reference.per_channel(t, x[0]) for t in moments)
    every = {n: t.clone().requires_grad_() for n, t in (leaves | every).items()}
    plain = case.with_(norm=None, pack=False, moved=False)
    terms = results(step_by_step, plain, every)
    if norm is not None:
        of_y = terms["grad_x"]
        terms |= {"grad_bias": of_y, "grad_weight": of_y * (x - mean) * rstd}
    sizes = {}
    for name in SUMS & terms.keys() & {f"grad_{n}" for n in leaves}:
        is_scalar = leaves[name.removeprefix("grad_")].dim() == 0
        sums = terms[name].abs().sum([axis for axis in range(x.dim()) if axis != 2 or is_scalar])
        sizes[name] = (len(x) * sums).clamp(min=x.numel() / max(sums.numel(), 1))
    return sizes


def differences(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], case: Case, leaves: Leaves
) -> Iterator[str]:
    """Differences of two :func:`results` beyond the tolerances, by name; spikes must be equal."""
    if got.keys() != expected.keys():
        yield f"there is {', '.join(got)}, expected {', '.join(expected)}"
    sizes = sizes_of_sums(case, leaves)
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
            tolerance, most = TOLERANCE[want.dtype], torch.finfo(want.dtype).max
            finite = want[want.isfinite()].double().abs()
            if want.dtype == torch.float16:  # beyond its largest number infinity is right
                have, want = (t.clamp(-most, most) for t in (have, want))
            have, want = have.double(), want.double()
            if name in SUMS:
                bound = tolerance["sum"] * sizes[name]
            else:
                bound = tolerance["value"] * torch.cat([torch.ones(1), finite.cpu()]).max()
            error = (have - want).abs()
            if not (error <= bound.to(error.device)).all():  # NaN is a difference
                yield f"{name}: error {error.max():.3g} > {bound.max():.3g}"


def assert_close(
    got: dict[str, Tensor], expected: dict[str, Tensor], case: Case, leaves: Leaves
) -> None:
    """Assert that :func:`differences` finds none."""
    assert not [*differences(got, expected, case, leaves)]


def assert_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Assert that two :func:`results` are equal."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def assert_not_finite_alike(
    multi_step: Callable[..., Any], reference: Callable[..., Any], case: Case
) -> None:
    """From infinite and NaN inputs and voltages the same outputs and gradients, NaN for NaN.

    Behind a norm voltages are equal to rounding, otherwise exactly.
    """
    leaves = tensors(case)
    g = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for leaf in (leaves["x"], leaves["v0"]):
            kind = torch.randint(0, 12, leaf.shape, generator=g)
            kind[..., 0] = 3  # a channel stays as it is
            for i, value in enumerate((torch.inf, -torch.inf, torch.nan)):
                leaf.masked_fill_(kind == i, value)
    got, expected = (results(f, case, leaves) for f in (multi_step, reference))
    # A count passes no gradient where it is not finite.
    seen = expected["v" if is_integer(case.surrogate_function) else "grad_x"]
    assert seen.isfinite().any() and seen.isnan().any()
    for name, want in expected.items():
        exact = name == "spike_seq" or (name in ("v", "v_seq") and not case.norm)
        bound = 0.0 if exact else TOLERANCE[want.dtype]["value"]
        torch.testing.assert_close(got[name], want, rtol=bound, atol=bound, equal_nan=True)


def beside(edges: Tensor) -> Tensor:
    """Numbers, and those next to them; for 0 none that a GPU's kernels would flush to it."""
    below, above = (torch.nextafter(edges, edges + sign) for sign in (-1, 1))
    is_zero = edges == 0
    return torch.stack([edges, below.where(~is_zero, -1e-30), above.where(~is_zero, 1e-30)])


def assert_counts_at_their_edges(
    multi_step: Callable[..., Any],
    reference: Callable[..., Any],
    device: str = "cpu",
    **changes: Any,
) -> None:
    """Counts and gradients where H / V_th is a half or a bound of the window, and next to it."""
    for threshold in (1.0, 0.3, 3.0):
        edges = beside(torch.arange(-8, 32) / 4 * threshold).reshape(1, -1, 1)
        x = edges.to(changes.get("dtype", torch.float32))
        for window in (None, (-0.5, 4.25), (1.0, 1.0)):
            fires = MultiLevelSpikeCount(4, grad_window=window)
            case = Case(None, False, False, None, x.dtype, (*x.shape,), fires).with_(**changes)
            leaves = {"x": x, "v_threshold": torch.tensor(threshold)}
            found = _compare_at_edges(multi_step, reference, case, leaves, device)
            assert found["spike_seq"].unique().tolist() == [0, 1, 2, 3, 4]


def assert_spikes_at_their_edges(
    multi_step: Callable[..., Any],
    reference: Callable[..., Any],
    device: str = "cpu",
    **changes: Any,
) -> None:
    """Spikes and gradients where V is a multiple of V_th, and next to it.

    Nothing leaks and nothing comes in; a soft reset takes V down, one threshold a step.
    """
    for threshold in (1.0, 0.3, 3.0):
        v = beside(torch.arange(-2, 6) * threshold).reshape(-1, 1)
        case = Case(shape=(6, *v.shape)).with_(**changes)
        x = torch.zeros(case.shape, dtype=case.dtype)
        leaves = {
            "x": x,
            "v0": v,
            "w": torch.tensor(-200.0),
            "v_threshold": torch.tensor(threshold),
        }
        found = _compare_at_edges(multi_step, reference, case, leaves, device)
        assert torch.equal(found["spike_seq"][0].cpu() == 1, v >= threshold)


def _compare_at_edges(
    multi_step: Callable[..., Any],
    reference: Callable[..., Any],
    case: Case,
    leaves: Leaves,
    device: str,
) -> dict[str, Tensor]:
    """Those of the reference, in the same dtype, so that not even one rounding may differ."""
    leaves = {n: t.to(device).requires_grad_() for n, t in (tensors(case) | leaves).items()}
    got, expected = (results(f, case, leaves) for f in (multi_step, reference))
    assert_close(got, expected, case, leaves)
    return expected
