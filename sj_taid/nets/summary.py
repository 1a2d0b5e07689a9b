"""The report of ``accelerate``, and the training steps that it measures."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import functional, surrogate
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from .._internal import compat, graph
from .._internal.context import forked
from ..counts import split_counts
from ..fused_neuron import Accelerated
from ..ops import backends
from .modules import AcceleratedNorm, why_not_fused
from .neurons import find_neurons
from .report import Row, table_of

NO_GRADIENT, APART = "its input requires no gradient", "computed apart: "
_ROUNDED = "equal outputs to rounding"
#: times of a step that differ by less are called equal
_NOISE = 0.05
#: Steps that are run in turns; the first make kernels and plans, and are not timed.
_WARM, _STEPS = 2, 5


@dataclass(frozen=True)
class Acceleration:
    """The report of :func:`.accelerate`; ``print`` it for a table.

    Attributes:
        rows: a :class:`~sj_taid.nets.convert.Row` for each neuron and norm.
        saved_bytes: bytes saved for backward, before and after, if there was an example input;
            not that input itself, nor parameters and buffers.
        step_ms: milliseconds of a training step, before and after: the least of turns. Without a
            GPU they are time of the processor, summed over threads: a busy machine adds nothing.
        on_gpu: whether the step ran on one.
        counting: the modules that are no neurons of SpikingJelly's, but make counts of their input
            in the example: path -> class.
    """

    rows: tuple[Row, ...]
    head: str
    saved_bytes: tuple[int, int] | None = None
    step_ms: tuple[float, float] | None = None
    on_gpu: bool = False
    counting: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.head]
        if self.saved_bytes and self.step_ms:
            (old_bytes, new_bytes), (old, new) = self.saved_bytes, self.step_ms
            equal = abs(new - old) <= _NOISE * old
            of = "" if self.on_gpu else " of processor time"
            step = "no difference measurable" if equal else f"{old:.4g} -> {new:.4g} ms{of}"
            saved = f"{old_bytes / 1e6:.3g} -> {new_bytes / 1e6:.3g} MB"
            lines.append(f"saved for backward {saved}, step {step}")
        lines.append(table_of(_merge(self.rows)))
        if self.counting:
            first, kind = next(iter(self.counting.items()))
            more = f" and {len(self.counting) - 1} more" if len(self.counting) > 1 else ""
            lines.append(
                f"counts come from no neurons of SpikingJelly's too: {first} ({kind}){more}; give "
                "them successors: sj_taid.swap_neurons(net, replace=...), docs/swap.md"
            )
        return "\n".join(lines)

    __repr__ = __str__


def report_of(
    net: nn.Module, neurons: dict[str, Row], found: Found | None
) -> tuple[tuple[Row, ...], str]:
    """The rows of a report, and its first line; ``found`` is there if a step was run."""
    for path, why in found.unfused.items() if found else ():
        if neurons[path].state == "fused":
            neurons[path] = neurons[path]._replace(done="", note=why, state="left alone")
    norms = {path: _norm_row(path, norm, found) for path, norm in norms_of(net)}
    rows, fused = neurons | norms, sum(row.state == "fused" for row in neurons.values())
    head = f"{fused} of {len(neurons)} neurons on the fused operator, "
    state, said = ("ready", "ready to be fused") if found is None else ("fused", "fused")
    head += f"{sum(row.state == state for row in norms.values())} of {len(norms)} norms {said}"
    return tuple(rows[path] for path, _ in net.named_modules() if path in rows), head


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


def _norm_row(path: str, norm: nn.Module, found: Found | None) -> Row:
    """What has been done with a norm, or with its output."""
    kind = type(norm).__name__
    if not isinstance(norm, _BatchNorm):
        reason = "no batch norm: no mean and variance per channel of the batch"
        return Row(path, kind, "", reason, "left alone")
    if not isinstance(norm, AcceleratedNorm):
        reason = why_not_fused(norm) or "no neuron is on the fused operator"
        return Row(path, kind, "", reason, "left alone")
    if found is None:
        note = "fused into a neuron that reads it; example= says where"
        return Row(path, kind, "ready", note, "ready")
    if (readers := found.readers.get(path)) is None:
        return Row(path, kind, "", "not run", "left alone")
    fused = ", ".join(f"fused into {reader}" for reader, is_fused in readers.items() if is_fused)
    others = ", ".join(reader for reader, is_fused in readers.items() if not is_fused)
    apart = f"{APART}{'' if others == NO_GRADIENT else 'read by '}{others}" if others else ""
    if fused:
        note = f"{_ROUNDED}{apart and f'; also {apart}'}"
        return Row(path, kind, fused, note, "fused")
    apart = apart or f"{APART}read by no neuron fused"
    note = f"{_ROUNDED}; {apart}" if path in found.own_norms else apart
    return Row(path, kind, "", note, "left alone")


def _merge(rows: Iterable[Row]) -> list[Row]:
    """The rows, equal ones as one."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.state, row.note), []).append(row)
    merged = []
    for first, *rest in groups.values():
        if rest:
            is_one = all(row.done == first.done for row in rest)
            done = first.done if is_one else f"{first.state} each"
            first = first._replace(layer=f"{first.layer} and {len(rest)} more", done=done)
        merged.append(first)
    return merged


