"""The report of ``accelerate``, and the training steps that it measures."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import _compat, _graph
from ..neurons import copy_net, find_neurons
from ..report import Row, table_of
from .modules import NO_GRADIENT, AcceleratedNorm, why_no_norm

FUSED, ALREADY = "fused operator", "on the fused operator already"
#: times of a step that differ by less are called equal
_NOISE = 0.05


class Acceleration:
    """The report of :func:`.accelerate`: ``print`` it, after a step for what read each norm.

    Attributes:
        saved_bytes: bytes saved for backward, before and after, if there was an example input;
            not that input itself, nor parameters and buffers.
        step_ms: milliseconds of a training step, before and after: the least of turns.
    """

    def __init__(
        self,
        net: nn.Module,
        neurons: dict[str, Row],
        saved_bytes: tuple[int, int] | None = None,
        step_ms: tuple[float, float] | None = None,
    ) -> None:
        self._net, self._neurons = net, neurons
        self.saved_bytes, self.step_ms = saved_bytes, step_ms

    @property
    def rows(self) -> tuple[Row, ...]:
        """A :class:`~sj_taid.report.Row` for each neuron and norm."""
        rows = self._neurons | {path: _norm_row(path, norm) for path, norm in norms_of(self._net)}
        return tuple(rows[path] for path, _ in self._net.named_modules() if path in rows)

    def __str__(self) -> str:
        neurons = self._neurons.values()
        fused = sum((row.done or row.note) in (FUSED, ALREADY) for row in neurons)
        norms = _count_norms(self._net)
        lines = [f"{fused} of {len(neurons)} neurons on the fused operator, {norms}"]
        if self.saved_bytes and self.step_ms:
            (old_bytes, new_bytes), (old, new) = self.saved_bytes, self.step_ms
            equal = abs(new - old) <= _NOISE * old
            step = "no difference measurable" if equal else f"{old:.4g} -> {new:.4g} ms"
            saved = f"{old_bytes / 1e6:.3g} -> {new_bytes / 1e6:.3g} MB"
            lines.append(f"saved for backward {saved}, step {step}")
        return "\n".join([*lines, table_of(_merge(self.rows))])

    __repr__ = __str__


def norms_of(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """The norms of ``net``, by path: batch norms, and layers that are named as norms are."""
    return [
        (path, module)
        for path, module in net.named_modules()
        if isinstance(module, _BatchNorm)
        or (not module._modules and any(map(_is_norm, type(module).__mro__)))
    ]


def _is_norm(kind: type) -> bool:
    return re.fullmatch(r"[A-Za-z]\w*Norm(\dd)?", kind.__name__) is not None


def _count_norms(net: nn.Module) -> str:
    """How many norms are fused, and what has read the rest."""
    norms, states = norms_of(net), Counter[str]()
    for _, norm in norms:
        if isinstance(norm, AcceleratedNorm):
            first = next((f"apart: {_why_apart([r])}" for r in norm._taid_readers), "not run yet")
            states["fused" if any(norm._taid_readers.values()) else first] += 1
    fused = states.pop("fused", 0)
    rest = ", ".join(f"{count} {state}" for state, count in states.most_common())
    return f"{fused} of {len(norms)} norms fused" + (f" ({rest})" if rest else "")


def _norm_row(path: str, norm: nn.Module) -> Row:
    """What has been done with a norm, or with its output."""
    kind = type(norm).__name__
    if not isinstance(norm, _BatchNorm):
        return Row(path, kind, "", "no batch norm: no mean and variance per channel of the batch")
    if not isinstance(norm, AcceleratedNorm):
        return Row(path, kind, "", why_no_norm(norm) or "no neuron is on the fused operator")
    fused = [f"fused into {reader}" for reader, is_fused in norm._taid_readers.items() if is_fused]
    others = _why_apart([reader for reader, is_fused in norm._taid_readers.items() if not is_fused])
    if fused:
        also = f"; also computed apart: {others}" if others else ""
        return Row(path, kind, ", ".join(fused), f"equal outputs to rounding{also}")
    if others:
        return Row(path, kind, "", f"computed apart: {others}")
    return Row(path, kind, "waits", "not run yet")


def _why_apart(readers: list[str]) -> str:
    """Why a norm was not fused into a neuron: what has read its output, if anything could."""
    named = ", ".join(reader for reader in readers if reader != NO_GRADIENT)
    reasons = [f"read by {named}"] if named else []
    return ", ".join([*reasons, NO_GRADIENT] if NO_GRADIENT in readers else reasons)


def _merge(rows: Iterable[Row]) -> list[Row]:
    """The rows, equal ones as one."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.done.partition(" into ")[0], row.note), []).append(row)
    merged = []
    for (_, done, _), (first, *rest) in groups.items():
        if rest:
            done += " each" * (done != first.done)
            first = first._replace(layer=f"{first.layer} and {len(rest)} more", done=done)
        merged.append(first)
    return merged


@_compat.quiet_triton()
@torch.inference_mode(False)
def measure(
    net: nn.Module,
    inputs: Any,
    accelerate: Callable[[nn.Module], Any],
    unaccelerate: Callable[[nn.Module], Any],
) -> tuple[dict[str, dict[str, bool]], tuple[int, int], tuple[float, float]]:
    """Run training steps of a copy before and after, in turns: readers, saved bytes and ms."""
    trial, turns = copy_net(net), []
    inputs = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), inputs)
    with torch.random.fork_rng({p.device for p in trial.parameters() if p.is_cuda}):
        for _ in range(6):  # the first compiles the kernels
            unaccelerate(trial)  # an earlier call's too
            before = run_step(trial, inputs)
            accelerate(trial)
            turns.append((before, run_step(trial, inputs)))
    norms = norms_of(trial)
    readers = {path: n._taid_readers for path, n in norms if isinstance(n, AcceleratedNorm)}
    (old_bytes, _), (new_bytes, _) = turns[0]
    old, new = (min(ms for _, ms in steps) for steps in zip(*turns, strict=True))
    return readers, (old_bytes, new_bytes), (old, new)


@torch.enable_grad()
def run_step(net: nn.Module, inputs: Any) -> tuple[int, float]:
    """Forward from rest and, if something requires a gradient, backward: saved bytes and ms."""
    functional.reset_net(net)

    def forward() -> list[Tensor]:
        try:
            outputs = tree_leaves(net(*inputs) if isinstance(inputs, tuple) else net(inputs))
        except Exception as error:
            if all(site.node.step_mode == "s" for site in find_neurons(net)):
                error.add_note(
                    "All neurons are in step mode 's'. If the net takes a whole sequence "
                    "[T, N, *], change it first: functional.set_step_mode(net, 'm')"
                )
            raise
        return [t.float().sum() for t in outputs if isinstance(t, Tensor) and t.requires_grad]

    given = (*net.parameters(), *net.buffers(), *tree_leaves(inputs))
    tensors = [tensor for tensor in given if isinstance(tensor, Tensor)]
    start = time.perf_counter()
    losses, saved_bytes = _graph.record_saved(forward, tensors)
    if losses:
        torch.stack(losses).sum().backward()
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return saved_bytes, 1e3 * (time.perf_counter() - start)
