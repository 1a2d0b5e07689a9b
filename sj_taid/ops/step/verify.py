"""The check of a reading: what is compiled computes what the step computes, or does not run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .autograd import apply_fused
from .plan import find_plan, spec_of
from .program import NotRead, Reading
from .record import Neuron
from .trace import undisturbed

#: steps, and how far two results may be apart, relative to 1 and to the size of theirs
_STEPS, _FAR = 3, 1e-3
#: what part of the neurons may differ where values are equal to rounding alone: a spike's threshold
_FEW = 0.02

_ASK = "please report it with the neuron's class"

_checked: set[Any] = set()


def verify(
    neuron: Neuron, reading: Reading, shape: tuple[int, ...], engine: Any, device: Any
) -> str | None:
    """Why what is compiled is not used: it differs from the step.

    From states that are tensors once a structure, in a process. For each reading as a new neuron
    starts, which its numbers may change, on one sample of one pixel, which a step may ask for.

    Raises:
        Exception: one that is passing, of which nothing is kept.
    """
    kind = getattr(neuron.node, "_taid_kind", type(neuron.node))
    channels = reading.operand_channels, reading.total_channels
    key = engine, kind, reading.program, reading.formulas, *channels
    if 0 in shape[1:2]:
        return None
    many, one = ((n, *shape[1:2], *[n - 1 or 1] * (len(shape) - 2)) for n in (4, 1))
    with undisturbed(), torch.enable_grad():
        try:
            pairs = [
                pair
                for sizes in ((one,) if key in _checked else (many, one))
                for pair in _results(neuron, reading, sizes, sizes is many, engine, device)
            ]
        except NotRead:
            raise
        except Exception as error:
            if is_passing(error):
                raise
            kind, text = type(error).__name__, str(error).strip().partition("\n")[0]
            return (
                f"its step does not compile ({kind}: {text[:100]}), so the plain class runs: {_ASK}"
            )
        if any(
            (a is None) != (b is None) or differs(a, b, is_end, reading.exact)
            for a, b, is_end in pairs
        ):
            return (
                "compiled, its step gives other values than in torch, so the plain class runs: "
                + _ASK
            )
    _checked.add(key)
    return None


def is_passing(error: Exception) -> bool:
    """Whether an error is of the moment, such as no memory: it is raised, and no refusal kept."""
    text = str(error).lower()
    return isinstance(error, OSError | MemoryError | torch.cuda.OutOfMemoryError) or any(
        cause in text for cause in ("out of memory", "allocate memory", "captur")
    )


def _results(
    neuron: Neuron, reading: Reading, sizes: Any, are_tensors: bool, engine: Any, device: Any
) -> Any:
    """Outputs, states and gradients of the step in torch, and of what is compiled.

    Not ``are_tensors``: the states start as a new neuron's, of which a step may make others.
    """
    generator = torch.Generator().manual_seed(0)
    normal: Any = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    x, *states = normal(_STEPS, *sizes).mul_(2), *(normal(sizes).mul_(0.5) for _ in neuron.states)
    upstream = [normal(t.shape).to(device) for t in (x, *states)]
    x, *states = (t.to(device) for t in (x, *states))
    starts = [0.0] * len(states)
    if not are_tensors:
        states = neuron.starts(x)
        starts = [0.0 if isinstance(s, Tensor) else float(s) for s in states]
    tensors = [t.detach().to(device, torch.float32, copy=True) for t in neuron.tensors.values()]
    found = []
    for run in (neuron.run_sequence, partial(run_plan, engine, reading, starts)):
        given, split = [x, *states, *tensors], 1 + len(states)
        given = [t.clone().requires_grad_() if isinstance(t, Tensor) else t for t in given]
        ends = run(given[0], given[1:split], given[split:])
        leaves = [t for t in given if isinstance(t, Tensor)]
        used = ends if are_tensors else ends[:1]  # mostly nothing reads the last states
        pairs = [(e, g) for e, g in zip(used, upstream, strict=False) if e.requires_grad]
        grads: Any = [None] * len(leaves)
        if pairs:
            roots, gs = zip(*pairs, strict=True)
            grads = torch.autograd.grad(roots, leaves, gs, allow_unused=True)
        found.append([*ends, *grads])
    with torch.no_grad():
        plain = neuron.run_sequence(x, states, tensors, neuron.plain_step)
    if any(differs(a, b, True, True) for a, b in zip(plain, found[0], strict=False)):
        raise NotRead("gives other values without gradients, or by its type")
    results = list(zip(*found, strict=True))
    if not torch.equal(*results[0]):
        results = results[: len(results) - len(tensors)]
    return [(a, b, k <= len(states)) for k, (a, b) in enumerate(results)]


def run_plan(
    engine: Any, reading: Reading, starts: Any, x: Tensor, states: Any, tensors: Any
) -> list[Tensor]:
    plan = find_plan(engine, spec_of(x, reading, saves=True))
    states = [s if isinstance(s, Tensor) else None for s in states]
    output, *last, _, _ = apply_fused(plan, tuple(starts), "", x, *states, *tensors, *[None] * 4)
    return [output, *last]


def differs(a: Tensor | None, b: Tensor | None, is_end: bool, exact: bool) -> bool:
    """Whether two results are too far apart; of an exact reading ends are equal to the bit."""
    if a is None or b is None:
        return any(t is not None and bool(t.detach().any()) for t in (a, b))
    a, b = a.detach(), b.detach()
    if is_end and exact:
        return not torch.equal(a.nan_to_num(nan=0.5), b.nan_to_num(nan=0.5))
    far = ~torch.isclose(
        a,
        b,
        rtol=_FAR,
        atol=_FAR * max(1.0, float(a.nan_to_num(0, 0, 0).abs().max())),
        equal_nan=True,
    )
    return int(far.sum()) > (0 if exact else _FEW * far.numel())