@compat.quiet_triton()
def measure(plain: nn.Module, fast: nn.Module, inputs: Any) -> tuple[Found, dict[str, Any]]:
    """Run training steps of two copies of a net: what one shows, and a report's figures.

    Bytes and time are those of a later step, with all kernels and plans made.
    """
    inputs = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), inputs)
    with forked(plain.parameters()):
        found, counting = watch_step(fast, inputs), _find_counting(plain, inputs)
        turns = [[run_step(net, inputs)[1] for net in (plain, fast)] for _ in range(_STEPS)]
        saved_bytes = tuple(run_step(net, inputs, True)[0] for net in (plain, fast))
    step_ms = tuple(map(min, zip(*turns[_WARM:], strict=True)))
    on_gpu = any(tensor.is_cuda for tensor in _tensors_of(plain, inputs))
    figures = {"saved_bytes": saved_bytes, "step_ms": step_ms, "on_gpu": on_gpu}
    return found, figures | {"counting": counting}


class Found(NamedTuple):
    """What a step of an accelerated net shows."""

    #: by the path of each norm that ran: what has read its output, and whether as one operation
    readers: dict[str, dict[str, bool]]
    own_norms: set[str]  #: the paths of norms that the engine's own has computed, not torch's
    unfused: dict[str, str]  #: the path of a neuron -> why no fused operator has run it


def watch_step(net: nn.Module, inputs: Any) -> Found:
    """Run a step of an accelerated net, and look at its norms and neurons."""
    changed: Any = {p: m for p, m in net.named_modules() if isinstance(m, Accelerated)}
    sources: list[tuple[str, Any]] = []
    read: dict[str, tuple[torch.dtype, torch.device]] = {}

    def note(path: str, module: nn.Module, args: Any, y: Any) -> None:
        if isinstance(module, AcceleratedNorm):
            sources.append((path, getattr(y, "_source", None)))
        elif isinstance(args[0], Tensor):
            read[path] = args[0].dtype, args[0].device

    _run_watched(net, inputs, changed, note)
    readers: dict[str, dict[str, bool]] = {}
    for path, source in sources:
        now = {NO_GRADIENT: False} if source is None else source.readers
        readers[path] = readers.get(path, {}) | now
    own_norms = {path for path, source in sources if source is not None and source.is_own}
    engines = {path: find_engine(*about) for path, about in read.items()}
    unfused = {path: why for path, why in engines.items() if isinstance(why, str)}
    return Found(readers, own_norms, unfused)


def find_engine(dtype: torch.dtype, device: torch.device) -> Any:
    """The engine that runs inputs of this kind, or why there is none."""
    engine = backends.resolve(backends.AUTO, torch.empty(1, 1, dtype=dtype, device=device)).engine
    return f"no fused operator for {dtype} on {device.type}" if engine is None else engine


def _run_watched(net: nn.Module, inputs: Any, modules: dict[str, nn.Module], note: Any) -> None:
    """Run a step with ``note(path, module, args, output)`` called by each of these modules."""

    def hook(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        note(path, module, (*args, *kwargs.values()), output)

    handles = [
        module.register_forward_hook(partial(hook, path), with_kwargs=True)
        for path, module in modules.items()
    ]
    run_step(net, inputs)
    for handle in handles:
        handle.remove()


def _find_counting(net: nn.Module, inputs: Any) -> dict[str, str]:
    """The modules of a net's own classes that make counts of real numbers: path -> class."""
    found: dict[str, str] = {}

    def note(path: str, module: nn.Module, args: Any, y: Any) -> None:
        tensors = [t for t in (*args[:1], y) if isinstance(t, Tensor) and t.numel()]
        is_outer = any(inner.startswith(f"{path}.") for inner in found)
        if len(tensors) == 2 and y.any() and not is_outer:
            x_counts, y_counts = (split_counts(t.detach()).are_few for t in tensors)
            if y_counts and not x_counts:
                found[path] = type(module).__name__

    known = "torch", "spikingjelly", "sj_taid"
    parts = {part for site in find_neurons(net) for part in site.node.modules()}
    parts |= {m for m in net.modules() if isinstance(m, surrogate.SurrogateFunctionBase)}
    own = {
        path: module
        for path, module in net.named_modules()
        if type(module).__module__.partition(".")[0] not in known
        and not (module in parts or find_neurons(module))
    }
    _run_watched(net, inputs, own, note)
    return found


@torch.enable_grad()
def run_step(net: nn.Module, inputs: Any, records: bool = False) -> tuple[int, float]:
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

    tensors = _tensors_of(net, inputs)
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    clock = time.perf_counter if devices else time.process_time
    start = clock()
    losses, saved_bytes = graph.record_saved(forward, tensors) if records else (forward(), 0)
    if losses:
        torch.stack(losses).sum().backward()
    for device in devices:
        torch.cuda.synchronize(device)
    return saved_bytes, 1e3 * (clock() - start)


def _tensors_of(net: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors that are there before a step."""
    given = (*net.parameters(), *net.buffers(), *tree_leaves(inputs))
    return [tensor for tensor in given if isinstance(tensor, Tensor)]
